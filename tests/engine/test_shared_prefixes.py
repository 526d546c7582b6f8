"""Prefixes shared across the prompts of a call, and kept between calls."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from rollout import Engine, Record, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.pool import Pool
from rollout.requests import Request
from tests.support.parity import page_bytes
from tests.support.tiny_models import VOCABULARY, shallow

PAGE = 16
_PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


class _Chunks:
    """Any number of rows, and prefills in chunks of any size."""

    def __init__(self, seed: int, max_rows: int) -> None:
        self._rng = random.Random(seed)
        self._max_rows = max_rows

    def decide(self, observation: Observation) -> Decision:
        rng = self._rng
        return Decision(
            rows=rng.randint(1, self._max_rows), prefill_tokens=rng.choice([1, 15, 17, 100, 2000]), reason="x"
        )


def fresh(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def alone(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Record]:
    """What each prompt gives in a call of its own, where nothing is shared."""
    return [r for i, ids in enumerate(prompts) for r in engine.generate([ids], params, row_ids=[str(i)])]


def assert_bits(found: list[Record], expected: list[Record], tolerance: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.row_id, one.sample, one.completion_ids) == (other.row_id, other.sample, other.completion_ids)
        assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=tolerance)
        assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, rel=0, abs=tolerance)


# -- what is computed ------------------------------------------------------------------------------------


def test_few_shot_examples_are_prefilled_once() -> None:
    """48 questions after the same 1,200 tokens."""
    rng = random.Random(1)
    shots = fresh(rng, 1200)
    prompts = [shots + fresh(rng, rng.randint(40, 110)) for _ in range(48)]
    stats = Engine(shallow("llama"), None).generate(prompts, SamplingParams(max_new_tokens=2, ignore_eos=True)).stats
    assert stats.prefilled_tokens == 1200 + sum(len(ids) - 1200 for ids in prompts)
    assert (stats.prefix_hits, stats.pages_saved, stats.reused_tokens) == (47, 47 * 75, 47 * 1200)
    assert stats.kv_bytes_held == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_of_conversations_prefill_what_is_their_own(interleaved: bool) -> None:
    """8 conversations of 4 turns after the same system text."""
    rng, own = random.Random(2), 300
    system = fresh(rng, 300)
    turns = []
    for conversation in range(8):
        ids = list(system)
        for turn in range(4):
            added = fresh(rng, rng.randint(100, 500))
            ids, own = ids + added, own + len(added)
            turns.append((turn, conversation, ids) if interleaved else (conversation, turn, ids))
    prompts = [ids for *_, ids in sorted(turns)]
    stats = Engine(shallow("llama"), None).generate(prompts, SamplingParams(max_new_tokens=2, ignore_eos=True)).stats
    # Of a page that holds less than a quarter of it, no copy is made.
    assert own <= stats.prefilled_tokens <= own + 32 * (PAGE // 4 - 1)


@pytest.mark.parametrize("others", ["after", "while"])
def test_a_prompt_that_arrives_later_starts_from_what_lives_or_has_ended(others: str) -> None:
    rng = random.Random(3)
    first = fresh(rng, 200)

    def arriving() -> Iterator[Request | None]:
        yield Request("0", first, SamplingParams(max_new_tokens=1 if others == "after" else 60, ignore_eos=True))
        for _ in range(3):
            yield None
        yield Request("1", [*first, *fresh(rng, 50)], _PARAMS)

    engine = Engine(shallow("llama"), None)
    assert len(list(engine.run(arriving()))) == 2
    assert engine.stats is not None
    assert engine.stats.prefilled_tokens == 250


# -- Promise 1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bits_do_not_depend_on_what_is_shared(family: str, dtype: torch.dtype) -> None:
    rng = random.Random(4)
    model = shallow(family, dtype)
    beginning = fresh(rng, 150)
    prompts = [
        beginning[: rng.choice([0, 1, 15, 16, 17, 31, 32, 33, 150])] + fresh(rng, rng.choice([1, 2, 15, 16, 17, 40]))
        for _ in range(12)
    ]
    prompts += [beginning[:16], beginning[:32], beginning, beginning]
    params = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True)
    expected = alone(Engine(model, None), prompts, params)
    longest = -(-(max(map(len, prompts)) + 6) // PAGE) * page_bytes(model)
    for seed in range(4):
        order = rng.sample(range(len(prompts)), len(prompts))
        cap = rng.choice([2, 5, 64])
        limit = None if seed % 2 else 2 * longest
        engine = Engine(model, None, policy=_Chunks(seed, cap), max_kv_bytes=limit)
        batch = engine.generate([prompts[i] for i in order], params, row_ids=order)
        assert batch.stats.prefix_hits > 0
        records = sorted(batch, key=lambda record: (int(record.row_id), record.sample))
        # Of float32, some of torch's own functions round by the place of a number in the batch, shared or not.
        assert_bits(records, expected, tolerance=1e-5 if (family, dtype) == ("gemma2", torch.float32) else 0.0)


@pytest.mark.parametrize("failing", [1, 2, 3, 5])
def test_copies_of_pages_that_run_out_of_memory_lose_nothing(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    rng, model = random.Random(9), shallow("llama")
    beginning = fresh(rng, 40)
    prompts = [beginning, *(beginning + fresh(rng, length) for length in (3, 5, 20))]
    params = SamplingParams(n=2, max_new_tokens=3, ignore_eos=True)
    expected = alone(Engine(model, None), prompts, params)
    copy, calls = Pool.copy, 0

    def copies(self: PagePool, source: IntArray, target: IntArray, tokens: int | None = None) -> None:
        nonlocal calls
        calls += len(source) > 0
        if calls == failing and len(source):
            raise torch.OutOfMemoryError("CUDA out of memory")
        copy(self, source, target, tokens)

    monkeypatch.setattr(Pool, "copy", copies)
    batch = Engine(model, None).generate(prompts, params)
    assert_bits(list(batch), expected)
    assert (batch.stats.out_of_memory_events, batch.stats.kv_bytes_held) == (1, 0)


def test_thousands_of_rows_share_a_beginning() -> None:
    rng = random.Random(5)
    beginning = fresh(rng, 100)
    prompts = [beginning + fresh(rng, 2) for _ in range(2500)]
    engine = Engine(shallow("llama"), None, policy="static", max_rows=512)
    batch = engine.generate(prompts, SamplingParams(max_new_tokens=1))
    assert batch.stats.prefilled_tokens <= 100 + 2 * 2500
    some = rng.sample(range(2500), 5)
    expected = [engine.generate([prompts[i]], SamplingParams(max_new_tokens=1), row_ids=[i])[0] for i in some]
    assert_bits([batch[i] for i in some], expected)


# -- kept between calls ----------------------------------------------------------------------------------


def test_nothing_is_kept_by_default() -> None:
    engine = Engine(shallow("llama"), None)
    prompt = fresh(random.Random(6), 100)
    assert engine.generate([prompt], _PARAMS).stats.kv_bytes_held == 0
    assert engine.generate([prompt], _PARAMS).stats.prefilled_tokens == 100


def test_prefixes_are_kept_up_to_a_limit() -> None:
    model, rng = shallow("llama"), random.Random(7)
    limit = 60 * page_bytes(model)
    engine = Engine(model, None, keep_prefixes_bytes=limit)
    system = fresh(rng, 320)
    for call in range(5):
        prompts = [system + fresh(rng, 90) for _ in range(12)]
        batch = engine.generate(prompts, _PARAMS, seed=call)
        assert 20 * page_bytes(model) <= batch.stats.kv_bytes_held <= limit
        assert batch.stats.prefilled_tokens == 12 * 90 + (0 if call else 320)
        assert [r.completion_ids for r in batch] == [
            r.completion_ids for r in Engine(model, None).generate(prompts, _PARAMS, seed=call)
        ]
    engine.release()
    assert engine._generation.sessions.bytes_held == 0
    assert engine.generate([system], _PARAMS).stats.prefilled_tokens == 320


def test_other_weights_drop_what_is_kept() -> None:
    model = shallow("llama")
    engine = Engine(model, None, keep_prefixes_bytes=1 << 30)
    prompt = fresh(random.Random(8), 100)
    engine.generate([prompt], _PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    changed = engine.generate([prompt], _PARAMS)
    assert changed.stats.prefilled_tokens == 100
    assert_bits(list(changed), list(Engine(model, None).generate([prompt], _PARAMS)))
    # Of the last three tokens before the one that is computed in any case, no copy is made.
    assert engine.generate([prompt], _PARAMS).stats.prefilled_tokens == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.generate([prompt], _PARAMS).stats.prefilled_tokens == 100


def test_kept_prefixes_make_way_for_scores_and_sessions() -> None:
    model = shallow("llama")
    cap = 40 * page_bytes(model)
    engine = Engine(model, None, max_kv_bytes=cap, keep_prefixes_bytes=cap)
    engine.generate([[3] * 400], _PARAMS)
    assert engine._generation.sessions.bytes_held > cap // 2
    scores = engine.score([[4] * 200], [[5] * 300])
    assert (scores[0].error, engine._generation.sessions.bytes_held) == ("", 0)
    engine.generate([[3] * 400], _PARAMS)
    with engine.session() as session:
        assert session.generate([[6] * 500], _PARAMS).stats.peak_kv_bytes <= cap
        assert engine._generation.sessions.bytes_held == session.kv_bytes_held


def test_recurrent_models_keep_nothing() -> None:
    engine = Engine(shallow("lfm2"), None, keep_prefixes_bytes=1 << 30)
    for _ in range(2):
        stats = engine.generate([[3] * 50, [3] * 60], _PARAMS).stats
        assert (stats.prefilled_tokens, stats.kv_bytes_held) == (110, 0)
