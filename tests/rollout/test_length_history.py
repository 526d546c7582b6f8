from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from rollout.length_history import LengthHistory
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of

RECORD = record_of(Request("row", [1, 2], SamplingParams()), 0)


def test_the_mean_of_a_prompt_and_of_no_other():
    lengths = LengthHistory()
    assert not lengths
    for tokens in (10, 20, 60):
        lengths.add([1, 2, 3], tokens)
    lengths.add([1, 2], 7)
    assert lengths.expected([1, 2, 3]) == pytest.approx(30)
    assert lengths.expected(np.array([1, 2], np.int32)) == 7  # type: ignore[arg-type]
    assert lengths.expected([3, 2, 1]) is None
    assert len(lengths) == 2


def test_records_are_learned_but_not_errors():
    lengths = LengthHistory()
    lengths.learn(replace(RECORD, completion_ids=[5] * 9, finish_reason="stop"))
    lengths.learn(replace(RECORD, completion_ids=[], finish_reason="error", error_class="bad_prompt"))
    assert lengths.expected(RECORD.prompt_ids) == 9


def test_what_was_completed_longest_ago_is_forgotten():
    lengths = LengthHistory(most_prompts=2)
    for prompt in (1, 2, 1, 3):
        lengths.add([prompt], prompt)
    assert [lengths.expected([prompt]) for prompt in (1, 2, 3)] == [1, None, 3]


def test_the_mean_follows_lengths_that_change():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    lengths = LengthHistory()
    for mean in (10, 200):
        for _ in range(400):
            lengths.add([4], mean + rng.randint(-5, 5))
        assert lengths.expected([4]) == pytest.approx(mean, abs=6)
