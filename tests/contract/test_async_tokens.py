"""Tokens that are read a step late, as on a GPU: the records are those of tokens that are read at once."""

from __future__ import annotations

from functools import partial

import pytest

from rollout import Engine, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds
from rollout.engine.loop import Loop
from tests.support.parity import random_prompts, tight_engine
from tests.support.tiny_models import shallow

_PARAMS = (
    SamplingParams(n=2, max_new_tokens=24),
    SamplingParams(n=1, max_new_tokens=30, temperature=0.0, stop_token_ids=tuple(range(3, 60, 4))),
    SamplingParams(n=3, max_new_tokens=20, temperature=1.3, stop_token_ids=tuple(range(50, 190, 7))),
    SamplingParams(n=1, max_new_tokens=1),
)


@pytest.mark.parametrize(("family", "atol"), [("llama", 1e-5), ("bloom", 1e-5), ("falcon_h1", 3e-5)])
def test_records_are_the_same(family: str, atol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shallow(family)
    prompts = random_prompts(21, 8)
    prompts[3] = prompts[2]
    params = [_PARAMS[i % len(_PARAMS)] for i in range(len(prompts))]
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=False))
    expected = Engine(model, None).generate(prompts, params, seed=3)
    assert {record.finish_reason for record in expected} == {"stop", "length"}

    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=True))
    policy = StaticPolicy(Bounds(max_rows=5, prefill_tokens=13))
    engines = [Engine(model, None), Engine(model, None, max_rows=1), Engine(model, None, policy=policy)]
    if family != "falcon_h1":  # preemption computes its states in another order
        engines.append(tight_engine(model, 26))
    for engine in engines:
        for record, same in zip(engine.generate(prompts, params, seed=3), expected, strict=True):
            assert (record.row_id, record.sample) == (same.row_id, same.sample)
            assert (record.completion_ids, record.finish_reason) == (same.completion_ids, same.finish_reason)
            assert record.logprobs == pytest.approx(same.logprobs, abs=atol)
            assert record.sampler_logprobs == pytest.approx(same.sampler_logprobs, abs=atol)
