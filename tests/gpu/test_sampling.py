"""Sampling on a GPU never synchronizes, with any filters."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from rollout.models.sampling.sampler import RowSampling, _triton_kernel, sample
from rollout.models.sampling.top_p import _kernel_works
from tests.support.devices import DEVICE
from tests.support.sampling import One, rows_of


def on_device(rows: RowSampling) -> RowSampling:
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(rows, **{name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize(
    "rows",
    [
        [One(), One(temperature=0.0)],
        [One(top_k=5), One(top_p=0.9), One(min_p=0.1), One(temperature=0.0)],
        [One(top_p=0.9999), One(top_p=0.5, top_k=40, min_p=0.01)],
    ],
)
def test_sampling_never_synchronizes(rows: list[One]) -> None:
    assert _kernel_works(DEVICE)
    assert _triton_kernel(DEVICE) is not None
    logits = torch.randn(len(rows), 50_000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parameters, positions = on_device(rows_of(rows)), torch.arange(len(rows), device=DEVICE)
    first = sample(logits, parameters, positions)  # compiles, which may synchronize
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = sample(logits, parameters, positions)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(first.tokens, again.tokens)
    on_cpu = sample(logits.cpu(), rows_of(rows), positions.cpu())
    assert torch.equal(on_cpu.tokens, again.tokens.cpu())
