"""When a call ends early: at a deadline, when enough samples of a prompt have finished, or when a function says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rollout.errors import InputError, shorten
from rollout.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class CallProgress:
    """A call between two steps, as stop conditions see it."""

    seconds: float
    """Since the call began."""
    steps: int
    sampled_tokens: int
    """By this call, all samples together."""
    finished_samples: int
    """Samples that ended by themselves, at a stop or at their length limit; without errors."""
    finished_prompts: int
    """Prompts that want no further token: all of their samples have ended, or enough of them."""
    live_rows: int
    """Samples being generated."""
    waiting_rows: int
    """Samples known to wait."""


StopCondition = Callable[[CallProgress], bool]
"""Called before every step; once it returns True, the call ends. With tensor parallelism, that of rank 0 counts."""


@dataclass(frozen=True, slots=True)
class UnfinishedSample:
    """A sample that a call has read and that has no record yet."""

    row_id: str
    sample: int
    prompt_tokens: int
    generated_tokens: int
    max_new_tokens: int
    """Most that it may generate, what its context leaves room for counted."""
    computed: bool
    """Whether its prompt and tokens are in memory: elsewhere they must be computed once more."""


Unfinished = Callable[[], list[UnfinishedSample]]
"""Lists the samples of a call that have no record yet, in the order in which they were read."""
Withdrawn = Callable[[Unfinished], Collection[tuple[str, int]]]
"""Called before every step; returns (row id, sample) of the samples that end now. With tensor parallelism, what it
returns on rank 0 counts. Samples that the call does not have, or that it has finished, are passed over."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """Ends a call after so many seconds, counted from its beginning.

    It is looked at between steps, so the step that runs then is the last. With 0, no step runs.

    Raises:
        InputError: ``seconds`` is no number of at least 0.
    """

    seconds: float

    def __post_init__(self) -> None:
        given: object = self.seconds
        if isinstance(given, bool) or not isinstance(given, Real) or math.isnan(given) or given < 0:
            raise InputError(f"Deadline has seconds={shorten(repr(given), 60)}, but must have a number of at least 0.")

    def __call__(self, progress: CallProgress) -> bool:
        """Return whether the deadline has passed."""
        return progress.seconds >= self.seconds


@dataclass(frozen=True, slots=True)
class FinishedPerPrompt:
    """Ends a prompt's remaining samples once ``k`` of them have finished.

    Samples that end in an error have not finished. Where so many fail that fewer than ``k`` can finish, all others run
    to their end. Samples that finish in the same step as the ``k``-th are kept.

    Raises:
        InputError: ``k`` is no whole number of at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        given: object = self.k
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
            raise InputError(
                f"FinishedPerPrompt has k={shorten(repr(given), 60)}, but must have a whole number of at least 1."
            )


StopWhen = StopCondition | FinishedPerPrompt | Iterable[StopCondition | FinishedPerPrompt] | None
"""One condition or several, of which the first that holds counts."""


@dataclass(frozen=True, slots=True)
class StopConditions:
    """The stop conditions of a call, by what they end."""

    of_prompt: int | None = None
    """Finished samples that are enough for a prompt; None: all are wanted."""
    of_call: tuple[StopCondition, ...] = ()
    """Any of them ends the call."""
    withdrawn: Withdrawn | None = None
    """Names single samples to end; None: none."""

    def __bool__(self) -> bool:
        return self.of_prompt is not None or bool(self.of_call) or self.withdrawn is not None

    def checked(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters of a prompt.

        Raises:
            InputError: they want fewer samples than are to finish.
        """
        if self.of_prompt is not None and self.of_prompt > params.n:
            raise InputError(
                f"stop_when waits for {self.of_prompt} finished samples per prompt, but n is {params.n}: wait for at "
                "most n."
            )
        return params


def given_conditions(stop_when: Any) -> StopConditions:
    """Return the conditions that a caller gives.

    Raises:
        InputError: one is neither a `FinishedPerPrompt` nor callable, or several are a `FinishedPerPrompt`.
    """
    single = stop_when is None or callable(stop_when) or isinstance(stop_when, FinishedPerPrompt)
    if not single and not isinstance(stop_when, Iterable):
        raise _no_condition(stop_when)
    given = [condition for condition in ([stop_when] if single else stop_when) if condition is not None]
    for condition in given:
        if isinstance(condition, type) or not (callable(condition) or isinstance(condition, FinishedPerPrompt)):
            raise _no_condition(condition)
    counts = [condition.k for condition in given if isinstance(condition, FinishedPerPrompt)]
    if len(counts) > 1:
        raise InputError("stop_when has several FinishedPerPrompt: give the one with the smallest k.")
    others = tuple(condition for condition in given if not isinstance(condition, FinishedPerPrompt))
    return StopConditions(of_prompt=counts[0] if counts else None, of_call=others)


def _no_condition(given: object) -> InputError:
    return InputError(
        f"stop_when has {shorten(repr(given), 60)}, but must have Deadline(seconds), FinishedPerPrompt(k), or a "
        "function of the call's progress that returns whether to stop."
    )
