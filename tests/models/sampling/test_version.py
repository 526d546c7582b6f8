"""The version of the draws: whoever changes what a seed draws must raise it."""

from __future__ import annotations

import hashlib

import pytest
import torch

from rollout.engine.batch_row import noise_key
from rollout.models.sampling.base import GumbelKernel
from rollout.models.sampling.gumbel_cpu import gumbel_max
from rollout.models.sampling.gumbel_tensor import TensorGumbelMax
from rollout.models.sampling.sampler import sample_with
from rollout.models.sampling.version import SAMPLER_VERSION
from tests.support.sampling import One, rows_of

_KINDS = (
    One(),
    One(temperature=0.7),
    One(temperature=0.0),
    One(temperature=1.5, top_k=20),
    One(top_p=0.9),
    One(min_p=0.05),
    One(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01),
)
#: The digest of the tokens of `drawn`, by the version that drew them.
_DRAWN = {1: "c2384b9ab972cc2a53c32c63110a3712f644e24b977b26c165ef7bbc5360aea5"}


def drawn(kernel: GumbelKernel) -> torch.Tensor:
    """Draw for 1,400 rows of all kinds, whose logits are exact in every arithmetic."""
    count, vocabulary = 1400, 3000
    number = torch.arange(count)
    logits = ((number[:, None] * 7919 + torch.arange(vocabulary) * 104729) % 6151).float() / 512
    kinds = [_KINDS[row % len(_KINDS)] for row in range(count)]
    keys = [noise_key(row % 3 - 1, f"row-{row // 2}") for row in range(count)]
    rows = [
        One(kind.temperature, kind.top_k, kind.top_p, kind.min_p, key=key, sample=row % 5)
        for row, (kind, key) in enumerate(zip(kinds, keys, strict=True))
    ]
    return sample_with(kernel, logits, rows_of(rows), 11 * number).tokens


@pytest.mark.parametrize("name", ["tensor", "compiled"])
def test_the_draws_of_this_version_are_known(name: str) -> None:
    kernel = TensorGumbelMax() if name == "tensor" else gumbel_max()
    if kernel is None:
        pytest.skip("the compiled kernel is unavailable")
    tokens = drawn(kernel)
    assert tokens.unique().numel() > 200
    digest = hashlib.sha256(",".join(map(str, tokens.tolist())).encode()).hexdigest()
    assert digest == _DRAWN[SAMPLER_VERSION], (
        "the same seeds draw other tokens than before: raise SAMPLER_VERSION and add its draws here"
    )
