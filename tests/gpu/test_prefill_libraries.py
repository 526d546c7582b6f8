"""Prefill libraries, where installed: they equal plain attention and do not depend on batch composition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.models.attention import prefill_libraries, select
from rollout.models.attention.prefill import VarlenFunction
from rollout.models.attention.prefill_libraries import LIBRARIES
from rollout.models.attention.triton import TritonBackend
from rollout.models.errors import UnsupportedAttention
from rollout.models.kv_cache.layout import MaskKind
from tests.support.devices import DEVICE
from tests.support.paged_sequences import Kind, PagedWorld, same_bits, whole
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny

_KINDS = (Kind(2, 6, 128, 128), Kind(2, 2, 64, 64, MaskKind("window", 300)))


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> VarlenFunction:
    try:
        select.check_available(request.param, DEVICE)
    except UnsupportedAttention as error:
        pytest.skip(str(error))
    return prefill_libraries.installed(request.param)


def test_any_mix_is_plain_attention(library: VarlenFunction) -> None:
    world = PagedWorld([700, 1, 300], torch.bfloat16, 1, _KINDS, 2e-2, device=DEVICE, slab_pages=16)
    prefill_libraries.check(library, world.pool.layout, DEVICE)
    steps = TritonBackend(world.pool, library)
    for parts in world.random_parts(np.random.default_rng(1), 400):
        world.compare(world.attend(steps(world.pool, world.forward(parts)).compute, parts), parts)


def test_company_changes_no_bit(library: VarlenFunction) -> None:
    lengths = [700, 90, 33]
    world = PagedWorld(lengths, torch.bfloat16, 2, _KINDS, 2e-2, device=DEVICE)
    steps = TritonBackend(world.pool, library)
    alone = [
        world.attend(steps(world.pool, world.forward(own := [(i, range(n))])).compute, own)
        for i, n in enumerate(lengths)
    ]
    parts = whole(world)
    together = world.attend(steps(world.pool, world.forward(parts)).compute, parts)
    same_bits(alone, together, parts, world.kinds)


def test_an_engine_captures_decode_steps_beside_it(library: VarlenFunction, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(tiny("mistral", torch.bfloat16).to(DEVICE), None, attention=library.name)
    assert engine.attention == f"{library.name}+triton"
    with caplog.at_level("INFO"):
        engine.generate(random_prompts(3, 8), SamplingParams(max_new_tokens=8, ignore_eos=True))
    assert "captured in CUDA graphs" in caplog.text
