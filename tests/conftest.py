"""Settings for the whole suite: nothing is downloaded, and Ray asks for no token and sends no usage report."""

from __future__ import annotations

import os

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
