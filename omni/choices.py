"""What users choose by name, on the command line and in Python. Quick to import, since `omni --help` shows it."""

from __future__ import annotations

from typing import Literal

RunnerChoice = Literal["auto", "inline", "ray"]
"""Which runner a graph gets; `auto` leaves it to the planner."""
