"""Calls that end early give back all that they have, and go on later token for token."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rollout import Batch, CallProgress, Deadline, Engine, FinishedPerPrompt, Record, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds
from rollout.engine.live_module import LiveModule
from rollout.engine.loop import Loop
from rollout.errors import InputError
from rollout.requests import Request
from rollout.stop_conditions import StopCondition, StopConditions
from tests.engine.test_engine import tokenizer_of
from tests.support.parity import random_prompts, teacher_forced, tight_engine
from tests.support.tiny_models import shallow, tiny

_PARAMS = SamplingParams(n=4, max_new_tokens=30, stop_token_ids=tuple(range(3, 60, 4)))
_RULED = SamplingParams(
    n=2,
    max_new_tokens=40,
    min_new_tokens=6,
    repetition_penalty=1.4,
    frequency_penalty=0.8,
    temperature=1.3,
    top_p=0.9,
    bad_words=((17, 18), (31,)),
    stop_token_ids=tuple(range(3, 60, 9)),
)


def steps(count: int) -> StopCondition:
    return lambda progress: progress.steps >= count


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def assert_same(found: Sequence[Record], expected: Sequence[Record], atol: float = 1e-5) -> None:
    assert [(record.row_id, record.sample) for record in found] == [(r.row_id, r.sample) for r in expected]
    for record, same in zip(found, expected, strict=True):
        assert (record.completion_ids, record.finish_reason, record.text) == (
            same.completion_ids,
            same.finish_reason,
            same.text,
        )
        assert record.logprobs == pytest.approx(same.logprobs, abs=atol)
        assert record.sampler_logprobs == pytest.approx(same.sampler_logprobs, abs=atol)
        assert len(record.weight_versions) == len(record.completion_ids)


def in_order(records: Sequence[Record]) -> list[Record]:
    """Undelivered records come as they finished, which depends on the machine's speed."""
    return sorted(records, key=lambda record: (record.row_id, record.sample))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("family", "atol"), [("llama", 1e-5), ("gemma3_text", 1e-5), ("bloom", 1e-5), ("lfm2", 3e-5), ("falcon_h1", 3e-5)]
)
def test_resumed_rows_are_those_of_an_uninterrupted_call(
    family: str, atol: float, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=overlap))
    engine = Engine(shallow(family), None, max_rows=12)
    prompts = random_prompts(5, 5)
    params = [_PARAMS, _RULED, _PARAMS, _RULED, _PARAMS]
    expected = engine.generate(prompts, params, seed=3)
    batch, calls = engine.generate(prompts, params, seed=3, stop_when=steps(7)), 1
    assert batch.stats.aborted_samples == len(batch.aborted) > 0
    while batch.aborted:
        batch, calls = engine.generate(resume=batch, params=params, stop_when=steps(7)), calls + 1
        assert calls < 20
    assert calls > 3
    assert_same(batch.records, expected.records, atol)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("family", "atol"), [("llama", 1e-5), ("bloom", 1e-5), ("lfm2", 3e-5)])
def test_single_samples_that_are_withdrawn_go_on_elsewhere(
    family: str, atol: float, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In packed and in padded batches, and with recurrent states."""
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=overlap))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    engine = Engine(shallow(family), None, max_rows=12)
    requests = [
        Request(f"r{i}", prompt, (_PARAMS, _RULED)[i % 2], seed=3) for i, prompt in enumerate(random_prompts(5, 5))
    ]
    expected = list(engine.run(requests))
    everything = [(record.row_id, record.sample) for record in expected]
    conditions = StopConditions(withdrawn=lambda _: rng.sample(everything, 2) if rng.random() < 0.3 else ())
    records: list[Record] = []
    withdrawn: dict[str, dict[int, Record]] = {}
    for record in engine.run(requests, stop=conditions):
        if record.finish_reason == "abort":
            withdrawn.setdefault(record.row_id, {})[record.sample] = record
        else:
            records.append(record)
    assert withdrawn
    assert records
    rest = [
        replace(request, samples=sorted(withdrawn[request.row_id]), resumed=withdrawn[request.row_id])
        for request in requests
        if request.row_id in withdrawn
    ]
    records += Engine(shallow(family), None, max_rows=5).run(rest)
    assert_same(in_order(records), in_order(expected), atol)


def test_enough_samples_of_each_prompt(llama: PreTrainedModel) -> None:
    """64 samples of prompts up to 3,000 tokens, on an engine that must preempt."""
    prompts = [*random_prompts(9, 4), [5 + i % 90 for i in range(3000)]]
    params = SamplingParams(n=64, max_new_tokens=30, stop_token_ids=tuple(range(3, 60, 4)))
    expected = Engine(llama, None).generate(prompts, params, seed=1)
    engine = tight_engine(llama, 280)
    batch = engine.generate(prompts, params, seed=1, stop_when=FinishedPerPrompt(40))
    assert batch.stats.preempted_rows > 0
    assert batch.stats.kv_bytes_held == 0
    finished = Counter(record.row_id for record in batch.finished)
    assert min(finished.values()) >= 40
    assert len(batch.finished) + len(batch.aborted) == len(batch) == 320
    assert len(batch.aborted) > 60
    for record, whole in zip(batch, expected, strict=True):
        assert record.completion_ids == whole.completion_ids[: len(record.completion_ids)]
    assert_same(engine.generate(resume=batch, params=params).records, expected.records)
    # The finished records that are given along still are enough.
    again = engine.generate(resume=batch, params=params, stop_when=FinishedPerPrompt(40))
    assert again.records == batch.records
    assert again.stats.steps == 0


def test_all_samples_may_be_wanted_but_no_more(llama: PreTrainedModel) -> None:
    engine, prompts = Engine(llama, None), random_prompts(2, 3)
    assert engine.generate(prompts, _PARAMS, stop_when=FinishedPerPrompt(4)).aborted == ()
    for params in (_PARAMS, [_PARAMS, SamplingParams(n=9), _PARAMS]):
        with pytest.raises(InputError, match="waits for 5 finished samples per prompt, but n is 4"):
            engine.generate(prompts, params, stop_when=FinishedPerPrompt(5))


def test_rows_go_on_under_other_weights_with_the_versions_of_both() -> None:
    model = shallow("llama")
    engine, prompts = Engine(model, None), random_prompts(8, 4)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    batch = engine.generate(prompts, params, seed=2, stop_when=steps(9))
    earlier = {record.row_id: len(record.completion_ids) for record in batch}
    assert min(earlier.values()) > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    engine.weights_changed()
    for record, before in zip(engine.generate(resume=batch, params=params), batch, strict=True):
        count = earlier[record.row_id]
        assert record.completion_ids[:count] == before.completion_ids
        assert record.logprobs[:count] == before.logprobs
        assert record.weight_versions[:count] == before.weight_versions
        assert len(set(record.weight_versions)) == 2
        new = teacher_forced(model, record)[count:].tolist()
        assert record.logprobs[count:] == pytest.approx(new, abs=1e-5)


def test_records_go_to_another_engine_along_with_new_prompts(llama: PreTrainedModel) -> None:
    old, new = random_prompts(12, 6), random_prompts(13, 3)
    limits = [SamplingParams(n=2, max_new_tokens=14 + i, ignore_eos=True) for i in range(9)]
    expected = Engine(llama, None).generate(old, limits[:6], seed=7)
    batch = Engine(llama, None, max_rows=6).generate(old, limits[:6], seed=7, stop_when=steps(6))
    kept = pickle.loads(pickle.dumps(batch.aborted))
    assert {bool(record.completion_ids) for record in kept} == {False, True}
    resumed = list(dict.fromkeys(record.row_id for record in kept))
    params = [limits[int(row_id)] for row_id in resumed] + limits[6:]
    both = Engine(llama, None, max_rows=3).generate(new, params, seed=8, resume=kept)
    continued = both.records[: len(kept)]
    by_key = {(record.row_id, record.sample): record for record in expected}
    assert_same(continued, [by_key[record.row_id, record.sample] for record in continued])
    assert {record.seed for record in continued} == {7}
    assert_same(both.records[len(kept) :], Engine(llama, None).generate(new, limits[6:], seed=8).records)


def test_ends_of_completions_stand_across_the_seam() -> None:
    """Stop strings of several tokens, and the token that ends a chat's turn, which ids alone do not tell."""
    tokenizer = tokenizer_of("{% for message in messages %}w7 {{ message['content'] }} w9 {% endfor %}w8")
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    engine = Engine(shallow("llama"), tokenizer)
    chats: list[Any] = [[{"role": "user", "content": f"w{i} w6"}] for i in range(20, 26)]
    free = engine.generate(chats, SamplingParams(max_new_tokens=30, ignore_eos=True), seed=4)
    stops = tuple(" ".join(record.text.split()[8:11]) for record in free)
    for params in (
        SamplingParams(max_new_tokens=30, ignore_eos=True, stop=stops),
        SamplingParams(max_new_tokens=30, logit_bias={9: 4.0}),
    ):
        expected = engine.generate(chats, params, seed=4)
        assert sum(record.finish_reason == "stop" for record in expected) >= 4
        for count in range(1, 14, 2):
            batch = engine.generate(chats, params, seed=4, stop_when=steps(count))
            assert_same(engine.generate(resume=batch, params=params).records, expected.records)


def test_deadline_that_has_passed_runs_no_step(llama: PreTrainedModel) -> None:
    prompts = random_prompts(3, 200)
    batch = Engine(llama, None).generate(prompts, _PARAMS, stop_when=Deadline(0))
    assert {(record.finish_reason, len(record.completion_ids)) for record in batch} == {("abort", 0)}
    assert (len(batch), batch.stats.steps, batch.stats.peak_kv_bytes) == (800, 0, 0)


def test_deadline_passes_in_a_long_prefill(llama: PreTrainedModel) -> None:
    """Its pages are given back, and the row has no token."""
    engine = Engine(llama, None, policy=StaticPolicy(Bounds(prefill_tokens=16)))
    prompts = [[3 + i % 150 for i in range(3000)], [4, 5]]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    seen: list[CallProgress] = []

    def passed(progress: CallProgress) -> bool:
        seen.append(progress)
        return Deadline(0.0)(progress) and progress.steps >= 20

    batch = engine.generate(prompts, params, stop_when=passed)
    assert [(record.finish_reason, record.completion_ids) for record in batch] == [("abort", []), ("abort", [])]
    assert batch.stats.steps == 20
    assert batch.stats.prefilled_tokens == 320
    assert batch.stats.peak_kv_bytes > 0 == batch.stats.kv_bytes_held
    assert_same(engine.generate(resume=batch, params=params).records, engine.generate(prompts, params).records)


def test_condition_that_raises_ends_the_call_with_its_error() -> None:
    model = shallow("llama").train()
    engine, before = Engine(model, None), model.config._attn_implementation

    def broken(progress: CallProgress) -> bool:
        if progress.steps == 6:
            raise ZeroDivisionError
        return False

    prompts = random_prompts(6, 5)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts, _PARAMS, seed=5, stop_when=broken)
    assert model.training
    assert model.config._attn_implementation == before
    assert engine.stats is not None
    assert (engine.stats.kv_bytes_held, engine.stats.samples) == (0, 20)
    whole = engine.generate(resume=engine.undelivered, params=_PARAMS)
    assert_same(in_order(whole.records), engine.generate(prompts, _PARAMS, seed=5).records)


def test_interrupted_call_keeps_finished_records_and_live_rows(llama: PreTrainedModel) -> None:
    engine, prompts = Engine(llama, None, max_rows=7), random_prompts(6, 5)

    def interrupt(progress: CallProgress) -> bool:
        if progress.finished_samples >= 4:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, _PARAMS, seed=5, stop_when=interrupt)
    reasons = Counter(record.finish_reason for record in engine.undelivered)
    assert reasons["stop"] + reasons["length"] >= 4
    assert len(engine.undelivered) == 20
    assert engine.stats is not None
    assert engine.stats.aborted_samples == reasons["abort"] > 0
    whole = engine.generate(resume=engine.undelivered, params=_PARAMS)
    assert engine.undelivered == ()
    assert_same(in_order(whole.records), engine.generate(prompts, _PARAMS, seed=5).records)


@pytest.mark.parametrize("overlap", [False, True])
def test_stream_that_is_closed_keeps_what_it_has_not_given(
    llama: PreTrainedModel, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=overlap))
    engine, prompts = Engine(llama, None), random_prompts(6, 5)
    expected = engine.generate(prompts, _PARAMS, seed=5)
    for count in (1, 3, 11, 20):
        stream = engine.stream(prompts, _PARAMS, seed=5)
        given = [next(stream) for _ in range(count)]
        stream.close()
        assert len(given) + len(engine.undelivered) == 20
        assert engine.stats is not None
        assert engine.stats.aborted_samples == sum(r.finish_reason == "abort" for r in engine.undelivered)
        whole = engine.generate(resume=[*engine.undelivered, *given], params=_PARAMS).records
        assert_same(in_order(whole), expected.records)


def test_what_is_resumed_outlives_every_failure(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the call has not begun to run, or gives out what had ended before."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    engine, prompts = Engine(llama, None), random_prompts(6, 3)
    expected = engine.generate(prompts, _PARAMS, seed=5)
    batch = engine.generate(prompts, _PARAMS, seed=5, stop_when=steps(5))
    assert len(batch.finished) > 1 < len(batch.aborted)
    stream = engine.stream(resume=batch, params=_PARAMS)
    given = [next(stream)]
    stream.close()
    assert len(engine.undelivered) == 11
    with pytest.raises(InputError, match="params has 1 entries"):
        engine.generate(resume=engine.undelivered, params=[_PARAMS])
    assert len(engine.undelivered) == 11
    with monkeypatch.context() as broken:
        broken.setattr(LiveModule, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(resume=[*given, *engine.undelivered], params=_PARAMS)
    assert len(engine.undelivered) == 12
    whole = engine.generate(resume=engine.undelivered, params=_PARAMS).records
    assert_same(in_order(whole), expected.records)


def test_rows_are_aborted_where_they_are_after_the_module_has_moved() -> None:
    """Another dtype needs pages of another layout, and a scheduler of its own."""
    model = shallow("llama")
    engine = Engine(model, None)
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (4, 8, 60, 60)]
    prompts = random_prompts(1, 4)
    stream = engine.stream(prompts, params, stop_when=steps(12))
    next(stream)
    model.to(torch.bfloat16)
    assert [len(record.completion_ids) for record in stream] == [8, 12, 12]
    stream = engine.stream(prompts, params)
    next(stream)
    model.to(torch.float32)
    next(stream)
    stream.close()
    assert [len(record.completion_ids) for record in engine.undelivered] == [8, 8]


def test_prompts_of_an_iterator_stay_unread(llama: PreTrainedModel) -> None:
    prompts = iter(random_prompts(15, 300))
    records = list(Engine(llama, None, max_rows=4).stream(prompts, _PARAMS, stop_when=steps(5)))
    rest = len(list(prompts))
    assert len(records) == 4 * (300 - rest)
    assert rest > 200


def _one(llama: PreTrainedModel) -> Batch:
    return Engine(llama, None).generate([[5, 6, 7]], SamplingParams(n=2, max_new_tokens=9), stop_when=steps(4))


def test_samples_are_resumed_once(llama: PreTrainedModel) -> None:
    engine, batch = Engine(llama, None), _one(llama)
    with pytest.raises(InputError, match="resume has sample 1 of row '0' with seed 0 twice"):
        engine.generate(resume=[*batch, batch[1]])
    with pytest.raises(InputError, match="Row '0' with seed 0 is both resumed and a new prompt"):
        engine.generate([[1, 2]], resume=batch)
    with pytest.raises(InputError, match="Row '0' with seed 0 is both resumed and a new prompt"):
        list(engine.stream(iter([[1, 2]]), resume=batch))
    params = SamplingParams(max_new_tokens=9)
    assert [r.seed for r in engine.generate([[1, 2]], params, seed=1, resume=batch)] == [0, 0, 1]


def test_only_records_are_resumed(llama: PreTrainedModel) -> None:
    engine, batch = Engine(llama, None), _one(llama)
    for given in (3, "records", [{"row_id": "0"}]):
        with pytest.raises(InputError, match="must be a Batch, or records of one"):
            engine.generate(resume=given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="with 4 tokens, but 3 logprobs"):
        engine.generate(resume=[replace(batch[0], logprobs=batch[0].logprobs[1:])])
    with pytest.raises(InputError, match="their prompts differ"):
        engine.generate(resume=[batch[0], replace(batch[1], prompt_ids=[8])])
    with pytest.raises(InputError, match="params has 2 entries, but there are 1 prompts"):
        engine.generate(resume=batch, params=[_PARAMS, _PARAMS])


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (SamplingParams(max_new_tokens=4), "has 4 tokens and may have 4 in all"),
        (SamplingParams(max_new_tokens=9, stop_token_ids=(11,)), "already ends by these parameters"),
    ],
)
def test_rows_that_cannot_go_on_keep_their_tokens(llama: PreTrainedModel, params: SamplingParams, error: str) -> None:
    batch = _one(llama)
    batch = Batch((replace(batch[0], completion_ids=[9, 11, 12, 13]), batch[1]), batch.stats)
    found = Engine(llama, None).generate([[7, 8]], params, seed=1, resume=batch)
    assert (found[0].finish_reason, found[0].error_class, found[0].completion_ids) == (
        "error",
        "bad_resume",
        [9, 11, 12, 13],
    )
    assert error in found[0].error
    assert found[2].finished
