"""What the loop passes to policies and writes to the log."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rollout.batcher.types import Decision, Observation
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.toy_loop import Fixed, ToyRunner, World, plain

pytestmark = pytest.mark.usefixtures("late_or_not", "little_patience")


def test_unreachable_budget_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Over(Fixed):
        def decide(self, observation: Observation) -> Decision:
            rows = 1 + len(observation.generated_tokens) % 2
            return Decision(rows, 64, "over_budget")

    with caplog.at_level(logging.INFO, logger="rollout.engine.loop"):
        World(plain(4), Over()).run()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "exceeds the latency budget" in warnings[0].getMessage()


def test_changes_of_the_row_target_are_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="rollout.engine.loop"):
        World(plain(4), Fixed(rows=3, reason="memory")).run()
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [(logging.DEBUG, "step 0: row target None -> 3: memory")]


def test_every_change_of_the_row_target_is_counted() -> None:
    class Falling:
        rows = 9

        def decide(self, observation: Observation) -> Decision:
            self.rows = max(2, self.rows - 1)
            return Decision(self.rows, 64, "memory" if self.rows > 4 else "latency")

    world = World(plain(3, new=20), Falling())
    world.run()
    assert world.tally.target_changes == 7


def test_policy_observes_steps_and_finished_rows() -> None:
    told: list[Observation] = []

    class Listening(Fixed):
        def decide(self, observation: Observation) -> Decision:
            told.append(observation)
            return super().decide(observation)

    requests = plain(6, tokens=5, new=4)
    world = World(requests, Listening(rows=2))
    world.run()
    steps: list[Any] = [sample for observation in told for sample in observation.steps]
    finished = [row for observation in told for row in observation.finished]
    assert len(steps) == len(world.reports) - 1, "each once; the last was not followed by a decision"
    assert {(row.prompt_tokens, row.output_tokens, row.cut) for row in finished} == {(5, 4, True)}
    assert len(finished) == 4, "the last two ended in the last step"
    assert max(step.rows for step in steps) == 2
    assert sum(step.prefill_tokens for step in steps) == 30
    assert max(observation.live_rows for observation in told) == 2
    assert all((observation.prompt_tokens == 5).all() for observation in told)


def test_policy_observes_groups_and_rows_that_end_at_their_limit() -> None:
    told: list[Observation] = []

    class Listening(Fixed):
        def decide(self, observation: Observation) -> Decision:
            told.append(observation)
            return super().decide(observation)

    endless = SamplingParams(n=3, max_new_tokens=6, ignore_eos=True)
    stopping = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True, stop_token_ids=(11,))
    requests = [
        Request("a", [1, 2, 3, 4, 5], endless),
        Request("b", [1, 2, 3, 4, 5], stopping),
        Request("c", [6, 7, 8, 9], SamplingParams(max_new_tokens=400)),
    ]
    world = World(requests, Listening(rows=4))
    records = world.run()
    first, second = told[0].waiting, told[1]
    assert first is not None
    assert first.groups.tolist() == [0, 0, 0, 0, 0, 1], "equal prompts that follow each other are one group"
    assert first.ends_at_limit.tolist() == [True, True, True, False, False, False]
    assert (first.prompt_tokens.tolist(), first.max_new_tokens.tolist()) == ([5] * 5 + [4], [6] * 5 + [400])
    assert second.groups is not None
    assert second.ends_at_limit is not None
    assert second.waiting is not None
    assert (second.groups.tolist(), second.waiting.groups.tolist()) == ([0] * 4, [0, 1])
    assert second.ends_at_limit.tolist() == [True, True, True, False]
    cut = [row.cut for observation in told for row in observation.finished]
    assert len(cut) < len(records), "the last were told to nobody"
    by_stop = sum(record.finish_reason == "stop" for record in records)
    assert cut.count(False) in (by_stop, by_stop - 1)


def test_policy_observes_no_step_that_also_prepared_others() -> None:
    """Its time would look like that of too many rows; reports have it."""
    told: list[Observation] = []

    class Listening(Fixed):
        def decide(self, observation: Observation) -> Decision:
            told.append(observation)
            return super().decide(observation)

    class Preparing(ToyRunner):
        @property
        def prepared(self) -> bool:
            return self.calls > 2

    world = World(plain(1, tokens=5, new=9), Listening(rows=1))
    world.runner = world.loop._runner = Preparing(world.pool, None)
    world.run()
    assert len(world.reports) >= 9
    assert all(report.step_ms > 0 for report in world.reports)
    assert sum(len(observation.steps) for observation in told) == 2
