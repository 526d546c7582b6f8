"""Records of finished, failed and refused samples: texts, ids and counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rollout.engine.batch_row import NO_COMPLETION, Completion
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.record_builder import RecordBuilder
from rollout.records import Record
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally


class Letters(Detokenizer):
    """Token 0 is a, 1 is b, and so on."""

    def __init__(self) -> None:
        super().__init__(None)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def completion(*tokens: int) -> Completion:
    logprobs = -np.arange(len(tokens), dtype=np.float32) - 0.5
    versions = np.arange(len(tokens)) + 3
    return Completion(np.array(tokens, np.int64), logprobs, logprobs / 2, versions)


def test_a_finished_completion_is_one_record() -> None:
    tally = Tally()
    recorder = RecordBuilder(Letters(), tally, weight_version=9)
    request = Request("r", (9, 8), SamplingParams(n=5, stop=("cd", "x")), seed=4)
    recorder.finish(request, 3, completion(0, 1, 2, 3), "stop")
    assert recorder.take() == [
        Record(
            row_id="r",
            sample=3,
            prompt_ids=[9, 8],
            completion_ids=[0, 1, 2, 3],
            text="ab",
            logprobs=[-0.5, -1.5, -2.5, -3.5],
            sampler_logprobs=[-0.25, -0.75, -1.25, -1.75],
            finish_reason="stop",
            seed=4,
            weight_version=6,
            weight_versions=[3, 4, 5, 6],
        )
    ]
    assert tally == Tally(
        samples=1, prompt_tokens=2, output_tokens=4, kept_mass=pytest.approx(1.7115, abs=1e-3), massed_tokens=4
    )


def test_values_are_plain_numbers() -> None:
    """Records are written as JSON, which does not take numpy's scalars."""
    recorder = RecordBuilder(Letters(), Tally(), 0)
    recorder.finish(Request("r", np.array([9]), SamplingParams()), 0, completion(1), "length")  # type: ignore[arg-type]
    (record,) = recorder.take()
    assert type(record.completion_ids[0]) is int
    assert type(record.logprobs[0]) is type(record.sampler_logprobs[0]) is float


def test_a_refused_request_is_an_error_for_every_sample_that_was_wanted() -> None:
    tally = Tally()
    recorder = RecordBuilder(Letters(), tally, 0)
    recorder.reject(Request("a", [1] * 7, SamplingParams(n=3)), "prompt_too_long", "why")
    recorder.reject(Request("b", [], SamplingParams(n=9), samples=[8, 4]), "empty_prompt", "what")
    records = recorder.take()
    assert [(r.row_id, r.sample) for r in records] == [("a", 0), ("a", 1), ("a", 2), ("b", 8), ("b", 4)]
    assert {(r.finish_reason, r.error_class, r.error) for r in records[:3]} == {("error", "prompt_too_long", "why")}
    assert {(r.finish_reason, r.error_class, r.error) for r in records[3:]} == {("error", "empty_prompt", "what")}
    assert all(r.completion_ids == r.logprobs == r.sampler_logprobs == [] and r.text == "" for r in records)
    assert tally == Tally(samples=5, error_samples=5, prompt_tokens=21)


def test_failed_sample_keeps_its_tokens() -> None:
    tally = Tally()
    recorder = RecordBuilder(Letters(), tally, 0)
    recorder.fail(Request("a", [1], SamplingParams()), 0, completion(0, 1), "not_finite", "why")
    recorder.fail(Request("b", [1], SamplingParams()), 0, NO_COMPLETION, "too_large", "why")
    first, second = recorder.take()
    assert (first.completion_ids, first.text, first.finish_reason) == ([0, 1], "ab", "error")
    assert (second.completion_ids, second.text, second.error_class) == ([], "", "too_large")
    assert tally == Tally(
        samples=2,
        error_samples=2,
        prompt_tokens=2,
        output_tokens=2,
        kept_mass=pytest.approx(1.251, abs=1e-3),
        massed_tokens=2,
    )


def test_records_are_taken_once_and_in_order() -> None:
    recorder = RecordBuilder(Letters(), Tally(), 0)
    assert not recorder
    for name in "abc":
        recorder.finish(Request(name, [1], SamplingParams()), 0, completion(1), "length")
    assert recorder
    assert [record.row_id for record in recorder.take()] == ["a", "b", "c"]
    assert not recorder
    assert recorder.take() == []
