"""Every policy drives the engine's loop to the end, with little memory and with a budget."""

from __future__ import annotations

import pytest

from rollout import Engine, SamplingParams
from rollout.batcher.registry import POLICIES
from tests.support.parity import page_bytes
from tests.support.tiny_models import tiny

_PROMPTS = [[5 + i % 7] * (3 + 5 * i % 23) for i in range(24)]
_PARAMS = [SamplingParams(n=1 + i % 3, max_new_tokens=4 + 11 * i % 40, ignore_eos=i % 2 == 0) for i in range(24)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    batch = Engine(tiny("llama"), None, policy="static").generate(_PROMPTS, _PARAMS)
    return [record.completion_ids for record in batch]


@pytest.mark.parametrize("budget_ms", [None, 1e-3, 20.0])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_finishes_the_job(name: str, budget_ms: float | None, alone: list[list[int]]) -> None:
    model = tiny("llama")
    engine = Engine(model, None, policy=name, max_kv_bytes=14 * page_bytes(model), latency_budget_ms=budget_ms)
    batch = engine.generate(_PROMPTS, _PARAMS)
    assert [record.completion_ids for record in batch] == alone
    assert {record.error_class for record in batch} == {""}
