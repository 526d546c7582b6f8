"""Penalties, bans and biases: equal to transformers' ``generate``, and independent of the batch."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from rollout import Engine, SamplingParams
from rollout.errors import InputError
from rollout.records import Record
from tests.support.parity import tight_engine, worst_logprob
from tests.support.rule_cases import EOS, Case, edited_logprobs, generated, random_case
from tests.support.tiny_models import VOCABULARY, shallow

#: One of each run strategy, and one with a soft cap on its logits.
FAMILIES = ("llama", "gemma2", "bloom", "mamba")


def cases_of(seed: int, count: int, temperature: float) -> list[Case]:
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [random_case(rng, VOCABULARY, temperature=temperature) for _ in range(count)]


def model_of(family: str) -> PreTrainedModel:
    model = shallow(family)
    model.generation_config.eos_token_id = list(EOS)  # type: ignore[union-attr]
    return model


def records_of(engine: Engine, cases: list[Case]) -> list[Record]:
    return list(engine.generate([case.prompt for case in cases], [case.params for case in cases]))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_under_rules_match_generate(family: str) -> None:
    model = model_of(family)
    cases = cases_of(seed=random.SystemRandom().randrange(10**6), count=12, temperature=0.0)
    records = records_of(Engine(model, None, max_rows=7), cases)
    assert [record.completion_ids for record in records] == [generated(model, case) for case in cases]


def test_sampler_logprobs_under_rules_are_those_of_transformers_processors() -> None:
    model = model_of("llama")
    cases = cases_of(seed=4, count=12, temperature=0.8)
    records = records_of(Engine(model, None, max_rows=5), cases)
    assert worst_logprob(model, records, temperature=0.8) < 1e-5
    for case, record in zip(cases, records, strict=True):
        expected = edited_logprobs(model, case, record.completion_ids)
        assert record.sampler_logprobs == pytest.approx(expected.tolist(), abs=2e-5)
    # The comparison holds only if the rules changed something.
    assert any(abs(a - b) > 0.1 for r in records for a, b in zip(r.logprobs, r.sampler_logprobs, strict=True))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_rules_do_not_depend_on_batch_order_or_preemption(family: str) -> None:
    model = model_of(family)
    cases = cases_of(seed=6, count=20, temperature=0.7)
    cases += [Case(case.prompt, SamplingParams(max_new_tokens=24, top_p=0.9), {}) for case in cases[:4]]
    alone = records_of(Engine(model, None, max_rows=1), cases)
    together = records_of(Engine(model, None), cases)
    tight = tight_engine(model, pages=12)
    preempted = records_of(tight, cases)
    assert tight.stats is not None
    assert tight.stats.preempted_rows > 3
    for others in (together, preempted):
        for one, other in zip(alone, others, strict=True):
            assert one.completion_ids == other.completion_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-5)


def test_row_without_rules_keeps_its_bits_beside_rows_with_rules() -> None:
    model = model_of("llama")
    cases = cases_of(seed=8, count=6, temperature=1.0)
    plain = SamplingParams(max_new_tokens=24)
    prompts = [case.prompt for case in cases]
    alone = Engine(model, None).generate(prompts, plain)
    params = [plain if i % 2 else case.params for i, case in enumerate(cases)]
    beside = Engine(model, None).generate(prompts, params)
    for number in range(1, len(cases), 2):
        assert alone[number].completion_ids == beside[number].completion_ids


def test_penalised_tokens_are_counted_in_the_completion_alone() -> None:
    """If the penalties saw the prompt, its tokens would become unlikely."""
    model = model_of("llama")
    prompt = [5, 9, 5, 9]
    first = Engine(model, None).generate([prompt], SamplingParams(max_new_tokens=1, temperature=0.0))[0]
    penalised = SamplingParams(max_new_tokens=1, temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    assert Engine(model, None).generate([prompt], penalised)[0].sampler_logprobs == first.sampler_logprobs


def test_bad_word_that_begins_in_the_prompt_is_not_completed() -> None:
    model = model_of("llama")
    prompt = [7, 8, 11]
    greedy = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True)
    free = Engine(model, None).generate([prompt], greedy)[0].completion_ids
    word = (*prompt, free[0])
    banned = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True, bad_words=(word,))
    assert Engine(model, None).generate([prompt], banned)[0].completion_ids[0] != free[0]
    other = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True, bad_words=((3, *word),))
    assert Engine(model, None).generate([prompt], other)[0].completion_ids == free


def test_nothing_ends_a_completion_before_its_minimum() -> None:
    model = model_of("llama")
    allowed = (*EOS, 50, 51)
    ending = SamplingParams(n=6, max_new_tokens=20, allowed_token_ids=allowed, stop_token_ids=(50,), min_new_tokens=9)
    records = Engine(model, None).generate([[4, 5, 6]], ending)
    assert all(record.completion_ids[:9] == [51] * 9 for record in records)
    assert any(record.finish_reason == "stop" for record in records)


def test_rows_whose_tokens_are_all_banned_become_error_records() -> None:
    """The word 5 5 leaves no token after the first 5; other rows are unaffected."""
    model = model_of("llama")
    stuck = SamplingParams(max_new_tokens=8, allowed_token_ids=(5,), bad_words=((5, 5),))
    free = SamplingParams(max_new_tokens=8, allowed_token_ids=(5,))
    for overlapping in (1, 3):
        records = Engine(model, None, max_rows=overlapping).generate([[4], [4], [4]], [stuck, free, stuck])
        assert [record.error_class for record in records] == ["no_token_allowed", "", "no_token_allowed"]
        assert records[0].completion_ids == [5]
        assert len(records[0].logprobs) == len(records[0].sampler_logprobs) == 1
        assert records[1].completion_ids == [5] * 8


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(stop_token_ids=(VOCABULARY,)), f"stop_token_ids has the token id {VOCABULARY}"),
        (SamplingParams(allowed_token_ids=(VOCABULARY,)), f"allowed_token_ids has the token id {VOCABULARY}"),
        (SamplingParams(logit_bias={VOCABULARY + 5: 1.0}), "logit_bias has the token id"),
        (SamplingParams(bad_words=((3, 10_000),)), "bad_words has the token id 10000"),
        (SamplingParams(bad_words=("a",)), "no tokenizer for bad_words"),
        (SamplingParams(allowed_token_ids=(3,), bad_words=((3,),)), "ban every token"),
        (SamplingParams(allowed_token_ids=EOS, min_new_tokens=1), "ban every token"),
    ],
)
def test_rules_that_do_not_suit_the_model_are_refused_for_their_rows_alone(params: SamplingParams, reason: str) -> None:
    records = Engine(model_of("llama"), None).generate([[4], [5]], [params, SamplingParams(max_new_tokens=2)])
    assert records[0].error_class == "bad_params"
    assert reason in records[0].error
    assert not records[1].error_class
    with pytest.raises(InputError, match=reason):
        Engine(model_of("llama"), None).generate([[4], [5]], params)


def test_histories_of_long_prompts_and_completions_grow() -> None:
    """More tokens than a history begins with, at several lengths at once, against the processors of transformers."""
    model = model_of("llama")
    rng = random.Random(3)
    cases = [
        Case(
            [rng.randrange(3, VOCABULARY) for _ in range(length)],
            SamplingParams(max_new_tokens=150, temperature=0.9, repetition_penalty=1.2, frequency_penalty=0.3),
            {"repetition_penalty": 1.2},
        )
        for length in (1, 300, 1900)
    ]
    records = records_of(Engine(model, None), cases)
    for case, record in zip(cases, records, strict=True):
        expected = edited_logprobs(model, case, record.completion_ids)
        assert torch.allclose(torch.tensor(record.sampler_logprobs), expected.cpu(), atol=5e-5)
