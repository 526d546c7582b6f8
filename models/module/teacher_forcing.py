"""Teacher forcing: log-probabilities of given completions in plain forwards of a module, as trainers compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray, uploaded
from rollout.models.module.inspect import forward_parameters, output_device


@dataclass(frozen=True, slots=True)
class CompletedRow:
    """A prompt with its completion, and the temperature that divides the logits."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    temperature: float
    """0 is greedy: logits are not divided."""


@dataclass(frozen=True, slots=True)
class PaddedShape:
    """Widths of a micro-batch: prompts are padded on the left, completions on the right, as TRL pads them."""

    prompt: int
    completion: int

    @classmethod
    def of(cls, rows: Sequence[CompletedRow]) -> PaddedShape:
        """Return the smallest shape that holds the rows."""
        return cls(max(len(row.prompt_ids) for row in rows), max(len(row.completion_ids) for row in rows))


def teacher_forced_logprobs(
    model: nn.Module,
    rows: Sequence[CompletedRow],
    shape: PaddedShape,
    *,
    columns: IntArray | None = None,
    pad_id: int = 0,
    position_ids: bool = True,
) -> torch.Tensor:
    """Return ``log_softmax(logits / temperature)`` of completion tokens, from one forward of the module as it is.

    The caller has switched the module to eval mode, without gradients; its autocast holds.

    Args:
        model: a transformers causal LM, wrapped or not.
        rows: B rows that fit into ``shape``.
        shape: widths of prompts and completions.
        columns: [C] positions in the completions; None: all of the shape's.
        pad_id: stands where rows are padded.
        position_ids: count positions from each row's first token. Without, the module makes positions of its own, as
            it does for TRL; in models whose positions are absolute, padding then changes the numbers.

    Returns:
        [B, C] float32 on the CPU; 0 behind a row's last token.
    """
    wanted = np.arange(shape.completion) if columns is None else columns
    ids = np.full((len(rows), shape.prompt + shape.completion), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        start, end = shape.prompt - len(row.prompt_ids), shape.prompt + len(row.completion_ids)
        ids[i, start : shape.prompt] = row.prompt_ids
        ids[i, shape.prompt : end] = row.completion_ids
        mask[i, start:end] = 1
    device, known = output_device(model), forward_parameters(model)
    arguments: dict[str, Any] = {"input_ids": uploaded(ids, device), "attention_mask": uploaded(mask, device)}
    if "use_cache" in known:
        arguments["use_cache"] = False
    if position_ids and "position_ids" in known:
        arguments["position_ids"] = uploaded((mask.cumsum(1) - 1).clip(min=0), device)
    # The logits that predict a completion's tokens begin one position before it.
    at: slice | list[int] = slice(shape.prompt - 1, -1)
    if columns is not None:
        at = (columns + shape.prompt - 1).tolist()
    if "logits_to_keep" in known:
        # A list, since accelerate would move a tensor to the device of the first layer.
        arguments["logits_to_keep"] = shape.completion + 1 if columns is None else at
        at = slice(None, -1) if columns is None else slice(None)
    logits: torch.Tensor = model(**arguments).logits[:, at]
    tokens = torch.from_numpy(ids[:, shape.prompt + wanted])
    inside = torch.from_numpy(mask[:, shape.prompt + wanted])
    chosen = [
        (row_logits.float() / (row.temperature or 1.0)).log_softmax(-1).gather(1, own.to(logits.device)[:, None])[:, 0]
        for row, row_logits, own in zip(rows, logits, tokens, strict=True)
    ]
    return torch.stack(chosen).cpu() * inside
