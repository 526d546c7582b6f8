"""Measure how far sampled log-probabilities are from the module's own forward, on a few finished rows of a call."""

from __future__ import annotations

import hashlib
import logging
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.engine.live_module import LiveModule
from rollout.models.device import is_out_of_memory
from rollout.models.errors import clause
from rollout.models.module.inspect import has_relative_positions, vocabulary_size
from rollout.models.module.teacher_forcing import CompletedRow, PaddedShape, teacher_forced_logprobs
from rollout.records import Record
from rollout.requests import Request
from rollout.stats import Parity

logger = logging.getLogger(__name__)

_SHARE = 0.02
"""Share of calls' work that the comparisons may add."""
_STEP_TOKENS = 64
"""Tokens of a plain forward that take about as long as a decode step; a forward of few tokens takes as long, since it
reads all weights as well."""
_LEAST_TOKENS = 256
"""What a comparison may cost at least: two forwards of 64 tokens."""
_MOST_TOKENS = 1 << 14
"""Most that one comparison costs, and that calls too small for one save for a later call."""
_MOST_ROWS = 8
_SHORTEST = 8
"""A completion is cut to no fewer tokens than these to fit."""
_EXTRA_PADDING = 8
"""Padding of a row that is computed alone, so that it differs from the other shape."""
_MOST_LOGITS = 1 << 25
"""Most logits of one forward, 128 MB in float32; in longer completions some positions are compared."""


@dataclass(frozen=True, slots=True)
class _KeptRow:
    """A finished row that may be compared."""

    rank: bytes
    """Keyed hash by which rows are chosen, the same in every run."""
    row: CompletedRow
    logprobs: NDArray[np.float32]
    """[completion] as sampled."""


class ParitySample:
    """Keeps a few finished rows of one call, chosen by a hash of seed, row id and sample."""

    def __init__(self) -> None:
        self._rows: list[_KeptRow] = []
        self._version: int | None = None

    def add(self, request: Request, record: Record) -> None:
        """Offer a finished row; rows with tokens of earlier weights, or of an earlier call, are dropped."""
        if not record.completion_ids or record.finish_reason == "error":
            return
        before = request.resumed.get(record.sample)
        if before is not None and before.completion_ids:
            return  # versions count anew in each process, so equal ones may be of other weights
        if record.weight_versions.count(record.weight_version) != len(record.weight_versions):
            return
        if record.weight_version != self._version:
            self._rows.clear()
            self._version = record.weight_version
        key = f"{record.seed}:{record.row_id}:{record.sample}".encode()
        rank = hashlib.blake2b(key, digest_size=8).digest()
        if len(self._rows) == _MOST_ROWS and rank > self._rows[-1].rank:
            return
        row = CompletedRow(record.prompt_ids, record.completion_ids, request.params.temperature)
        kept = _KeptRow(rank, row, np.array(record.logprobs, np.float32))
        insort(self._rows, kept, key=lambda each: each.rank)
        del self._rows[_MOST_ROWS:]

    def chosen(self, tokens: int, weight_version: int) -> list[_KeptRow]:
        """Return rows whose forwards cost at most ``tokens``; the first row is cut if it costs more.

        Args:
            tokens: as `_cost` counts them.
            weight_version: of the weights in force; rows of others cannot be compared.
        """
        chosen: list[_KeptRow] = []
        for kept in self._rows if self._version == weight_version else ():
            if _cost([*chosen, kept]) <= tokens:
                chosen.append(kept)
            elif not chosen and (length := _fitting_length(kept, tokens)) >= _SHORTEST:
                row = replace(kept.row, completion_ids=kept.row.completion_ids[:length])
                chosen.append(replace(kept, row=row, logprobs=kept.logprobs[:length]))
        return chosen


def _cost(rows: Sequence[_KeptRow]) -> int:
    """Return what the forwards of the rows cost: tokens, padding included, and a step for each forward."""
    alone = sum(len(kept.row.prompt_ids) + len(kept.row.completion_ids) for kept in rows)
    shape = PaddedShape.of([kept.row for kept in rows])
    padded = len(rows) * (_EXTRA_PADDING + shape.prompt + shape.completion)
    return alone + padded + (len(rows) + 1) * _STEP_TOKENS


def _fitting_length(kept: _KeptRow, tokens: int) -> int:
    """Return to how many tokens of its completion a row that has no company must be cut."""
    return (tokens - _EXTRA_PADDING) // 2 - _STEP_TOKENS - len(kept.row.prompt_ids)


class ParityMeter:
    """Compares rows of each call with plain forwards of the module, within a small share of the call's work.

    A call that is too small leaves its share to later calls, and has the figures of the last comparison. The first is
    made at once. What is measured depends on counts alone, so that all ranks measure the same.

    Args:
        module: the live module; its plain forward is the caller's own: no patch, its own attention, its autocast.
        pad_id: stands where rows are padded.
    """

    def __init__(self, module: LiveModule, pad_id: int) -> None:
        self._module = module
        self._pad_id = pad_id
        self._saved = _MOST_TOKENS
        self._last: Parity | None = None
        self._said = False

    def measure(self, sample: ParitySample, *, steps: int, tokens: int) -> Parity | None:
        """Return the last comparison, of this call or an earlier one; None if there is none, or if the forward fails.

        Args:
            sample: rows of the call.
            steps: of the call.
            tokens: that the call has prefilled and sampled.
        """
        share = int(_SHARE * (steps * _STEP_TOKENS + tokens))
        self._saved = min(_MOST_TOKENS, self._saved + share)
        chosen = self._affordable(sample, share)
        if not chosen:
            if self._last is not None:
                self._last = replace(self._last, calls_ago=self._last.calls_ago + 1)
            return self._last
        self._saved = 0 if self._last is None else self._saved - _cost(chosen)
        self._last = None
        try:
            self._last = self._compare(chosen)
        except Exception as error:  # whatever a trainer's own forward does, the call's records are finished
            if is_out_of_memory(error) and not self._module.sync.alone:
                raise  # the other ranks wait in this forward
            self._say(error)
        return self._last

    def _affordable(self, sample: ParitySample, share: int) -> list[_KeptRow]:
        """Return rows for what this call may spend, or one for what calls have saved."""
        if self._saved < _LEAST_TOKENS:
            return []
        version = self._module.version.number
        return sample.chosen(max(_LEAST_TOKENS, share), version) or sample.chosen(self._saved, version)[:1]

    def _compare(self, chosen: Sequence[_KeptRow]) -> Parity:
        rows = [kept.row for kept in chosen]
        shape = PaddedShape.of(rows)
        most = max(1, _MOST_LOGITS // (len(rows) * vocabulary_size(self._module.model)))
        columns = np.arange(shape.completion)
        if shape.completion > most:
            columns = np.unique(np.linspace(0, shape.completion - 1, most).astype(np.int64))
        with self._module.borrowed_plainly():
            together = self._forward(rows, shape, columns)
            alone = [self._alone(row, columns[columns < len(row.completion_ids)]) for row in rows]
        deltas, own = [], []
        for kept, padded, single in zip(chosen, together, alone, strict=True):
            inside = columns[columns < len(kept.row.completion_ids)]
            padded = padded[: len(inside)]
            deltas.append(np.abs(kept.logprobs[inside] - padded.numpy()))
            own.append(np.abs((single[0] - padded).numpy()))
        return Parity.of(len(rows), np.concatenate(deltas), np.concatenate(own))

    def _forward(self, rows: Sequence[CompletedRow], shape: PaddedShape, columns: IntArray) -> torch.Tensor:
        return teacher_forced_logprobs(self._module.model, rows, shape, columns=columns, pad_id=self._pad_id)

    def _alone(self, row: CompletedRow, columns: IntArray) -> torch.Tensor:
        """Compute a row in its other shape: alone, behind padding that shifts its positions, as in TRL."""
        shape = PaddedShape.of([row])
        return teacher_forced_logprobs(
            self._module.model,
            [row],
            replace(shape, prompt=shape.prompt + _EXTRA_PADDING),
            columns=columns,
            pad_id=self._pad_id,
            position_ids=not has_relative_positions(self._module.model),
        )

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            logger.warning("Calls have no parity figures, since the model's own forward fails: %s.", clause(error))
