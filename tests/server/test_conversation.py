"""What of a conversation becomes the inputs of a graph."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from omni.graph import Graph, resolve
from omni.server.bodies import ChatMessage
from omni.server.conversation import chat_inputs
from omni.server.errors import ApiError
from omni.spec import GraphSpec, InputSpec
from omni.testing import DoubleSpec, doubles


def graph_of(**types: str) -> Graph:
    inputs = {name: InputSpec(type=kind) for name, kind in types.items()}
    with doubles():
        return resolve(GraphSpec(inputs=inputs, stages={"a": DoubleSpec(ports=types)}))


def messages(*pairs: tuple[str, Any]) -> list[ChatMessage]:
    return [msgspec.convert({"role": role, "content": content}, ChatMessage) for role, content in pairs]


TALK = messages(("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three"))
PICTURE = [{"type": "text", "text": "this"}, {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}]


def test_an_assistant_may_have_said_nothing() -> None:
    talk = messages(("user", "one"), ("assistant", None), ("user", "two"))
    assert chat_inputs(graph_of(prompt="text"), talk, True)[0] == {"prompt": "user: one\nassistant: \nuser: two"}
    (said,) = chat_inputs(graph_of(messages="json"), talk, True)[0].values()
    assert said[1]["content"] is None
    with pytest.raises(ApiError, match=r"'messages\[1\].content' is missing") as caught:
        chat_inputs(graph_of(prompt="text"), messages(("user", "one"), ("user", None)), True)
    assert caught.value.param == "messages[1].content"


@pytest.mark.parametrize(
    ("types", "gives_text", "inputs"),
    [
        ({"prompt": "text"}, True, {"prompt": "be brief\n\nuser: one\nassistant: two\nuser: three"}),
        ({"prompt": "text"}, False, {"prompt": "be brief\n\nthree"}),
        ({"prompt": "text", "system": "text"}, False, {"prompt": "three", "system": "be brief"}),
    ],
)
def test_the_prompt(types: dict[str, str], gives_text: bool, inputs: dict[str, str]) -> None:
    assert chat_inputs(graph_of(**types), TALK, gives_text) == (inputs, [])


def test_one_message_is_the_prompt_as_it_is() -> None:
    assert chat_inputs(graph_of(prompt="text"), messages(("user", "x")), True) == ({"prompt": "x"}, [])


def test_a_graph_may_take_all_messages() -> None:
    inputs, _ = chat_inputs(graph_of(messages="json"), TALK, True)
    assert [message["content"] for message in inputs["messages"]] == ["be brief", "one", "two", "three"]


def test_pictures_come_from_the_last_message() -> None:
    graph = graph_of(prompt="text", image="image")
    assert chat_inputs(graph, messages(("user", PICTURE)), False) == ({"prompt": "this"}, ["data:x"])
    assert chat_inputs(graph, messages(("user", PICTURE), ("user", "then")), False) == ({"prompt": "then"}, [])
    with pytest.raises(ApiError, match="takes no pictures"):
        chat_inputs(graph_of(prompt="text"), messages(("user", PICTURE)), False)


def test_somebody_has_to_ask() -> None:
    with pytest.raises(ApiError, match="no message of the user"):
        chat_inputs(graph_of(prompt="text"), messages(("system", "x")), True)
