"""Promise 2 beyond greedy: what is sampled, recorded and stopped, against the model's own forward."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rollout import Engine, SamplingParams
from tests.support.parity import random_prompts, teacher_forced, worst_logprob
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_are_of_the_full_vocabulary_after_temperature(temperature: float) -> None:
    model = tiny("llama")
    params = SamplingParams(n=3, temperature=temperature, top_p=0.9, max_new_tokens=20)
    batch = Engine(model, None).generate(random_prompts(1, 5), params)
    assert worst_logprob(model, list(batch), temperature) < 1e-5


def test_sampler_logprobs_are_renormalised_over_what_the_filters_keep() -> None:
    model = tiny("llama")
    params = SamplingParams(n=2, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, max_new_tokens=16)
    batch = Engine(model, None).generate(random_prompts(2, 5), params)
    filters = LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)])
    for record in batch:
        with torch.no_grad():
            ids = torch.tensor([record.prompt_ids + record.completion_ids], device=model.device)
            logits = model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1].float().cpu() / 0.8
        kept = filters(ids, logits).log_softmax(-1)  # type: ignore[arg-type]
        expected = kept.gather(1, torch.tensor(record.completion_ids)[:, None])[:, 0]
        assert record.sampler_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_samples_follow_the_models_distribution() -> None:
    """Chi-square of first tokens against the model's own probabilities."""
    model = tiny("llama")
    prompt, count = random_prompts(5, 2)[1], 4000
    batch = Engine(model, None).generate([prompt], SamplingParams(n=count, max_new_tokens=1, ignore_eos=True), seed=3)
    with torch.no_grad():
        ids = torch.tensor([prompt], device=model.device)
        expected = model(input_ids=ids).logits[0, -1].float().softmax(-1).cpu() * count
    found = torch.bincount(torch.tensor([record.completion_ids[0] for record in batch]), minlength=len(expected))
    often = expected >= 5
    pooled_expected = torch.cat([expected[often], expected[~often].sum()[None]])
    pooled_found = torch.cat([found[often], found[~often].sum()[None]])
    statistic = float(((pooled_found - pooled_expected) ** 2 / pooled_expected).sum())
    freedom = len(pooled_expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations; the seed is fixed


def test_several_eos_ids_end_a_completion_and_are_kept() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(2, 60))  # type: ignore[union-attr]
    batch = Engine(model, None).generate(random_prompts(7, 6), SamplingParams(n=4, max_new_tokens=64))
    stopped = [record for record in batch if record.finish_reason == "stop"]
    assert stopped
    for record in stopped:
        assert 2 <= record.completion_ids[-1] < 60
        assert not any(2 <= token < 60 for token in record.completion_ids[:-1])
    ignoring = SamplingParams(n=4, max_new_tokens=8, ignore_eos=True)
    assert all(r.finish_reason == "length" for r in Engine(model, None).generate(random_prompts(7, 6), ignoring))


def test_stop_ids_of_one_row_do_not_stop_others() -> None:
    model = tiny("llama")
    prompts = random_prompts(8, 3)
    free = SamplingParams(max_new_tokens=30, ignore_eos=True)
    first = Engine(model, None).generate(prompts, free)
    stop = first[1].completion_ids[10]
    params = [free, SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(stop,)), free]
    batch = Engine(model, None).generate(prompts, params)
    cut = first[1].completion_ids.index(stop) + 1
    assert batch[1].completion_ids == first[1].completion_ids[:cut]
    assert batch[1].finish_reason == "stop"
    assert [batch[0].completion_ids, batch[2].completion_ids] == [first[0].completion_ids, first[2].completion_ids]


def test_context_limit_ends_a_completion() -> None:
    model = tiny("llama", max_position_embeddings=40)
    prompts = [list(range(3, 33)), list(range(3, 42)), list(range(3, 43)), []]
    batch = Engine(model, None).generate(prompts, SamplingParams(max_new_tokens=64, ignore_eos=True))
    assert [len(record.completion_ids) for record in batch] == [10, 1, 0, 0]
    assert [record.finish_reason for record in batch] == ["length", "length", "error", "error"]
    assert [record.error_class for record in batch] == ["", "", "prompt_too_long", "empty_prompt"]


def test_bf16_logprobs_stay_near_teacher_forcing() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    batch = Engine(model, None).generate(random_prompts(3, 6), SamplingParams(n=2, max_new_tokens=24))
    differences = torch.cat([(teacher_forced(model, r) - torch.tensor(r.logprobs)).abs() for r in batch])
    assert float(differences.mean()) < 0.1
