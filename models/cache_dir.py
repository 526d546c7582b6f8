"""The user's cache folder of converted models; compiled kernels are kept beside it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of converted models: ``$XDG_CACHE_HOME/rollout/models``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rollout" / "models"
