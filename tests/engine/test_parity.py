"""The distance of sampled log-probabilities from the module's own forward, in the stats of every call."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.engine import parity as parity_module
from rollout.engine.live_module import LiveModule
from rollout.engine.parity import ParityMeter, ParitySample
from rollout.records import Record
from rollout.requests import Request
from rollout.stats import Parity
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(n=2, max_new_tokens=20, ignore_eos=True, temperature=0.7)


def parity_of(engine: Engine, prompts: Any, params: SamplingParams = _PARAMS) -> Parity:
    parity = engine.generate(prompts, params).stats.parity
    assert parity is not None
    return parity


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "bloom", "falcon_h1"])
def test_every_call_has_a_distance_of_rounding(family: str) -> None:
    engine = Engine(tiny(family), None)
    for prompts in (random_prompts(1, 1), random_prompts(2, 5)):
        parity = parity_of(engine, prompts)
        assert 0 < parity.mean <= parity.p99 <= parity.max < 1e-5
        assert 0 <= parity.self_mean <= parity.self_p99 <= parity.self_max < 1e-5
        assert 1 <= parity.rows <= min(8, 2 * len(prompts))
        assert 8 <= parity.tokens <= 20 * parity.rows


@pytest.mark.parametrize("wrong", ["weights", "temperature"])
def test_distance_shows_what_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    if wrong == "weights":
        # The engine computes with weights that are not the module's any more.
        plain = LiveModule.borrowed_plainly

        def changed(self: LiveModule) -> Any:
            with torch.no_grad():
                model.lm_head.weight.mul_(1.01)
            return plain(self)

        monkeypatch.setattr(LiveModule, "borrowed_plainly", changed)
    else:
        monkeypatch.setattr(ParitySample, "add", _with_temperature(ParitySample.add, 0.8))
    parity = parity_of(engine, random_prompts(1, 3))
    assert parity.mean > 1e-3
    assert parity.self_max < 1e-5


def _with_temperature(add: Any, temperature: float) -> Any:
    def other(self: ParitySample, request: Request, record: Record) -> None:
        add(self, replace(request, params=replace(request.params, temperature=temperature)), record)

    return other


def test_half_precision_is_judged_by_the_modules_distance_from_itself() -> None:
    parity = parity_of(Engine(tiny("llama", dtype=torch.bfloat16), None), random_prompts(3, 6))
    assert 1e-4 < parity.self_mean < 0.01
    assert 1e-4 < parity.mean < 0.02
    assert parity.max < 2 * parity.self_max


def test_autocast_of_the_caller_holds() -> None:
    engine = Engine(tiny("llama"), None)
    with torch.autocast("cpu", torch.bfloat16):
        parity = parity_of(engine, random_prompts(3, 6))
    assert 1e-4 < parity.self_mean < 0.01
    assert 1e-4 < parity.mean < 0.02
    assert parity.max < 3 * parity.self_max


def test_rows_are_chosen_by_what_they_are_and_not_by_when_they_finish() -> None:
    engines = [Engine(tiny("llama"), None, max_rows=rows) for rows in (2, 60)]
    params = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)
    found = [parity_of(engine, random_prompts(4, 6), params) for engine in engines]
    assert found[0].rows == found[1].rows
    assert found[0].self_max == found[1].self_max  # the same rows, computed by the module alone


def test_rows_with_tokens_of_earlier_weights_are_not_compared() -> None:
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    record = Engine(tiny("llama"), None).generate(random_prompts(5, 1), params)[0]
    request = Request(row_id="a", prompt_ids=(), params=params)
    sample = ParitySample()
    for versions in ([0] * 6, [0] * 6, [0, 0, 0, 1, 1, 1], [1] * 6, [1] * 6):
        sample.add(request, replace(record, weight_version=versions[-1], weight_versions=versions))
    assert len(sample.chosen(10_000, weight_version=1)) == 2
    assert sample.chosen(10_000, weight_version=2) == []  # they changed after the last record


def test_rows_resumed_from_another_process_are_not_compared() -> None:
    """Their versions count from 0 as well, whatever the weights were."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    record = Engine(tiny("llama"), None).generate(random_prompts(5, 1), params)[0]
    request = Request(row_id="a", prompt_ids=(), params=params)
    for before, compared in ((record.completion_ids[:3], 0), ([], 1)):
        sample = ParitySample()
        sample.add(replace(request, resumed={0: replace(record, completion_ids=before)}), record)
        assert len(sample.chosen(10_000, weight_version=0)) == compared


def test_long_rows_of_small_calls_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.engine.parity._MOST_TOKENS", 2500)
    engine = Engine(tiny("llama"), None)
    params = SamplingParams(max_new_tokens=17, ignore_eos=True)
    prompt = [3 + i % 190 for i in range(900)]
    found = [engine.generate([prompt], params, seed=i).stats.parity for i in range(3)]
    first = found[0]
    assert first is not None
    assert first.tokens == 17
    assert first.max < 1e-5
    assert found == [replace(first, calls_ago=i) for i in range(3)]


def test_small_calls_are_compared_in_turn_and_keep_to_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("llama"), None)
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    records = engine.generate(random_prompts(1, 8), params)
    costs: list[int] = []

    def counted(self: ParityMeter, rows: Any) -> Parity:
        costs.append(parity_module._cost(rows))
        return Parity(len(rows), 8, *[0.0] * 6)

    monkeypatch.setattr(ParityMeter, "_compare", counted)
    meter, ages, calls, steps, tokens = ParityMeter(engine._module, pad_id=0), [], 50, 33, 420
    for _ in range(calls):
        sample = ParitySample()
        for record in records:
            sample.add(Request(row_id="a", prompt_ids=(), params=params), record)
        parity = meter.measure(sample, steps=steps, tokens=tokens)
        assert parity is not None
        ages.append(parity.calls_ago)
    assert ages[0] == 0
    assert ages.count(0) == len(costs)
    work = calls * (steps * 64 + tokens)
    assert 0.01 * work < sum(costs[1:]) <= 0.02 * work  # the first comparison is made at once
    assert all(age in (0, before + 1) for before, age in pairwise(ages))


@pytest.mark.parametrize("length", [15, 16, 17])
def test_rows_are_cut_to_what_a_call_may_spend(length: int) -> None:
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    prompt, completion = list(range(3, 3 + length)), [5] * 400
    record = Record("a", 0, prompt, completion, "", [-1.0] * 400, [-1.0] * 400, "length", weight_versions=[0] * 400)
    sample = ParitySample()
    sample.add(Request(row_id="a", prompt_ids=(), params=params), record)
    (kept,) = sample.chosen(256, weight_version=0)
    assert len(kept.row.completion_ids) == len(kept.logprobs) == 60 - length  # (128 - 8) / 2 a forward
    assert sample.chosen(128 + 2 * length, weight_version=0) == []


def test_calls_without_finished_rows_have_none() -> None:
    engine = Engine(tiny("llama"), None)
    assert engine.generate([]).stats.parity is None
    assert engine.generate([[]]).stats.parity is None
    stream = engine.stream(random_prompts(1, 4), SamplingParams(max_new_tokens=2))
    next(stream)
    stream.close()
    assert engine.stats is not None
    assert engine.stats.parity is None
    list(engine.stream(random_prompts(1, 4), SamplingParams(max_new_tokens=2)))
    assert engine.stats.parity is not None


def test_module_is_as_before_and_no_generator_is_read() -> None:
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    engine = Engine(model, None)
    parity_of(engine, random_prompts(1, 3))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), torch.OutOfMemoryError("no memory"), ValueError("labels?")]
)
def test_failing_forward_never_fails_a_call_and_is_said_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    engine = Engine(tiny("llama"), None)
    monkeypatch.setattr("rollout.engine.parity.teacher_forced_logprobs", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = engine.generate(random_prompts(1, 2), _PARAMS)
            assert len(batch) == 4
            assert batch.stats.parity is None
    assert caplog.text.count("have no parity figures") == 1


def test_few_logits_are_computed_of_large_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.engine.parity._MOST_LOGITS", 199 * 5)
    parity = parity_of(Engine(tiny("llama"), None), random_prompts(2, 5))
    assert parity.tokens <= 5 * parity.rows
    assert parity.max < 1e-5


def test_dropout_in_train_mode_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(
        model.model.layers[1].mlp.down_proj, torch.nn.Dropout(0.25)
    )
    for training in (False, True, True):
        model.train(training)
        engine.generate(random_prompts(1, 2), _PARAMS)
        assert caplog.text.count("random") == training
    assert "model.layers.1.mlp.down_proj.1 drops out with p=0.25 in train mode" in caplog.text
