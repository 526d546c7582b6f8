"""Batches as tensors: padded on the right sides, with masks that say what is real."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

import rollout
from rollout.errors import InputError
from rollout.records import RECORD_COLUMNS, Batch, Record
from rollout.stats import Tally

STATS = Tally().stats(0, 0, 0.0)
PAD = 77


def record(name: str, prompt: list[int], completion: list[int], logprobs: list[float] | None = None) -> Record:
    values = [-float(i + 1) for i in range(len(completion))] if logprobs is None else logprobs
    return Record(name, 0, prompt, completion, "", values, [value / 2 for value in values], "length")


def test_prompts_are_padded_on_the_left_and_completions_on_the_right() -> None:
    batch = Batch((record("a", [1, 2, 3], [4]), record("b", [5], [6, 7])), STATS)
    padded = batch.to_padded(PAD)
    assert padded.prompt_ids.tolist() == [[1, 2, 3], [PAD, PAD, 5]]
    assert padded.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded.completion_ids.tolist() == [[4, PAD], [6, 7]]
    assert padded.completion_mask.tolist() == [[1, 0], [1, 1]]
    assert padded.logprobs.tolist() == [[-1, 0], [-1, -2]]
    assert padded.sampler_logprobs.tolist() == [[-0.5, 0], [-0.5, -1]]


def test_dtypes_are_those_that_trainers_take() -> None:
    padded = Batch((record("a", [1], [2]),), STATS).to_padded(PAD)
    for tensor in (padded.prompt_ids, padded.prompt_mask, padded.completion_ids, padded.completion_mask):
        assert tensor.dtype == torch.int64
    assert padded.logprobs.dtype == padded.sampler_logprobs.dtype == torch.float32


def test_the_mask_is_of_what_was_generated_not_of_what_is_not_padding() -> None:
    """The end-of-sequence id is often the padding id too."""
    padded = Batch((record("a", [PAD, 1], [5, PAD]), record("b", [1], [PAD])), STATS).to_padded(PAD)
    assert padded.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert padded.completion_mask.tolist() == [[1, 1], [1, 0]]


def test_padding_without_an_id_is_refused() -> None:
    with pytest.raises(InputError, match=r"^pad_token_id is None"):
        Batch((record("a", [1], [2]),), STATS).to_padded(None)  # type: ignore[arg-type]


def test_error_records_are_rows_like_others() -> None:
    batch = Batch((record("a", [1, 2], [3]), record("empty", [], []), record("late", [4], [])), STATS)
    padded = batch.to_padded(PAD)
    assert padded.prompt_ids.tolist() == [[1, 2], [PAD, PAD], [PAD, 4]]
    assert padded.completion_ids.tolist() == [[3], [PAD], [PAD]]
    assert padded.completion_mask.tolist() == [[1], [0], [0]]


def test_nothing_generated_at_all_is_a_batch_of_no_columns() -> None:
    padded = Batch((record("a", [1], []), record("b", [1, 2], [])), STATS).to_padded(PAD)
    assert padded.completion_ids.shape == padded.logprobs.shape == (2, 0)
    assert padded.prompt_ids.shape == (2, 2)


def test_no_prompts_are_a_batch_of_no_rows() -> None:
    padded = Batch((), STATS).to_padded(PAD)
    assert padded.prompt_ids.shape == padded.completion_mask.shape == padded.logprobs.shape == (0, 0)
    assert (padded.prompt_ids.dtype, padded.logprobs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_real_can_be_taken_out_again(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(100) for _ in range(rng.randint(0, most))]

    records = [record(str(i), ids(9), ids(20)) for i in range(12)]
    padded = Batch(tuple(records), STATS).to_padded(PAD)
    for i, one in enumerate(records):
        prompt, completion = padded.prompt_mask[i].bool(), padded.completion_mask[i].bool()
        assert padded.prompt_ids[i][prompt].tolist() == one.prompt_ids
        assert padded.completion_ids[i][completion].tolist() == one.completion_ids
        assert padded.logprobs[i][completion].tolist() == one.logprobs
        assert padded.sampler_logprobs[i][completion].tolist() == one.sampler_logprobs
        assert (padded.prompt_ids[i][~prompt] == PAD).all()
        assert (padded.completion_ids[i][~completion] == PAD).all()
        assert not padded.logprobs[i][~completion].any()
        assert prompt.tolist() == sorted(prompt.tolist())
        assert completion.tolist() == sorted(completion.tolist(), reverse=True)


def test_a_batch_is_a_sequence_of_its_records() -> None:
    records = (record("a", [1], [2]), record("b", [1], [2]))
    batch = Batch(records, STATS)
    assert len(batch) == 2
    assert batch[1] is records[1]
    assert batch[-1] is records[1]
    assert list(batch) == list(records)
    assert batch.stats is STATS


def rows_of_a_batch() -> Batch:
    first = replace(record("a", [1, 2], [3]), text=" héllo", row={"x": 1, "text": "mine", "mix": 1, "l": [{"b": None}]})
    second = replace(record("b", [1], []), finish_reason="error", error_class="bad_prompt", error="\ud800", reward=0.5)
    return Batch((first, replace(second, row={"x": 2, "mix": "s", "bad": "\ud800"})), STATS)


def test_dataset_has_the_columns_of_shards_and_of_rows() -> None:
    batch = rows_of_a_batch()
    dataset = batch.to_dataset()
    names = [*RECORD_COLUMNS[:2], "x", "input_text", "mix", "l", "bad", *RECORD_COLUMNS[2:]]
    assert dataset.column_names == names
    assert dataset.features["logprobs"].feature.dtype == "float32"
    for row, made in zip(dataset, batch, strict=True):
        values = {name: getattr(made, name) for name in RECORD_COLUMNS} | {"error": made.error and "\ufffd"}
        assert {name: row[name] for name in RECORD_COLUMNS} == values
    assert [dataset[name][:] for name in ("x", "input_text", "mix")] == [[1, 2], ["mine", None], ["1", '"s"']]
    assert dataset["l"][:] == [[{"b": None}], None]
    assert batch.to_pandas()["x"].tolist() == [1, 2]


def test_reasoning_is_a_column_where_there_is_any() -> None:
    batch = Batch((replace(record("a", [1], [2]), reasoning="so", text="then"),), STATS)
    assert batch.to_dataset().column_names[4:6] == ["reasoning", "text"]


def test_dataset_of_an_empty_batch_has_the_columns() -> None:
    assert Batch((), STATS).to_dataset().column_names == list(RECORD_COLUMNS)


def test_columns_that_clash_are_refused() -> None:
    clashing = replace(record("a", [1], [2]), row={"text": 1, "input_text": 2})
    with pytest.raises(InputError, match="input_text"):
        Batch((clashing,), STATS).to_dataset()


def test_records_and_batches_are_shown_in_a_line() -> None:
    batch = Batch((replace(record("a", [1] * 500, [2] * 500), text="word " * 500, reward=0.5),) * 3, STATS)
    assert repr(batch) == "<Batch of 3 records of 1 prompts: 1500 tokens, 0 errors>"
    assert repr(batch[0]).startswith("<Record 'a' sample 0: 500 + 500 tokens, length, reward 0.5, 'word word")
    assert len(repr(batch[0])) < 150
    assert "error: bad_prompt" in repr(rows_of_a_batch()[1])


def test_package_has_a_version() -> None:
    assert rollout.__version__ == version("rollout")
