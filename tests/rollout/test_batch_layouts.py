"""Records as padded tensors: the layouts of TRL's losses, verl and NeMo-RL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from rollout import Batch, Record
from rollout.errors import InputError

PAD = 99


def record(name: str, prompt: list[int], completion: list[int], reason: Any = "stop") -> Record:
    logprobs = [-float(i + 1) for i in range(len(completion))]
    return Record(name, 0, prompt, completion, "", logprobs, [x / 2 for x in logprobs], reason)


def batch(*records: Record) -> Batch:
    return Batch(records, cast(Any, None))


MIXED = batch(
    record("a", [1, 2, 3], [4, 5, PAD]),  # its own tokens may hold the padding id
    record("b", [6], [7], "length"),
    record("c", [8, 9], [], "abort"),
    record("d", [], [], "error"),
)


def test_verl_pads_prompts_on_the_left_and_responses_on_the_right() -> None:
    found = MIXED.to_verl(PAD, prompt_length=4, response_length=5)
    assert found["prompts"].tolist() == [[PAD, 1, 2, 3], [PAD] * 3 + [6], [PAD, PAD, 8, 9], [PAD] * 4]
    assert found["responses"].tolist() == [[4, 5, PAD, PAD, PAD], [7] + [PAD] * 4, [PAD] * 5, [PAD] * 5]
    assert found["response_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert torch.equal(found["input_ids"], torch.cat([found["prompts"], found["responses"]], 1))
    assert found["attention_mask"].tolist()[:2] == [[0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert found["position_ids"].tolist()[:2] == [[0, 0, 1, 2, 3, 4, 5, 5, 5], [0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert found["rollout_log_probs"].tolist()[:2] == [[-0.5, -1.0, -1.5, 0, 0], [-0.5, 0, 0, 0, 0]]
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    assert dtypes.pop("rollout_log_probs") is torch.float32
    assert set(dtypes.values()) == {torch.int64}


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((2, 5), "prompt_length is 2, but the prompt of row 'a', sample 0, has 3 tokens"),
        ((4, 2), "response_length is 2, but the completion of row 'a', sample 0, has 3 tokens"),
    ],
)
def test_verl_is_given_no_longer_rows_than_it_takes(lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MIXED.to_verl(PAD, prompt_length=lengths[0], response_length=lengths[1])


def test_nemo_rl_pads_on_the_right_alone() -> None:
    found = MIXED.to_nemo_rl(PAD)
    assert found["output_ids"].tolist() == [[1, 2, 3, 4, 5, PAD], [6, 7] + [PAD] * 4, [8, 9] + [PAD] * 4, [PAD] * 6]
    assert found["generation_lengths"].tolist() == [3, 1, 0, 0]
    assert found["unpadded_sequence_lengths"].tolist() == [6, 2, 2, 0]
    assert found["logprobs"].tolist()[:2] == [[0, 0, 0, -0.5, -1.0, -1.5], [0, -0.5, 0, 0, 0, 0]]
    assert found["truncated"].tolist() == [False, True, True, True]
    assert [found[name].dtype for name in ("output_ids", "logprobs", "truncated")] == [
        torch.int64,
        torch.float32,
        torch.bool,
    ]


def test_batches_without_records_have_no_rows() -> None:
    verl, nemo = batch().to_verl(PAD, prompt_length=4, response_length=5), batch().to_nemo_rl(PAD)
    assert verl["input_ids"].shape == (0, 9)
    assert verl["rollout_log_probs"].shape == (0, 5)
    assert nemo["generation_lengths"].shape == (0,)


@pytest.mark.parametrize("layout", ["to_padded", "to_nemo_rl", "to_verl"])
@pytest.mark.parametrize("given", ["0", [2, 5], 1.5, True, 2**63])
def test_padding_id_is_one_whole_number(layout: str, given: Any) -> None:
    lengths = {"prompt_length": 4, "response_length": 5} if layout == "to_verl" else {}
    with pytest.raises(InputError, match="but must be one token id, a whole number"):
        getattr(MIXED, layout)(given, **lengths)


@pytest.mark.parametrize("name", ["prompt_length", "response_length"])
@pytest.mark.parametrize("given", [None, "9", 9.0, -1, True])
def test_verl_is_given_whole_numbers_as_lengths(name: str, given: Any) -> None:
    with pytest.raises(InputError, match=r"_length is .*, but must be a whole number of at least 0"):
        MIXED.to_verl(PAD, **{"prompt_length": 9, "response_length": 9} | {name: given})


@pytest.mark.parametrize("layout", ["to_padded", "to_nemo_rl", "to_verl"])
def test_padding_id_of_a_tokenizer_without_one_is_refused(layout: str) -> None:
    lengths = {"prompt_length": 4, "response_length": 5} if layout == "to_verl" else {}
    with pytest.raises(InputError, match="pad_token_id is None"):
        getattr(MIXED, layout)(None, **lengths)


def test_parts_of_a_batch_are_told_by_how_they_ended() -> None:
    found = batch(*MIXED, replace(MIXED[0], row_id="e", finish_reason="abort"))
    assert [record.row_id for record in found.finished] == ["a", "b"]
    assert [record.row_id for record in found.aborted] == ["c", "e"]
