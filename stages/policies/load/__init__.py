"""How weights arrive: chunks of all components at once, through one pool of reader threads."""

from __future__ import annotations

from stages.policies.load.blueprint import ComponentRequest
from stages.policies.load.components import load_components

__all__ = ["ComponentRequest", "load_components"]
