"""Promises 1 and 2 for rotary embeddings that change with a text's length."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rollout import Engine, Record, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds
from tests.support.parity import greedy, tight_engine
from tests.support.tiny_models import VOCABULARY, tiny

_ORIGINAL = 40
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": _ORIGINAL,
    "factor": 6.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
#: Ends below the original length, at it, crosses it at once, later and at the end, and begins beyond it.
_LENGTHS = (5, 17, 40, 39, 30, 41, 70)
_NEW_TOKENS = 24


def long_model(family: str, **fields: Any) -> PreTrainedModel:
    if family == "phimoe":
        fields["rope_parameters"] = _LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.4}
    return tiny(
        family, **({"original_max_position_embeddings": _ORIGINAL, "rope_parameters": dict(_LONGROPE)} | fields)
    )


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in _LENGTHS]


def stepwise(model: PreTrainedModel, record: Record) -> torch.Tensor:
    """Log-probabilities of a completion's tokens, each under a plain forward of the text before it."""
    ids, chosen = list(record.prompt_ids), []
    with torch.no_grad():
        for token in record.completion_ids:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].cpu()
            chosen.append(logits.log_softmax(-1)[token])
            ids.append(token)
    return torch.stack(chosen)


def assert_own_numbers(model: PreTrainedModel, records: list[Record]) -> None:
    """Without a cache: with one, ``generate`` goes on with the keys of the short embedding, or drops them wrongly."""
    for record in records:
        assert len(record.completion_ids) == _NEW_TOKENS
        assert (stepwise(model, record) - torch.tensor(record.logprobs)).abs().max() < 1e-5
        assert record.completion_ids == greedy(model, record.prompt_ids, _NEW_TOKENS, use_cache=False)


_GREEDY = SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_longrope_below_across_and_beyond_the_original_length(family: str) -> None:
    """They drop a text's keys when it crosses."""
    model = long_model(family, eos_token_id=None)
    engine = Engine(model, None)
    assert engine.context_limit == 4096
    together = engine.generate(prompts(), _GREEDY)
    assert_own_numbers(model, list(together))
    tight = tight_engine(model, 12, max_rows=4).generate(prompts(), _GREEDY)
    # Of 17 tokens and 24 more, the last is not computed any more.
    assert tight.stats.preempted_rows > together.stats.preempted_rows == sum(17 < n <= _ORIGINAL for n in _LENGTHS)
    assert [record.completion_ids for record in tight] == [record.completion_ids for record in together]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_longrope_where_generate_would_go_on_with_other_keys(family: str) -> None:
    model = long_model(family, eos_token_id=None, partial_rotary_factor=1.0, rotary_pct=1.0)
    assert_own_numbers(model, list(Engine(model, None).generate(prompts(), _GREEDY)))


@pytest.mark.usefixtures("at_once_and_late")
def test_samples_do_not_depend_on_company() -> None:
    """Samples of one prompt share its pages until they cross; batches mix texts on both sides."""
    model = long_model("phi3", sliding_window=12)
    params = SamplingParams(n=2, max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    expected = Engine(model, None).generate(prompts(), params, seed=4)
    assert expected.stats.preempted_rows > 0
    # A few prompt tokens per step, so that long prompts begin before they pass the boundary.
    policy = StaticPolicy(Bounds(max_rows=7, prefill_tokens=13))
    engines = {
        "a few": Engine(model, None, max_rows=3),
        "in chunks": Engine(model, None, policy=policy),
        "squeezed": tight_engine(model, 12),
    }
    for name, engine in engines.items():
        for record, same in zip(engine.generate(prompts(), params, seed=4), expected, strict=True):
            assert record.completion_ids == same.completion_ids, name
            assert record.logprobs == pytest.approx(same.logprobs, abs=1e-5), name


def test_dynamic_scaling_ends_at_the_original_length_and_leaves_nothing_behind() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 60}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=60, eos_token_id=None)
    engine = Engine(model, None)
    assert engine.context_limit == 60
    expected = engine.generate(prompts()[:6], _GREEDY)
    longer = torch.arange(3, 93, device=model.device)[None]
    with torch.no_grad():
        model(input_ids=longer, use_cache=False)  # its frequencies stay in the module
    rotary = model.model.rotary_emb
    frequencies, cached = rotary.inv_freq, int(rotary.max_seq_len_cached)
    contents = frequencies.clone()
    assert cached == 90
    found = engine.generate(prompts()[:6], _GREEDY)
    for record, same in zip(found, expected, strict=True):
        assert record.completion_ids == same.completion_ids
        assert record.logprobs == same.logprobs
        assert len(record.prompt_ids) + len(record.completion_ids) <= 60
    assert rotary.inv_freq is frequencies
    assert torch.equal(frequencies, contents)
    assert rotary.max_seq_len_cached == 90
