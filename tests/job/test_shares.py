"""Which samples a busy worker hands over, from the speeds of both and what each has left."""

from __future__ import annotations

import json
import random

import pytest

from rollout.job.shares import (
    HANDOVER_SECONDS,
    LEAST_GAIN_SECONDS,
    Ask,
    Backlog,
    OpenSample,
    Speed,
    backlog_of,
    chosen_share,
)
from rollout.run_dir.record_lines import SampleKey

FAST = Speed(step=20, row=0.5, kv_token=0, prefill_token=0.05, rows=16)
SLOW = Speed(step=80, row=2, kv_token=0, prefill_token=0.2, rows=16)


def samples(*rests: float, begun: bool = True) -> list[OpenSample]:
    return [OpenSample(SampleKey(f"r{i}", int(begun)), 100, rest, begun) for i, rest in enumerate(rests)]


def ends(own: list[OpenSample], share: list[OpenSample], giver: Speed, ask: Ask) -> float:
    """When both are done."""
    taker = ask.speed or giver
    kept = backlog_of([sample for sample in own if sample not in share], giver).seconds(giver)
    moved = backlog_of([sample._replace(begun=False) for sample in share], taker)
    before = ask.backlog
    after = Backlog(max(before.longest, moved.longest), before.tokens + moved.tokens, before.ms + moved.ms)
    return max(kept, HANDOVER_SECONDS + after.seconds(taker) if share else 0.0)


def test_fast_worker_takes_the_last_sample_of_a_slow_one() -> None:
    own = samples(500)
    assert chosen_share(own, SLOW, Ask(Backlog(), FAST)) == own
    assert chosen_share(own, FAST, Ask(Backlog(), SLOW)) == []
    # As fast as the giver, it would gain nothing.
    assert chosen_share(own, SLOW, Ask(Backlog(), SLOW)) == []
    assert chosen_share(own, SLOW, Ask(Backlog(), None)) == []


def test_nothing_is_handed_over_for_a_second() -> None:
    assert chosen_share(samples(10), SLOW, Ask(Backlog(), FAST)) == []


def test_samples_that_have_not_begun_go_first() -> None:
    own = [*samples(*[200.0] * 100, begun=False), *samples(*[200.0] * 16)]
    share = chosen_share(own, FAST, Ask(Backlog(), FAST))
    assert 40 < len(share) < 75
    assert not any(sample.begun for sample in share)
    # Those that the giver would come to last stand in front.
    assert share == own[: len(share)]


def test_several_that_ask_get_equal_shares() -> None:
    own = samples(*[200.0] * 400, begun=False)
    counts = []
    for takers in (3, 2, 1):
        share = chosen_share(own, FAST, Ask(Backlog(), FAST), takers)
        own = [sample for sample in own if sample not in share]
        counts.append(len(share))
    assert max(*counts, len(own)) < 1.3 * min(*counts, len(own))


def test_taker_with_work_of_its_own_gets_less() -> None:
    own = samples(*[200.0] * 200, begun=False)
    idle, busy = (len(chosen_share(own, FAST, Ask(b, FAST))) for b in (Backlog(), Backlog(200, 200 * 100, 100 * 100)))
    assert 0 < busy < idle


def test_share_gains_what_it_must_and_no_other_count_is_much_better() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    given = 0
    for _ in range(200):
        own = [
            OpenSample(SampleKey(str(i), 0), rng.randint(1, 2000), rng.lognormvariate(5, 1), rng.random() < 0.7)
            for i in range(rng.randint(0, 40))
        ]
        giver, taker = (
            Speed(rng.uniform(5, 200), rng.uniform(0, 5), rng.uniform(0, 1e-3), rng.uniform(0, 1), rng.randint(1, 32))
            for _ in range(2)
        )
        ask = Ask(Backlog(), rng.choice((taker, None)))
        share = chosen_share(own, giver, ask)
        assert len({sample.key for sample in share}) == len(share)
        assert set(share) <= set(own)
        if share:
            given += 1
            assert ends(own, share, giver, ask) <= ends(own, [], giver, ask) - LEAST_GAIN_SECONDS + 1e-6
        elif own:
            longest = sorted(own, key=lambda sample: -sample.rest)
            best = min(ends(own, longest[:count], giver, ask) for count in range(1, len(own) + 1))
            alone = ends(own, [], giver, ask)
            assert best > alone - max(LEAST_GAIN_SECONDS, 0.05 * alone) - 1e-6
    assert given > 20


def test_ask_is_what_a_file_says() -> None:
    for speed in (None, FAST):
        ask = Ask(Backlog(3.5, 10, 2), speed)
        assert Ask.of(json.loads(json.dumps(ask.values()))) == ask
    with pytest.raises((KeyError, TypeError, ValueError)):
        Ask.of({"longest": "?", "tokens": 1, "ms": 1, "speed": None})
    with pytest.raises((KeyError, TypeError, ValueError)):
        Ask.of({"speed": None})
