"""Forms of prompts and row ids: what is one prompt, what is several, what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from rollout.engine.prompt_arguments import GivenPrompt, check_prompt, given_prompts, given_row_ids, given_seed
from rollout.errors import InputError, PromptError

CHAT = [{"role": "user", "content": "hi"}]
IDS = torch.tensor([[0, 5, 6], [7, 8, 9]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])
ROWS = [{"prompt": "a", "x": 1}, {"prompt": CHAT, "x": 2}]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hello", ["hello"]),
        (CHAT, [CHAT]),
        (CHAT[0], [CHAT]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        ([torch.tensor(1), torch.tensor(2)], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([1.5, 2], [[1.5, 2]]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([CHAT, "b", [1, 2]], [CHAT, "b", [1, 2]]),
        ([torch.tensor([1, 2]), np.array([3]), torch.tensor([[4, 5]])], [[1, 2], [3], [4, 5]]),
        (IDS, [[0, 5, 6], [7, 8, 9]]),
        (BatchEncoding({"input_ids": IDS, "attention_mask": MASK}), [[5, 6], [7, 8, 9]]),
        ({"input_ids": [[1], [2, 3]], "attention_mask": [[1], [1, 1]]}, [[1], [2, 3]]),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, [[1, 2]]),
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], [[1, 2], [3]]),
        ([None, {"a": 1}, 5], [None, {"a": 1}, 5]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_prompts_are_told_apart(prompts: Any, expected: list[Any]) -> None:
    assert list(given_prompts(prompts)) == [GivenPrompt(prompt) for prompt in expected]


def test_rows_of_a_dataset_keep_their_other_columns() -> None:
    expected = [GivenPrompt(row["prompt"], {"x": row["x"]}) for row in ROWS]
    assert list(given_prompts(ROWS)) == expected
    assert list(given_prompts(iter(ROWS))) == expected
    assert list(given_prompts(ROWS[0])) == expected[:1]
    assert list(given_prompts(ROWS[1])) == expected[1:]
    texts = datasets.Dataset.from_list([{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}])
    for form in (texts, texts[:2], texts.to_pandas()):
        assert [(given.prompt, given.row) for given in given_prompts(form)] == [("a", {"x": 1}), ("b", {"x": 2})]


def test_prompts_of_an_iterator_are_read_one_by_one() -> None:
    read = []

    def texts() -> Any:
        for text in ("a", "b"):
            read.append(text)
            yield text

    given = iter(given_prompts(texts()))
    assert next(given).prompt == "a"
    assert read == ["a"]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), list])
def test_masked_positions_are_left_out(form: Any) -> None:
    assert [given.prompt for given in given_prompts(form(IDS), form(MASK), pad_id=0)] == [[5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {}, "prompts is None"),
        (3, {}, "prompts is 3"),
        (b"text", {}, "prompts is b'text'"),
        (IDS[None], {}, "shape"),
        (IDS, {"pad_id": 0}, "give attention_mask as well"),
        (IDS, {"attention_mask": MASK[:, 1:]}, "attention_mask must have the shape"),
        (IDS, {"attention_mask": MASK[:1]}, "attention_mask must have the shape"),
        ("text", {"attention_mask": [1]}, "attention_mask belongs to token ids"),
        (["text"], {"attention_mask": [[1]]}, "attention_mask must have the shape"),
        ([{"text": "a"}], {}, "rows with the columns text, but a row of a dataset has 'prompt'"),
        ({"text": ["a"]}, {}, "a mapping with the keys text"),
        ({"prompt": ["a", "b"], "x": [1]}, {}, "differ in length"),
    ],
)
def test_forms_that_cannot_be_read_are_refused(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(given_prompts(prompts, **options))


@pytest.mark.parametrize("prompt", ["", "text", [], [1, 2], CHAT, [np.int64(1)]])
def test_usable_prompts_pass(prompt: Any) -> None:
    check_prompt(prompt)


@pytest.mark.parametrize("prompt", [None, 5, b"x", [1.5], [True], [1, "a"], [*CHAT, 3], {"a": 1}, ["a"], [None]])
def test_prompts_of_another_kind_are_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="The prompt") as refusal:
        check_prompt(prompt)
    assert refusal.value.error_class == "bad_prompt"


def test_row_ids_become_strings() -> None:
    given = [GivenPrompt("a"), GivenPrompt("b")]
    assert list(given_row_ids([7, "x"], given)) == ["7", "x"]
    assert list(given_row_ids(np.array([7, 8]), given)) == ["7", "8"]
    assert list(given_row_ids(torch.tensor([7, 8]), given)) == ["7", "8"]
    assert list(given_row_ids("row", given[:1])) == ["row"]


@pytest.mark.parametrize(
    ("row_ids", "message"),
    [
        ([1, "1"], "'1' stands twice"),
        ([1.5, 2], "1.5"),
        ([None, 1], "None"),
        ([True, 1], "True"),
        (["a"], "1 entries"),
        (["é\ud800", "b"], "not valid Unicode"),
    ],
)
def test_other_row_ids_are_refused(row_ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"row_ids .*{message}"):
        list(given_row_ids(row_ids, [GivenPrompt("a"), GivenPrompt("b")]))


@pytest.mark.parametrize("seed", ["x", None, 1.5, 2**63, True])
def test_other_seeds_are_refused(seed: Any) -> None:
    assert given_seed(np.int64(3)) == 3
    with pytest.raises(InputError, match=r"seed is .*, but must be a 64-bit integer"):
        given_seed(seed)


def test_arrays_of_tables_are_the_lists_that_were_stored() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    stored = datasets.Dataset.from_list([{"prompt": parts}, {"prompt": parts}])
    table = stored.to_pandas()
    assert isinstance(table["prompt"][0], np.ndarray)
    for form in (table, table["prompt"], list(table["prompt"])):
        assert [given.prompt for given in given_prompts(form)] == [parts, parts]
    ids = datasets.Dataset.from_list([{"prompt": [1, 2]}, {"prompt": [3]}])
    for form in (ids.to_pandas(), ids.with_format("torch"), ids.with_format("numpy")):
        assert [given.prompt for given in given_prompts(form)] == [[1, 2], [3]]


def test_single_number_is_refused_in_any_type() -> None:
    for number in (5, np.int64(5), torch.tensor(5), np.array(5.0)):
        with pytest.raises(InputError, match=r"^prompts is .*, but must be texts"):
            given_prompts(number)
