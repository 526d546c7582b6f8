"""Promise 1 where something is expected of lengths: the order of work changes, and no record does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest

from rollout import Engine, Record, SamplingParams
from rollout.requests import Request, in_windows
from tests.support.parity import page_bytes, random_prompts
from tests.support.tiny_models import tiny


def sorted_records(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (int(record.row_id), record.sample))


def assert_same(expected: Sequence[Record], found: Sequence[Record]) -> None:
    assert [(r.row_id, r.sample, r.completion_ids) for r in found] == [
        (r.row_id, r.sample, r.completion_ids) for r in expected
    ]
    for one, other in zip(expected, found, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def finished(records: Sequence[Record]) -> list[str]:
    """Row ids in the order in which rows ended."""
    return [record.row_id for record in records]


@pytest.mark.parametrize("policy", ["static", "predictive"])
@pytest.mark.parametrize("seed", range(2))
def test_any_expectation_gives_the_same_records(policy: str, seed: int) -> None:
    model, prompts = tiny("llama"), random_prompts(seed, 24)
    rng = random.Random(seed)
    params = SamplingParams(n=2, max_new_tokens=40, stop_token_ids=tuple(range(3, 9)))
    requests = [Request(str(i), prompt, params, seed) for i, prompt in enumerate(prompts)]
    expected = sorted_records(list(Engine(model, None).run(requests)))
    hinted = [
        replace(request, expected_tokens=rng.choice([None, float("nan"), 1.0, 30.0, 1e9])) for request in requests
    ]
    engine = Engine(model, None, policy=policy, max_rows=6, max_kv_bytes=26 * page_bytes(model))
    assert_same(expected, sorted_records(list(engine.run(in_windows(hinted, 16)))))


def test_long_rows_start_first_where_they_are_at_hand() -> None:
    model = tiny("llama")
    lengths = [3, 4, 5, 40, 6, 30, 7, 8]
    requests = [
        Request(str(i), [9 + i, 5], SamplingParams(max_new_tokens=length, ignore_eos=True), 0, None, float(length))
        for i, length in enumerate(lengths)
    ]
    unknown = [replace(request, expected_tokens=None) for request in requests]
    found = [
        finished(list(Engine(model, None, policy="static", max_rows=1).run(in_windows(some, 8))))
        for some in (unknown, requests)
    ]
    assert found[0] == [str(i) for i in range(8)]
    assert found[1][:2] == ["3", "5"]
    assert sorted(found[1]) == found[0]


def test_an_engine_remembers_which_prompts_were_long() -> None:
    model = tiny("llama")
    prompts = [[9 + i, 5, 6] for i in range(10)]
    lengths = [2, 3, 2, 3, 60, 2, 3, 2, 3, 50]
    params = [SamplingParams(n=2, max_new_tokens=length, ignore_eos=True) for length in lengths]
    engine = Engine(model, None, policy="static", max_rows=2)
    first = list(engine.stream(prompts, params))
    assert finished(first)[0] == "0"
    # Nothing in this call says which are long: all may have as many tokens.
    again = list(engine.stream(prompts[2:], params[2:], row_ids=[str(i) for i in range(2, 10)]))
    assert finished(again)[:4] == ["4", "4", "9", "9"]
    assert_same([r for r in sorted_records(first) if int(r.row_id) >= 2], sorted_records(again))
    # A batch comes in the order of its prompts, and a stream is read no further ahead than it was.
    assert [r.row_id for r in engine.generate(prompts, params)] == [str(i) for i in range(10) for _ in range(2)]
    read = []

    def prompts_without_end() -> Iterator[list[int]]:
        for i in count():
            read.append(i)
            yield prompts[i % 10]

    stream = engine.stream(prompts_without_end(), params[0])
    next(stream)
    assert len(read) < 100
    stream.close()


def test_the_order_is_the_same_each_time() -> None:
    model, params = tiny("llama"), SamplingParams(n=2, max_new_tokens=30)
    prompts = random_prompts(7, 16)

    def orders() -> list[list[str]]:
        engine = Engine(model, None, policy="static", max_rows=4)
        return [finished(list(engine.stream(prompts, params, seed=seed))) for seed in range(3)]

    assert orders() == orders()
