"""What jobs/bench hides from policies, and what it says of their forecasts."""

from __future__ import annotations

import pytest

from jobs.bench import policies_on_engine
from jobs.bench.lib import hidden_limits
from jobs.bench.lib.hidden_limits import Unaware
from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, FinishedRow, Observation
from rollout.requests import Request as EngineRequest
from tests.support.observations import observe
from tests.support.tiny_models import tiny


class Listening:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        self.told.append(observation)
        return Decision(4, 64, "cap")


def test_a_policy_is_not_told_where_rows_end() -> None:
    model, listening = tiny("llama"), Listening()
    policy = Unaware(listening, 50)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (3, 9, 20, 7, 5, 4)]
    requests = [EngineRequest(str(i), [5, 6, 7], one) for i, one in enumerate(params)]
    outcome = policies_on_engine.run(Engine(model, None, policy=policy), policy, requests)
    assert outcome.stats.output_tokens == sum(one.max_new_tokens for one in params)
    assert len(outcome.step_ms) == outcome.stats.steps
    told = listening.told
    assert all((seen.max_new_tokens == 50).all() and seen.ends_at_limit is None for seen in told)
    waiting = [seen.waiting for seen in told if seen.waiting is not None and len(seen.waiting)]
    assert waiting
    assert all((rows.max_new_tokens == 50).all() and not rows.ends_at_limit.any() for rows in waiting)
    assert not any(row.cut for seen in told for row in seen.finished)


@pytest.mark.parametrize(("true_limit", "errors"), [(100, (0.0, 0.0, 0.0)), (150, (0.0, -1.29, 0.0))])
def test_what_is_foretold_is_held_against_what_comes(
    true_limit: int, errors: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows, of 15 + 50 tokens in memory for 1,000, where a thousand before them had 100 tokens."""
    monkeypatch.setattr(hidden_limits, "_DECISIONS_PER_LOOK", 1)
    policy = Unaware(Listening(), 500)
    policy.decide(observe([50] * 10, prompt=15, max_new=true_limit, eta=1000, finished=[FinishedRow(15, 100)] * 1000))
    assert policy.errors[-1] == pytest.approx(errors, abs=0.02)


def test_the_size_of_errors_is_told() -> None:
    assert hidden_limits.quantiles([(0.0, -0.5, 0.25), (0.0, 0.5, 0.75)]) == [
        "0.0%, 0.0%",
        "50.0%, 50.0%",
        "50.0%, 72.5%",
    ]
    assert hidden_limits.quantiles([]) == ["", "", ""]
