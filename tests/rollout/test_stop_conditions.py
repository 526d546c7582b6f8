"""The forms in which a caller says when a call ends early."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout import CallProgress, Deadline, FinishedPerPrompt, SamplingParams
from rollout.errors import InputError
from rollout.stop_conditions import given_conditions


def progress(seconds: float) -> CallProgress:
    return CallProgress(seconds, 0, 0, 0, 0, 0, 0)


def test_deadline_holds_from_its_second_on() -> None:
    deadline = Deadline(2.5)
    assert [deadline(progress(seconds)) for seconds in (0.0, 2.4, 2.5, 9.0)] == [False, False, True, True]
    assert Deadline(0)(progress(0.0))


def test_conditions_are_given_alone_or_together() -> None:
    def enough(progress: CallProgress) -> bool:
        return True

    assert not given_conditions(None)
    assert not given_conditions([])
    assert given_conditions(FinishedPerPrompt(3)).of_prompt == 3
    assert given_conditions(enough).of_call == (enough,)
    both = given_conditions([FinishedPerPrompt(2), Deadline(1), None, enough])
    assert (both.of_prompt, both.of_call) == (2, (Deadline(1), enough))


@pytest.mark.parametrize("given", [3, "deadline", Deadline, FinishedPerPrompt, [Deadline(1), 5], {"seconds": 3}])
def test_other_conditions_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="stop_when has"):
        given_conditions(given)


def test_several_counts_per_prompt_are_refused() -> None:
    with pytest.raises(InputError, match="several FinishedPerPrompt"):
        given_conditions([FinishedPerPrompt(2), FinishedPerPrompt(3)])


@pytest.mark.parametrize("seconds", [-1, math.nan, "1", None, True])
def test_deadline_is_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(InputError, match="Deadline has seconds="):
        Deadline(seconds)


@pytest.mark.parametrize("k", [0, -1, 2.0, "2", None, True])
def test_count_is_a_whole_number(k: Any) -> None:
    with pytest.raises(InputError, match="FinishedPerPrompt has k="):
        FinishedPerPrompt(k)


def test_more_samples_than_a_prompt_has_are_refused() -> None:
    conditions = given_conditions(FinishedPerPrompt(3))
    params = SamplingParams(n=3)
    assert conditions.checked(params) is params
    with pytest.raises(InputError, match="waits for 3 finished samples per prompt, but n is 2"):
        conditions.checked(SamplingParams(n=2))
