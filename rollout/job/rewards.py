"""Score completions with the configured reward function."""

from __future__ import annotations

import functools
import inspect
import logging
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, NamedTuple

from hydra.errors import HydraException
from hydra.utils import instantiate

from rollout.errors import InputError, shorten
from rollout.models.errors import first_line
from rollout.records import Record

logger = logging.getLogger(__name__)

#: Rewards that take this share of the time hold up the generation; judged once they have taken so many seconds.
_SLOW_SHARE, _SLOW_SECONDS = 0.25, 10.0

BATCH_KEY = "_batch_"
"""Key of ``reward`` that is no argument of the function: how many completions it takes at once."""

_LARGEST = 3.4028234663852886e38
"""Largest number of 32 bits, which records store."""


class Reward(NamedTuple):
    """A reward function, and how it is called."""

    function: Callable[..., Any]
    """Takes the columns of an input row and the text of a completion, or lists of them."""
    batch: int | None = None
    """Completions of one call; None: the function takes one."""


def load_reward(config: dict[str, Any] | None) -> Reward | None:
    """Load ``reward._target_`` with the other keys as arguments; a class is instantiated.

    Raises:
        InputError: the target does not exist, or does not take an input row and a text.
    """
    if config is None:
        return None
    target, batch = config["_target_"], config.get(BATCH_KEY)
    arguments = {key: value for key, value in config.items() if key != BATCH_KEY}
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise InputError(f"reward.{BATCH_KEY} is {batch!r}, but must be at least 1, or null for one completion a call.")
    try:
        # Resolved here because Hydra would also log the error that is reported below.
        resolved = pkgutil.resolve_name(target)
        function: Any = instantiate(arguments | {"_target_": resolved, "_partial_": not isinstance(resolved, type)})
    except (HydraException, ImportError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"reward._target_={target} cannot be used: {first_line(error.__cause__ or error)}.") from error
    if isinstance(function, functools.partial):
        # Hydra's own kind checks its target at every call anew, which takes longer than most rewards.
        function = functools.partial(function.func, *function.args, **function.keywords)
    taken = "an input row and the text of a completion" if batch is None else "a list of input rows and one of texts"
    try:
        if isinstance(function, functools.partial):
            # Of a partial function, only this says which argument is not taken.
            inspect.signature(function.func).bind_partial(**function.keywords)
        inspect.signature(function).bind({}, "")
    except (TypeError, ValueError) as error:
        raise InputError(f"reward._target_={target} must accept {taken}: {error}.") from error
    if inspect.iscoroutinefunction(getattr(function, "func", function)):
        raise InputError(f"reward._target_={target} is async: name a function that calls it, e.g. with asyncio.run.")
    return Reward(function, batch)


class _Unscored(NamedTuple):
    record: Record
    columns: dict[str, Any]


class Scorer:
    """Adds rewards to records, and says at once why the first one fails.

    Rewards are called between steps. If they take much of the time, that is logged once.

    Args:
        reward: None: records are passed on as they are.
    """

    def __init__(self, reward: Reward | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._reward = reward
        self._clock = clock
        self._begun = clock()
        self._seconds = 0.0
        """Time that the function took."""
        self._scored = 0
        self._said_slow = False
        self._pending: list[_Unscored] = []
        self.failed = 0
        """Records whose reward failed."""

    def add(self, record: Record, columns: dict[str, Any]) -> list[Record]:
        """Return the records that are scored now: none while a batch fills.

        Records without a completion get no reward.
        """
        if self._reward is None or record.finish_reason in ("error", "abort"):
            return [record]
        # A copy: what a function does to its row concerns no other sample.
        self._pending.append(_Unscored(record, dict(columns)))
        return self.flush() if len(self._pending) >= (self._reward.batch or 1) else []

    def flush(self) -> list[Record]:
        """Score the records that wait for their batch."""
        pending, self._pending = self._pending, []
        if self._reward is None or not pending:
            return []
        start = self._clock()
        scored = self._score_batch(self._reward.function, pending) if self._reward.batch else None
        if scored is None:
            scored = [self._score_one(self._reward, unscored) for unscored in pending]
        self._seconds += self._clock() - start
        self._scored += len(scored)
        self._say_if_slow(self._reward)
        for record in scored:
            if record.error_class:
                self._count_failure(record)
        return scored

    def _score_batch(self, function: Callable[..., Any], pending: list[_Unscored]) -> list[Record] | None:
        """Score a batch in one call; None if the call fails, so that only the records at fault may fail."""
        try:
            values = _values(function([dict(one.columns) for one in pending], [one.record.text for one in pending]))
        except (Exception, SystemExit):  # noqa: BLE001  # a user's function may raise anything
            return None
        if len(values) != len(pending):
            error = f"The function returned {len(values)} rewards for {len(pending)} completions."
            return [_failed(one.record, error) for one in pending]
        return [_with_reward(one.record, value) for one, value in zip(pending, values, strict=True)]

    def _score_one(self, reward: Reward, unscored: _Unscored) -> Record:
        record, columns = unscored
        try:
            if not reward.batch:
                return _with_reward(record, reward.function(columns, record.text))
            values = _values(reward.function([columns], [record.text]))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # only this record fails
            return _failed(record, f"{type(error).__name__}: {error}")
        if len(values) != 1:
            return _failed(record, f"The function returned {len(values)} rewards for 1 completion.")
        return _with_reward(record, values[0])

    def _say_if_slow(self, reward: Reward) -> None:
        if self._said_slow or self._seconds < _SLOW_SECONDS:
            return
        share = self._seconds / max(self._clock() - self._begun, 1e-9)
        if share < _SLOW_SHARE:
            return
        self._said_slow = True
        larger = f"a larger reward.{BATCH_KEY}"
        logger.warning(
            "The reward takes %.0f %% of the time (%.0f ms a completion), in which nothing is generated; "
            "if it can score many at once faster, use %s.",
            100 * share,
            1e3 * self._seconds / self._scored,
            larger if reward.batch else f"reward.{BATCH_KEY}=64 and a function of lists",
        )

    def _count_failure(self, record: Record) -> None:
        self.failed += 1
        if self.failed == 1:
            logger.warning(
                "The reward of row %s, sample %d failed (%s); its completion is kept. Further failures are counted.",
                record.row_id,
                record.sample,
                shorten(" ".join(record.error.split()), longest=200),
            )


def _values(returned: object) -> list[object]:
    """Return the rewards of a batch as a list.

    Raises:
        TypeError: they come in no order, or are not several.
    """
    if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
        raise TypeError(
            f"the function returned {shorten(repr(returned), longest=80)}, but must return a list of numbers"
        )
    return list(returned)


def _with_reward(record: Record, value: Any) -> Record:
    """Return the record with a reward of any numeric type, or with an error if it is no finite number."""
    try:
        # Of an array or tensor with a single number, the number.
        reward = float(value.item() if hasattr(value, "item") else value)
    except Exception:  # noqa: BLE001  # a value of a user's type may raise anything
        return _failed(record, f"The reward is {shorten(repr(value), longest=80)}, but must be a number.")
    if not abs(reward) <= _LARGEST:
        return _failed(record, f"The reward is {reward}, but must be a finite number of 32 bits.")
    return replace(record, reward=reward)


def _failed(record: Record, error: str) -> Record:
    return replace(record, error_class="reward_failed", error=error)
