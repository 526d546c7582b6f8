"""Workers that stall, die, see each other late and take each other for dead still write every sample exactly once.

Every schedule comes from one seed: how many workers and shards there are, what they have to bear, and who has the next
turn. Here some are tried; ``make simulate-workers`` tries many.
"""

from __future__ import annotations

import pytest

from tests.support.worker_trials import Trial

SEEDS = 100


@pytest.mark.parametrize("start", range(0, SEEDS, 20))
def test_every_sample_is_written_exactly_once(start: int) -> None:
    for seed in range(start, start + 20):
        trial = Trial(seed)
        print(trial)
        trial.go()


def test_schedules_rerun_exactly() -> None:
    for seed in range(3):
        first, second = Trial(seed), Trial(seed)
        first.go()
        second.go()
        assert first.schedule.disk.now == second.schedule.disk.now
        assert str(first) == str(second)
