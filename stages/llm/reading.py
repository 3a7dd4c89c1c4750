"""From tokens to streamed text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 character to."""


class TextReader:
    """Takes tokens as they come and gives the text that is safe to show; `text` is all that was given."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        """True once a stop string has been met."""
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context = 0
        """Decoding starts here, at tokens whose text is out already: a tokenizer may join words by what is before."""
        self._read = 0
        self._held = ""
        """Decoded, but perhaps the beginning of a stop string."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` make certain; empty after a stop string."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._context : self._read])
        now = self._decode(self._tokens[self._context :])
        if now.endswith(REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The text that was held back; call it when no more tokens come."""
        before = self._decode(self._tokens[self._context : self._read])
        rest = self._release(self._decode(self._tokens[self._context :])[len(before) :])
        held, self._held = self._held, ""
        self._context = self._read = len(self._tokens)
        return rest + self._give(held)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._give(text[: min(found)])
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return self._give(text[: len(text) - keep])

    def _give(self, text: str) -> str:
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
