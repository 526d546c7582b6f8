"""Which device tests run on: the CPU, unless ``ROLLOUT_TEST_DEVICE`` names another, as ``make test-gpu`` does."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("ROLLOUT_TEST_DEVICE", "cpu"))
GPU = DEVICE if DEVICE.type == "cuda" else None
