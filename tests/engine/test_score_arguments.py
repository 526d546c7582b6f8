"""What `Engine.score` takes, and what it says of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.errors import InputError
from tests.engine.test_engine import tokenizer_of
from tests.support.tiny_models import tiny


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny("llama", max_position_embeddings=64), tokenizer_of())


def logprobs_of(engine: Engine, prompt: list[int], completion: list[int]) -> Any:
    return pytest.approx(engine.score([prompt], [completion])[0].logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[5, 6], [7, 6]], [[8], [9]]),
        (np.array([[5, 6], [7, 6]]), np.array([[8], [9]])),
        (torch.tensor([[5, 6], [7, 6]]), torch.tensor([[8], [9]])),
        ([torch.tensor([5, 6]), np.array([7, 6])], [torch.tensor([8]), np.array([9])]),
        (["w5 w6", "w7 w6"], ["w8", "w9"]),
        (["w5 w6", [7, 6]], ("w8", [9])),
        ([{"prompt": "w5 w6"}, {"prompt": [7, 6]}], [[8], "w9"]),
        ((prompt for prompt in ([5, 6], [7, 6])), (completion for completion in ([8], [9]))),
    ],
)
def test_pairs_are_taken_in_every_form(engine: Engine, prompts: Any, completions: Any) -> None:
    scores = engine.score(prompts, completions)
    assert scores[0].logprobs == logprobs_of(engine, [5, 6], [8])
    assert scores[1].logprobs == logprobs_of(engine, [7, 6], [9])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [([5, 6], [8, 9]), ("w5 w6", "w8 w9"), (np.array([5, 6]), np.array([8, 9])), (torch.tensor([5, 6]), [8, 9])],
)
def test_a_single_pair_needs_no_lists(engine: Engine, prompt: Any, completion: Any) -> None:
    assert [found.logprobs for found in engine.score(prompt, completion)] == [logprobs_of(engine, [5, 6], [8, 9])]


def test_a_chat_gets_the_template_and_its_completion_no_end(engine: Engine) -> None:
    chat = [{"role": "user", "content": "w5"}]
    assert engine.score([chat], ["w9 w10"])[0].logprobs == logprobs_of(engine, engine.encode(chat), [9, 10])


def test_records_bring_their_completions(engine: Engine) -> None:
    batch = engine.generate([[5, 6], [], [7]], SamplingParams(n=2, max_new_tokens=5))
    for given in (batch, batch.records, iter(batch)):
        scores = engine.score(given)
        assert [len(found.logprobs) for found in scores] == [len(record.completion_ids) for record in batch]
        assert [found.error_class for found in scores] == ["", "", "empty_prompt", "empty_prompt", "", ""]
        assert scores[0].logprobs == pytest.approx(batch[0].logprobs, abs=1e-5)


def test_each_pair_may_have_a_temperature_of_its_own(engine: Engine) -> None:
    pairs = ([[5, 6]] * 3, [[8, 9]] * 3)
    mixed = engine.score(*pairs, temperature=[0.0, 0.5, 2.0])
    for found, temperature in zip(mixed, (0.0, 0.5, 2.0), strict=True):
        assert found.logprobs == pytest.approx(engine.score(*pairs, temperature=temperature)[0].logprobs, abs=1e-5)
    assert mixed[0].logprobs != mixed[1].logprobs != mixed[2].logprobs


def test_a_bad_pair_has_an_error_and_the_others_their_scores(engine: Engine) -> None:
    prompts: list[Any] = [[5], [], [5], [199], [5], [-1], [5], None, [5], [5], [5] * 60, [5] * 59, [5, "x"], [5]]
    completions: list[Any] = [[6], [6], [], [6], [199], [6], 7, [6], None, [6, True], [6] * 5, [6] * 5, [6], ["w"]]
    scores = engine.score(prompts, completions)
    assert [found.error_class for found in scores] == [
        *("", "empty_prompt", "", "bad_prompt", "bad_completion", "bad_prompt", "bad_completion", "bad_prompt"),
        *("bad_completion", "bad_completion", "too_long", "", "bad_prompt", "bad_completion"),
    ]
    assert scores.logprobs[0] == logprobs_of(engine, [5], [6])
    assert scores.logprobs[1] is None
    assert scores.logprobs[2] == []
    assert scores[10].error == "Prompt and completion have 65 tokens, but the model's context is 64."
    assert scores[4].error == "The completion has token ids outside of the vocabulary of 199."
    assert (scores.stats.pairs, scores.stats.error_pairs) == (14, 11)
    assert all(found.error.endswith(".") for found in scores if found.error_class)


def test_no_pairs_give_no_scores(engine: Engine) -> None:
    scores = engine.score([], [])
    assert len(scores) == 0
    assert scores.logprobs == []
    assert scores.stats.forwards == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[5], [6]], [[7]]), {}, "completion_ids has 1 entries, but there are 2 prompts."),
        (([[5]], 7), {}, "completion_ids is 7, but must be lists of token ids or texts, one per prompt."),
        (([[5]],), {}, "completion_ids is missing: only records hold their own completions."),
        (([[5]], [[6]]), {"temperature": -1}, "temperature is -1, but must be a finite number of at least 0."),
        (([[5]], [[6]]), {"temperature": float("nan")}, "temperature is nan, but must be a finite number"),
        (([[5]], [[6]]), {"temperature": [1.0, 2.0]}, "temperature has 2 entries, but there are 1 pairs."),
        ((torch.tensor([[0, 5], [6, 7]]), [[6], [6]]), {}, "Rows of prompt_ids begin or end with the padding id 0"),
        (([[5], [6]], torch.tensor([[5, 0], [6, 7]])), {}, "Rows of completion_ids begin or end with the padding id 0"),
    ],
)
def test_what_cannot_be_read_is_refused(
    engine: Engine, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        engine.score(*arguments, **options)
    assert str(refused.value).startswith(message)


def test_texts_need_a_tokenizer() -> None:
    engine = Engine(tiny("llama"), None)
    with pytest.raises(InputError, match="The engine has no tokenizer for texts"):
        engine.score([[5]], ["w6"])
