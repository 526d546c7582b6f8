"""Share samples between workers: give some to those that have room, and take some of those that have the most left."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from rollout.job.open_shard import OpenShard, OpenShards
from rollout.job.shares import LEAST_GAIN_SECONDS, Ask, Backlog, OpenSample, backlog_of, chosen_share
from rollout.job.work_forecast import WorkForecast
from rollout.requests import StepReport
from rollout.run_dir.claims import ShardClaims
from rollout.run_dir.handover import Gift, Handover
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.workers import Workers
from rollout.stop_conditions import Unfinished

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks for asks, and for what others have done, once no shard is left to claim."""
RARE_LOOK_SECONDS = 5.0
"""Between two looks for asks while there may be shards to claim."""
LOAD_SECONDS = 10.0
"""Between two loads that this worker tells, once no shard is left to claim: all of its samples are counted for one."""
LONGEST_PAUSE_SECONDS = 15.0
"""Between two asks of a worker that is given nothing."""
_ASK_SECONDS = 20.0
"""After which an ask that nobody has answered is withdrawn."""
_LOOKED_AT = 16
"""Workers whose loads one search for the slowest reads."""


@dataclass(eq=False, slots=True)
class _Giving:
    """Samples on their way to another worker."""

    taker: str
    shard: OpenShard
    keys: set[SampleKey]
    waiting: set[SampleKey]
    """Those that the engine has not given back."""
    gift: Gift | None = None
    """None before it is written."""


class Sharing:
    """Shares the samples of one worker's open shards with other workers.

    Nothing runs by itself: the worker calls `chosen` between steps, `gather` now and then, and `take` when it has room.

    Args:
        publish: makes a load known to other workers, with the worker's heartbeat.
    """

    def __init__(
        self,
        *,
        shards: OpenShards,
        handover: Handover,
        workers: Workers,
        claims: ShardClaims,
        publish: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shards = shards
        self._handover = handover
        self._workers = workers
        self._claims = claims
        self._publish = publish
        self._clock = clock
        self._random = random.Random(workers.me.writer)
        self._forecast = WorkForecast()
        self._backlog = Backlog()
        self._giving: list[_Giving] = []
        self.returned: deque[OpenShard] = deque()
        """Shards with samples that others did not finish."""
        self.may_claim = True
        """Whether there may be shards to claim: then nobody asks for samples."""
        self._next_look = self._next_load = self._next_gather = self._next_take = 0.0
        self._pause = LOOK_SECONDS
        self._asked: str | None = None
        self._asked_at = 0.0
        self._refused: dict[str, float] = {}
        """Workers that gave nothing when asked, and when they may be asked again."""

    def step(self, report: StepReport) -> None:
        """Learn from a step of the engine."""
        self._forecast.step(report)

    # -- giving --------------------------------------------------------------------------------------

    def chosen(self, unfinished: Unfinished) -> Collection[SampleKey]:
        """Look for workers that ask, and return the samples that the engine is to give back for them."""
        now = self._clock()
        if now < self._next_look:
            return ()
        self._next_look = now + (RARE_LOOK_SECONDS if self.may_claim else LOOK_SECONDS)
        asks = self._handover.asks()
        if not asks and (self.may_claim or now < self._next_load):
            return ()
        self._next_load = now + LOAD_SECONDS
        samples = self._open_samples(unfinished)
        self._backlog = backlog_of(samples, self._forecast.speed)
        self._publish({"ends_in": self._backlog.seconds(self._forecast.speed), "samples": len(samples)})
        if not asks:
            return ()
        # Whoever asks has found no shard to claim.
        self.may_claim = False
        return self._give(asks, samples)

    def _open_samples(self, unfinished: Unfinished) -> list[OpenSample]:
        """Return all samples that this worker has to generate, those that it begins last in front."""
        listed = [s for s in unfinished() if (s.row_id, s.sample) not in self._shards.of(s.row_id).given]
        begun = self._forecast.begun(listed)
        unread = [key for shard in reversed(list(self._shards)) for key in shard.unread()]
        return self._forecast.unread(unread) + begun

    def _give(self, asks: dict[str, dict[str, Any]], samples: list[OpenSample]) -> set[SampleKey]:
        withdrawn: set[SampleKey] = set()
        served = {giving.taker for giving in self._giving if giving.gift is None}
        waiting = [taker for taker in sorted(asks) if taker not in served]
        for number, taker in enumerate(waiting):
            share = self._share(asks[taker], samples, takers=len(waiting) - number)
            if not share:
                self._handover.answer(taker)
                continue
            keys = {sample.key for sample in share}
            samples = [sample for sample in samples if sample.key not in keys]
            logger.info("Handing %d samples to worker %s, which is idle or faster.", len(keys), taker)
            for shard, some in self._by_shard(keys):
                giving = _Giving(taker, shard, some, some & shard.requested)
                withdrawn |= giving.waiting
                shard.given.update(dict.fromkeys(some, giving))
                self._giving.append(giving)
                self._write(giving)
        return withdrawn

    def _share(self, values: dict[str, Any], samples: list[OpenSample], takers: int) -> list[OpenSample]:
        try:
            ask = Ask.of(values)
        except (KeyError, TypeError, ValueError) as error:
            logger.debug("An ask cannot be read: %s", error)
            return []
        speed = self._forecast.speed
        return chosen_share(samples, speed, ask, takers) if speed.known else []

    def _by_shard(self, keys: Iterable[SampleKey]) -> list[tuple[OpenShard, set[SampleKey]]]:
        found: dict[int, set[SampleKey]] = {}
        for key in keys:
            found.setdefault(self._shards.of(key.row_id).index, set()).add(key)
        return [(shard, found[shard.index]) for shard in self._shards if shard.index in found]

    def left(self, shard: OpenShard, key: SampleKey, *, finished: bool) -> None:
        """Note that the engine has given a sample back, with all of its tokens in the part file."""
        giving = shard.given.get(key)
        if giving is None or key not in giving.waiting:
            return
        giving.waiting.remove(key)
        if finished:
            giving.keys.remove(key)
            del shard.given[key]
        self._write(giving)

    def _write(self, giving: _Giving) -> None:
        """Write a gift once the engine has given all of its samples back."""
        if giving.waiting:
            return
        if giving.keys:
            if giving.shard.part is not None:
                giving.shard.part.sync()
            giving.gift = self._handover.give(giving.taker, giving.shard.index, frozenset(giving.keys))
        else:
            self._giving.remove(giving)
        if all(other.gift for other in self._giving if other.taker == giving.taker):
            self._handover.answer(giving.taker)

    @property
    def has_given(self) -> bool:
        """Whether other workers have samples of this one's shards."""
        return bool(self._giving)

    def gather(self) -> list[OpenShard]:
        """Read what other workers have finished; take samples back that one has not finished and does not go on with.

        Returns:
            The shards that have been looked at.
        """
        now = self._clock()
        written = [giving for giving in self._giving if giving.gift is not None]
        if not written or now < self._next_gather:
            return []
        self._next_gather = now + LOOK_SECONDS
        # Before the part files: a taker flushes its records before it removes a gift.
        goes_on = {id(giving): self._goes_on(giving) for giving in written if giving.shard in self._shards}
        looked_at = [shard for shard in self._shards if any(giving.shard is shard for giving in written)]
        for shard in looked_at:
            self._shards.read_on(shard)
        for giving in written:
            shard = giving.shard
            for key in [key for key in giving.keys if key in shard.parts.finished]:
                giving.keys.remove(key)
                shard.given.pop(key, None)
            if giving.keys and goes_on.get(id(giving)):
                continue
            self._giving.remove(giving)
            if giving.keys and shard in self._shards:
                self._take_back(giving)
        return looked_at

    def _goes_on(self, giving: _Giving) -> bool:
        assert giving.gift is not None
        return self._handover.open(giving.gift) and self._workers.working(giving.taker)

    def _take_back(self, giving: _Giving) -> None:
        assert giving.gift is not None
        logger.info("Worker %s does not go on with %d samples; taking them back.", giving.taker, len(giving.keys))
        self._handover.finish(giving.gift)
        for key in giving.keys:
            giving.shard.given.pop(key, None)
        giving.shard.all_read = False
        self.returned.append(giving.shard)

    # -- taking --------------------------------------------------------------------------------------

    def take(self, *, idle: bool) -> list[Gift]:
        """Return what this worker has been given; ask the slowest of some workers if that is nothing.

        Args:
            idle: whether this worker has nothing to do.
        """
        now = self._clock()
        if now < self._next_take:
            return []
        if idle:
            self._backlog = Backlog()
        # Before the gifts: a giver answers once they are there.
        answered = self._asked is not None and not self._handover.asked(self._asked)
        known = {gift.path for shard in self._shards for gift in shard.gifts}
        gifts = [gift for gift in self._handover.gifts() if gift.path not in known]
        if self._asked is not None and (gifts or answered or now - self._asked_at >= _ASK_SECONDS):
            self._refused[self._asked] = 0.0 if gifts else now + LONGEST_PAUSE_SECONDS
            self.withdraw()
        if gifts:
            self._next_take, self._pause = 0.0, LOOK_SECONDS
            return gifts
        if self._asked is None:
            self._ask(now)
        self._next_take = now + (LOOK_SECONDS if self._asked is not None else self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return []

    def withdraw(self) -> None:
        """Ask nobody any longer."""
        if self._asked is not None:
            self._handover.withdraw(self._asked)
            self._asked = None

    def _ask(self, now: float) -> None:
        giver = self._slowest(now)
        if giver is None:
            return
        speed = self._forecast.speed
        self._handover.ask(giver, Ask(self._backlog, speed if speed.known else None).values())
        self._asked, self._asked_at = giver, now

    def _slowest(self, now: float) -> str | None:
        """Return the worker, of some, that ends last; of one that has claimed a shard and says nothing, suppose so."""
        me = self._workers.me.writer
        names = [name for name in self._workers.names() if name != me and self._refused.get(name, 0.0) <= now]
        holders = set(self._claims.others.values())
        own = float(self._backlog.seconds(self._forecast.speed))
        best, found = own + LEAST_GAIN_SECONDS, None
        for name in self._random.sample(names, min(len(names), _LOOKED_AT)):
            load = self._workers.load(name)
            ends_in = load.get("ends_in", best + 1e-3 if name in holders and not own else 0.0)
            if isinstance(ends_in, float) and ends_in > best:
                best, found = ends_in, name
        return found
