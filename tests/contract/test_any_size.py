"""Promise 0: prompts from one token to the context, outputs to a thousand tokens, in any company."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture import engine as hypothesis_engine

from rollout import Engine, SamplingParams
from tests.support.fuzz import CONTEXT, Case, cases, check, model_of
from tests.support.parity import greedy

SEED = int(os.environ.get("ROLLOUT_FUZZ_SEED", "12"))
EXAMPLES = int(os.environ.get("ROLLOUT_FUZZ_EXAMPLES", "6"))


@pytest.mark.parametrize("length", [255, 256, 257, 511, 513, 1025, CONTEXT - 8])
def test_greedy_tokens_of_a_prompt_beyond_the_first_page_table(length: int) -> None:
    model = model_of("llama")
    long, short = [3 + i % 190 for i in range(length)], [5, 6, 7]
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    batch = Engine(model, None).generate([short, long], params)
    for record, prompt in zip(batch, (short, long), strict=True):
        wanted = greedy(model, prompt, 8)
        assert record.completion_ids[: len(wanted)] == wanted


@pytest.fixture
def little_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis's own limit is five minutes; `make fuzz` goes that far."""
    monkeypatch.setattr(hypothesis_engine, "MAX_SHRINKING_SECONDS", 30)


@pytest.mark.long
@pytest.mark.usefixtures("little_shrinking")
@seed(SEED)
@given(case=cases(prompt_tokens=6000, output_tokens=300))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
def test_any_call_gives_the_models_own_tokens(case: Case) -> None:
    print(f"seed {SEED}")
    check(case)
