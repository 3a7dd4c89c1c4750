"""Who may use the server: API keys, the names it goes by, and the web pages that may call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class ApiKey(msgspec.Struct, frozen=True):
    """A key by its name and the SHA-256 of its secret; the secret itself is not kept."""

    name: str
    digest: bytes

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def parse_api_keys(values: Sequence[str], environment: Mapping[str, str] = {}) -> tuple[ApiKey, ...]:
    """Keys from `NAME=SECRET` and `@FILE` texts and from the variable OMNI_API_KEYS. Raises UsageError."""
    raise NotImplementedError
