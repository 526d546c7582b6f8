"""The user's cache folder: converted models, and kernels beside them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/rollout/models``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rollout" / "models"
