"""What tests of Triton's kernels share."""

from __future__ import annotations

import pytest
import torch

from rollout.models.attention import triton, triton_metadata
from rollout.models.attention.triton import TileSizes
from tests.support.triton_interpreter import kernels_run_here


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run; in the interpreter their cuts are small, so that short sequences have several."""
    found = kernels_run_here(monkeypatch)
    if found.type == "cpu":
        monkeypatch.setattr(triton_metadata, "SPLIT_TOKENS", 32)
        small = {key: (TileSizes(16, 16, 4), TileSizes(16, 16, 4)) for key in triton._TILE_SIZES}
        monkeypatch.setattr(triton, "_TILE_SIZES", small)
        monkeypatch.setattr(triton, "_PROGRAMS", 5)
    return found
