"""Log-probabilities of the trainer's own micro-batch shape, and the mass that filters keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rollout import Batch, Engine, SamplingParams
from rollout.errors import InputError
from tests.support.parity import random_prompts, teacher_forced
from tests.support.tiny_models import tiny

_PROMPTS = random_prompts(6, 3)


def trainers_own(model: Any, batch: Batch, rows: int, temperature: float) -> list[list[float]]:
    """Compute what a trainer does that pads the batch as TRL does and passes ids and mask."""
    padded = batch.to_padded(0)
    ids = torch.cat([padded.prompt_ids, padded.completion_ids], 1)
    mask = torch.cat([padded.prompt_mask, padded.completion_mask], 1)
    width = padded.completion_ids.shape[1]
    found: list[list[float]] = []
    with torch.no_grad():
        for start in range(0, len(batch), rows):
            part = slice(start, start + rows)
            kept = model(input_ids=ids[part], attention_mask=mask[part], logits_to_keep=width + 1).logits[:, :-1]
            logprobs = (kept.float() / temperature).log_softmax(-1)
            chosen = logprobs.gather(2, padded.completion_ids[part][:, :, None])[:, :, 0]
            found += [
                row[:length].tolist()
                for row, length in zip(chosen, padded.completion_mask[part].sum(1).tolist(), strict=True)
            ]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, 1, 4, 100])
def test_log_probabilities_are_bitwise_the_trainers(dtype: torch.dtype, exact: Any) -> None:
    model = tiny("llama", dtype=dtype)
    params = [SamplingParams(n=2, max_new_tokens=n, ignore_eos=True, temperature=0.7) for n in (1, 17, 33)]
    engine = Engine(model, None)
    batch = engine.generate(_PROMPTS, params, exact=exact)
    rows = exact if type(exact) is int else len(batch)
    assert [record.logprobs for record in batch] == trainers_own(model, batch, rows, 0.7)
    plain = engine.generate(_PROMPTS, params)
    assert [record.sampled_logprobs for record in batch] == [record.logprobs for record in plain]
    assert [record.sampler_logprobs for record in batch] == [record.sampler_logprobs for record in plain]
    assert all(mass == 1.0 for record in batch for mass in record.kept_mass)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_padding_in_front_shifts_no_absolute_positions(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    batch = Engine(model, None).generate(_PROMPTS, SamplingParams(max_new_tokens=6, ignore_eos=True), exact=True)
    for record in batch:
        assert record.logprobs == pytest.approx(teacher_forced(model, record).tolist(), abs=1e-5)
    assert ("positions of this model are absolute" in caplog.text) == (family != "llama")


def test_exact_follows_temperatures_and_leaves_error_records(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    params = [SamplingParams(max_new_tokens=4, temperature=t) for t in (0.0, 2.0, 0.5)]
    batch = Engine(model, None).generate([_PROMPTS[0], [], _PROMPTS[2]], params, exact=2)
    assert [record.error_class for record in batch] == ["", "empty_prompt", ""]
    assert batch[1].logprobs == []
    for record, temperature in ((batch[0], 1.0), (batch[2], 0.5)):
        assert record.logprobs == pytest.approx(teacher_forced(model, record, temperature).tolist(), abs=1e-5)


def test_micro_batch_that_does_not_fit_is_halved_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rollout.engine import exact as module

    own = module.teacher_forced_logprobs

    def small(model: Any, rows: Any, shape: Any, **options: Any) -> torch.Tensor:
        if len(rows) > 2:
            raise MemoryError
        return own(model, rows, shape, **options)

    monkeypatch.setattr(module, "teacher_forced_logprobs", small)
    model = tiny("llama")
    batch = Engine(model, None).generate(_PROMPTS, SamplingParams(n=2, max_new_tokens=5), exact=True)
    assert [record.logprobs for record in batch] == trainers_own(model, batch, 2, 1.0)
    assert "a micro-batch of 6 rows does not fit" in caplog.text


@pytest.mark.parametrize("exact", [0, -1, 1.5, "8", None])
def test_other_sizes_are_refused(exact: Any) -> None:
    with pytest.raises(InputError, match=r"exact is .*, but must be True, False or the number of rows"):
        Engine(tiny("llama"), None).generate(_PROMPTS, exact=exact)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.1},
        {"top_p": 0.9, "top_k": 30, "min_p": 0.01},
        {"allowed_token_ids": tuple(range(5, 60))},
        {"logit_bias": {7: -math.inf}, "top_k": 9},
    ],
)
def test_kept_mass_is_that_of_the_tokens_that_could_be_drawn(filters: dict[str, Any]) -> None:
    model = tiny("llama")
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.8, **filters)
    batch = Engine(model, None).generate(_PROMPTS, params)
    for record in batch:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([record.prompt_ids + record.completion_ids])).logits[0].float()
        scores = logits[len(record.prompt_ids) - 1 : -1] / 0.8
        for token, row, mass in zip(record.completion_ids, scores, record.kept_mass, strict=True):
            assert mass == pytest.approx(_mass(row, filters), abs=1e-4), token
    means = [mass for record in batch for mass in record.kept_mass]
    assert batch.stats.kept_mass == pytest.approx(sum(means) / len(means), abs=1e-6)


def _mass(scores: torch.Tensor, filters: dict[str, Any]) -> float:
    """Return the mass of what the filters keep, by sorting."""
    whole = scores.softmax(-1)
    kept = torch.full_like(scores, -torch.inf)
    allowed = list(filters.get("allowed_token_ids", range(len(scores))))
    kept[allowed] = scores[allowed]
    kept[list(filters.get("logit_bias", {}))] = -torch.inf
    if k := filters.get("top_k"):
        kept[kept < kept.topk(k).values[-1]] = -torch.inf
    if p := filters.get("top_p"):
        ordered = kept.softmax(-1).sort(descending=True)
        count = int((ordered.values.cumsum(0) < p).sum()) + 1
        kept[ordered.indices[count:]] = -torch.inf
    if m := filters.get("min_p"):
        kept[kept.softmax(-1) < m * kept.softmax(-1).max()] = -torch.inf
    return float(whole[kept > -torch.inf].sum())


def test_with_penalties_it_is_the_ratio_of_both_probabilities() -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, presence_penalty=1.5, logit_bias={9: 3.0})
    batch = Engine(tiny("llama"), None).generate(_PROMPTS, params)
    masses = [mass for record in batch for mass in record.kept_mass]
    assert max(masses) > 1.05  # so it is no mass
    assert all(
        math.log(mass) == pytest.approx(own - sampler, abs=1e-9)
        for record in batch
        for mass, own, sampler in zip(record.kept_mass, record.logprobs, record.sampler_logprobs, strict=True)
    )
