"""One thread for tiny models: on a busy machine the threads of small operations mostly wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
