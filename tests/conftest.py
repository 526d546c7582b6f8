"""One thread for tiny models; on a machine without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os

import torch

# On a busy machine the threads of small operations mostly wait for each other.
torch.set_num_threads(1)

# Read when Triton is first imported, which torch and transformers leave to those who need it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
