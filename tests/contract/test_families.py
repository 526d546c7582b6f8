"""Promise 2 for every family: greedy equals ``generate``, log-probabilities equal teacher forcing; or a refusal."""

from __future__ import annotations

import pytest

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from tests.support.parity import greedy, random_prompts, tight_engine, worst_logprob
from tests.support.tiny_models import BY_STRATEGY, REFUSED, SERVED, tiny

_NEW_TOKENS = 24
#: Too few pages of 16 tokens for the rows that are let in: one of up to 304 tokens, others of up to 48, and 24 more.
_PAGES = 22


@pytest.mark.parametrize(
    ("strategy", "family"), [(name, family) for name, families in BY_STRATEGY.items() for family in families]
)
def test_own_numbers_with_rows_joining_late_and_preempted(strategy: str, family: str) -> None:
    model = tiny(family, eos_token_id=None)  # every row runs to its limit, so that pages run out
    prompts = random_prompts(11, 7)
    engine = tight_engine(model, _PAGES, max_rows=4)
    assert engine._module.strategy.name == strategy
    batch = engine.generate(prompts, SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0))
    assert batch.stats.preempted_rows > 0
    assert batch.stats.live_rows_max < len(prompts)
    for prompt, record in zip(prompts, batch, strict=True):
        assert record.completion_ids == greedy(model, prompt, _NEW_TOKENS)
    assert worst_logprob(model, list(batch)) < 1e-5


@pytest.mark.parametrize("family", SERVED)
def test_text_is_longer_than_windows(family: str) -> None:
    """The rows above pass the windows of the tiny configurations, or the test above would prove little."""
    text = tiny(family).config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    assert all(window < 1 + _NEW_TOKENS for window in windows if window)


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_refused_at_start_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        Engine(tiny(family), None)
    assert str(refusal.value).endswith(".")
    assert family in str(refusal.value)
