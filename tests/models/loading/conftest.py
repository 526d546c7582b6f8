"""What tests of loading share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "spoilt"))
