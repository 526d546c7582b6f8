"""What of TRL's private method is known, and the sentence that says what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer

from rollout.errors import InputError
from rollout.integrations.trl import with_rollout
from rollout.integrations.trl.seam import refuse_images, seam_of


class _Base:
    def _generate_and_score_completions(self) -> None: ...


class _Unnamed(_Base):
    def _generate_single_turn(self, prompts: Any) -> Any:
        return prompts


class _Further(_Base):
    def _generate_single_turn(self, prompt_ids: Any, videos: Any) -> Any:
        return prompt_ids


class _Four(_Base):
    def _generate_single_turn(self, prompt_ids: Any) -> Any:
        completion_ids = logprobs = topk = prompt_ids
        return prompt_ids, completion_ids, logprobs, topk


class _Nested(_Base):
    def _generate_single_turn(self, prompt_ids: Any, *, images: Any = None) -> Any:
        def inner() -> int:
            return 1

        completion_ids, logprobs = [inner()], None
        return completion_ids, logprobs


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (SFTTrainer, "has no _generate_single_turn"),
        (_Unnamed, "_Unnamed._generate_single_turn of trl [0-9.]+ does not take prompt_ids"),
        (_Further, "takes videos"),
        (_Four, r"returns \(prompt_ids, completion_ids, logprobs, topk\)"),
    ],
)
def test_an_unknown_trainer_is_refused_in_a_sentence(trainer: type, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        with_rollout(trainer)
    assert str(caught.value).endswith(".")
    assert "docs/trl.md" in str(caught.value)


def test_arguments_are_bound_by_name_and_the_return_is_read() -> None:
    seam = seam_of(_Nested)
    assert seam.with_logprobs
    assert dict(seam.bind([[1]], images=None)) == {"prompt_ids": [[1]], "images": None}
    assert seam_of(GRPOTrainer).with_logprobs
    assert not seam_of(RLOOTrainer).with_logprobs


def test_prompts_with_images_are_refused_but_types_of_text_are_not() -> None:
    refuse_images({"prompt_ids": [[1]], "images": None, "multimodal_fields": {}})
    refuse_images({"multimodal_fields": {"token_type_ids": [[0, 0], [0]], "mm_token_type_ids": torch.zeros(2, 3)}})
    for name, given in {
        "images": {"images": [["an image"], None]},
        "pixel_values": {"multimodal_fields": {"pixel_values": torch.zeros(1, 2)}},
        "mm_token_type_ids": {"multimodal_fields": {"mm_token_type_ids": [[0, 1]]}},
    }.items():
        with pytest.raises(InputError, match=f"have {name}"):
            refuse_images(given)
