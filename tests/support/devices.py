"""Which device tests run on: the CPU, unless ``ROLLOUT_TEST_DEVICE`` names another, as ``make test-gpu`` does."""

from __future__ import annotations

import os

import torch

_NAMED = torch.device(os.environ.get("ROLLOUT_TEST_DEVICE", "cpu"))
# With its number: torch does not take "cuda" for the same device as the "cuda:0" that a tensor there says it is on.
DEVICE = torch.device("cuda", _NAMED.index or 0) if _NAMED.type == "cuda" else _NAMED
GPU = DEVICE if DEVICE.type == "cuda" else None
