"""Where Triton launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
