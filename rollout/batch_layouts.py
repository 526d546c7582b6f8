"""Records as padded tensors, in the layouts that trainers take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard

from rollout.errors import Check, InputError, check_all, shorten

if TYPE_CHECKING:
    import torch


class Sample(Protocol):
    """What the layouts take of a `rollout.Record`."""

    @property
    def row_id(self) -> str: ...
    @property
    def sample(self) -> int: ...
    @property
    def prompt_ids(self) -> list[int]: ...
    @property
    def completion_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]: ...
    @property
    def sampler_logprobs(self) -> list[float]: ...
    @property
    def finish_reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch as tensors: prompts left-padded to P, completions right-padded to R."""

    prompt_ids: torch.Tensor
    """[B, P] int64."""
    prompt_mask: torch.Tensor
    """[B, P] int64, 1 on prompt tokens."""
    completion_ids: torch.Tensor
    """[B, R] int64."""
    completion_mask: torch.Tensor
    """[B, R] int64, 1 on completion tokens, including the end-of-sequence id."""
    logprobs: torch.Tensor
    """[B, R] float32, 0 on padding."""
    sampler_logprobs: torch.Tensor
    """[B, R] float32, 0 on padding."""


def to_padded(samples: Sequence[Sample], pad_token_id: int) -> Padded:
    """See `rollout.Batch.to_padded`."""
    _check_pad(pad_token_id)
    prompts = [sample.prompt_ids for sample in samples]
    completions = [sample.completion_ids for sample in samples]
    return Padded(
        prompt_ids=_ids(prompts, pad_token_id, "left"),
        prompt_mask=_mask(prompts, "left"),
        completion_ids=_ids(completions, pad_token_id, "right"),
        completion_mask=_mask(completions, "right"),
        logprobs=_numbers([sample.logprobs for sample in samples]),
        sampler_logprobs=_numbers([sample.sampler_logprobs for sample in samples]),
    )


def to_verl(
    samples: Sequence[Sample], pad_token_id: int, prompt_length: int, response_length: int
) -> dict[str, torch.Tensor]:
    """See `rollout.Batch.to_verl`."""
    import torch

    _check_pad(pad_token_id)
    _check_length("prompt_length", prompt_length)
    _check_length("response_length", response_length)
    for sample in samples:
        _check_fits(sample, "prompt", len(sample.prompt_ids), "prompt_length", prompt_length)
        _check_fits(sample, "completion", len(sample.completion_ids), "response_length", response_length)
    prompts = [sample.prompt_ids for sample in samples]
    completions = [sample.completion_ids for sample in samples]
    prompt_ids = _ids(prompts, pad_token_id, "left", prompt_length)
    responses = _ids(completions, pad_token_id, "right", response_length)
    response_mask = _mask(completions, "right", response_length)
    attention_mask = torch.cat([_mask(prompts, "left", prompt_length), response_mask], dim=1)
    return {
        "prompts": prompt_ids,
        "responses": responses,
        "response_mask": response_mask,
        "input_ids": torch.cat([prompt_ids, responses], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "rollout_log_probs": _numbers([sample.sampler_logprobs for sample in samples], response_length),
    }


def to_nemo_rl(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """See `rollout.Batch.to_nemo_rl`."""
    import torch

    _check_pad(pad_token_id)
    sequences = [[*sample.prompt_ids, *sample.completion_ids] for sample in samples]
    return {
        "output_ids": _ids(sequences, pad_token_id, "right"),
        "generation_lengths": torch.tensor([len(sample.completion_ids) for sample in samples], dtype=torch.int64),
        "unpadded_sequence_lengths": torch.tensor([len(ids) for ids in sequences], dtype=torch.int64),
        "logprobs": _numbers([[0.0] * len(sample.prompt_ids) + sample.sampler_logprobs for sample in samples]),
        "truncated": torch.tensor([sample.finish_reason != "stop" for sample in samples], dtype=torch.bool),
    }


def _check_pad(pad_token_id: object) -> None:
    if pad_token_id is None:
        raise InputError("pad_token_id is None: give any id, e.g. eos_token_id; the masks and lengths leave it out.")
    check_all([Check("pad_token_id", pad_token_id, _is_whole(pad_token_id), "one token id, a whole number")])


def _check_length(name: str, given: object) -> None:
    check_all([Check(name, given, _is_whole(given) and given >= 0, "a whole number of at least 0")])


def _is_whole(given: object) -> TypeGuard[int]:
    return not isinstance(given, bool) and isinstance(given, Integral) and -(2**63) <= int(given) < 2**63


def _check_fits(sample: Sample, what: str, tokens: int, name: str, most: int) -> None:
    if tokens > most:
        raise InputError(
            f"{name} is {most}, but the {what} of row {shorten(sample.row_id, 60)!r}, sample {sample.sample}, has "
            f"{tokens} tokens: give at least as many."
        )


def _ids(
    sequences: Sequence[list[int]], pad_token_id: int, side: Literal["left", "right"], width: int | None = None
) -> torch.Tensor:
    import torch

    return _padded(sequences, pad_token_id, torch.int64, side, width)


def _mask(sequences: Sequence[list[int]], side: Literal["left", "right"], width: int | None = None) -> torch.Tensor:
    import torch

    return _padded([[1] * len(ids) for ids in sequences], 0, torch.int64, side, width)


def _numbers(sequences: Sequence[list[float]], width: int | None = None) -> torch.Tensor:
    import torch

    return _padded(sequences, 0.0, torch.float32, "right", width)


def _padded(
    sequences: Sequence[list[int]] | Sequence[list[float]],
    fill: float,
    dtype: torch.dtype,
    side: Literal["left", "right"],
    width: int | None,
) -> torch.Tensor:
    """Return [B, width] of sequences padded on one side; without a width, as wide as the longest."""
    import torch

    if not sequences:
        return torch.zeros(0, width or 0, dtype=dtype)
    tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
    missing = 0 if width is None else width - padded.shape[1]
    return torch.nn.functional.pad(padded, (missing, 0) if side == "left" else (0, missing), value=fill)
