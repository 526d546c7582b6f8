"""The device of the tests: the CPU, or the one in ``ROLLOUT_TEST_DEVICE``, which ``make test-gpu`` sets."""

from __future__ import annotations

import os

import torch

_NAMED = torch.device(os.environ.get("ROLLOUT_TEST_DEVICE", "cpu"))
# With its index, because torch does not consider "cuda" equal to the "cuda:0" of a tensor.
DEVICE = torch.device("cuda", _NAMED.index or 0) if _NAMED.type == "cuda" else _NAMED
GPU = DEVICE if DEVICE.type == "cuda" else None
