"""From the messages of a chat to the inputs of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from omni.graph import Graph, base_type
from omni.server.bodies import ChatMessage, ImagePart, TextPart
from omni.server.errors import bad_request

MESSAGES, PROMPT, IMAGE, SYSTEM = "messages", "prompt", "image", "system"
SYSTEM_ROLES = ("system", "developer")


def chat_inputs(graph: Graph, messages: Sequence[ChatMessage], gives_text: bool) -> tuple[dict[str, Any], list[str]]:
    """Raw inputs, and the addresses of the last user message's pictures. Raises ApiError.

    A graph with an input `messages` gets all of them. Otherwise the last user message is the prompt, after what was
    said before it when the graph answers in text; system messages go to the input `system`, or before the prompt.
    """
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise bad_request(f"'messages[{number}].content' is missing", f"{MESSAGES}[{number}].content")
    asked = [message for message in messages if message.role == "user"]
    if not asked:
        raise bad_request("'messages' has no message of the user", MESSAGES)
    pictures = [part.image_url.url for part in parts_of(asked[-1]) if isinstance(part, ImagePart)]
    if pictures and IMAGE not in graph.inputs:
        raise bad_request("this graph takes no pictures: its messages hold text alone", MESSAGES)
    if MESSAGES in graph.inputs and base_type(graph.inputs[MESSAGES].type) in ("json", "any"):
        return {MESSAGES: [msgspec.to_builtins(message) for message in messages]}, pictures
    system = "\n".join(text_of(message) for message in messages if message.role in SYSTEM_ROLES)
    turns = [message for message in messages if message.role not in SYSTEM_ROLES]
    if gives_text and len(turns) > 1:
        prompt = "\n".join(f"{message.role}: {text_of(message)}" for message in turns)
    else:
        prompt = text_of(asked[-1])
    if system and SYSTEM in graph.inputs:
        return {PROMPT: prompt, SYSTEM: system}, pictures
    return {PROMPT: f"{system}\n\n{prompt}" if system else prompt}, pictures


def parts_of(message: ChatMessage) -> list[TextPart | ImagePart]:
    """The parts of a message."""
    if message.content is None:
        return []
    return [TextPart(text=message.content)] if isinstance(message.content, str) else message.content


def text_of(message: ChatMessage) -> str:
    """The text of a message."""
    return "\n".join(part.text for part in parts_of(message) if isinstance(part, TextPart))
