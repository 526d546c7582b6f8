"""One thread for tiny models; where tests run on the CPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os

import pytest
import torch

# Helpers assert as tests do, and say as much when they fail.
pytest.register_assert_rewrite("tests.support")

from tests.support.devices import GPU  # noqa: E402 - after the line above

# On a busy machine the threads of small operations mostly wait for each other.
torch.set_num_threads(1)

# Read when Triton is first imported, which torch and transformers leave to those who need it.
if GPU is None:
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # Convolutions of recurrent families are in TF32 otherwise, which has ten bits; products are not.
    torch.backends.cudnn.allow_tf32 = False
