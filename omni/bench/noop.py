"""The stage of `omni bench serve`: hands its prompt back, so that all time of a request is the server's."""

from __future__ import annotations


async def echo(prompt: str) -> str:
    """`prompt` as it is."""
    return prompt
