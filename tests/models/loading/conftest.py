"""Saved models that tests of loading share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.saved_models import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, which tests only read."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, which a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "changed"))
