"""Rescore the completions of a call in a trainer's own micro-batch shape, so that a trainer gets its own numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch

from rollout.engine.kv_memory import IdleMemory
from rollout.engine.live_module import LiveModule
from rollout.errors import InputError, shorten
from rollout.models.device import is_out_of_memory
from rollout.models.module.inspect import has_relative_positions
from rollout.models.module.teacher_forcing import CompletedRow, PaddedShape, teacher_forced_logprobs
from rollout.records import Record
from rollout.requests import PromptKey, Request

logger = logging.getLogger(__name__)


class ExactPass:
    """Replaces log-probabilities by those of plain forwards over padded micro-batches, in record order.

    All rows are padded to the longest prompt and the longest completion, as TRL pads them, and the module is called
    with ids and attention mask alone; models of absolute positions get position ids as well. The log-probabilities that
    the engine sampled with stay in the records.

    Args:
        module: the live module.
        pad_id: stands where rows are padded.
        exact: rows of a micro-batch; True: all rows in one; False: nothing is replaced.
        sessions: what open sessions keep, which makes way.

    Raises:
        InputError: ``exact`` is something else.
    """

    def __init__(self, module: LiveModule, pad_id: int, exact: Any, sessions: IdleMemory) -> None:
        is_flag = type(exact) is bool
        if not is_flag and (not isinstance(exact, Integral) or int(exact) < 1):
            raise InputError(
                f"exact is {shorten(repr(exact), 60)}, but must be True, False or the number of rows of a micro-batch."
            )
        self._module = module
        self._pad_id = pad_id
        self._sessions = sessions
        self._wanted = bool(exact)
        # Without position ids, as TRL calls models, padding shifts positions: only relative ones bear that.
        self._absolute = self._wanted and not has_relative_positions(module.model)
        self._rows = None if is_flag else int(exact)
        self._temperatures: dict[tuple[PromptKey, int], float] = {}

    def note(self, request: Request, record: Record) -> None:
        """Remember the temperature of a record of the call."""
        if self._wanted and record.completion_ids:
            self._temperatures[_key(record)] = request.params.temperature

    def applied(self, records: Sequence[Record]) -> list[Record]:
        """Return the records, those of the call that have tokens with the module's own log-probabilities.

        If a micro-batch does not fit into memory, what sessions keep is freed. If that is not enough, smaller ones are
        taken, which is said: their shape is another.
        """
        replaced = list(records)
        at = [i for i, record in enumerate(records) if _key(record) in self._temperatures]
        if not at:
            return replaced
        rows = [
            CompletedRow(records[i].prompt_ids, records[i].completion_ids, self._temperatures[_key(records[i])])
            for i in at
        ]
        if self._absolute and any(len(row.prompt_ids) != len(rows[0].prompt_ids) for row in rows):
            logger.warning(
                "exact: positions of this model are absolute, and are counted from each row's first token; a trainer "
                "that passes no position ids, as TRL, may compute rows with padding in front at other positions."
            )
        shape, size, start = PaddedShape.of(rows), min(self._rows or len(rows), len(rows)), 0
        while start < len(rows):
            part = rows[start : start + size]
            try:
                logprobs = self._forward(part, shape)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._module.sync.alone:
                    raise
                if self._sessions.release():
                    continue
                if size == 1:
                    raise
                logger.warning("exact: a micro-batch of %d rows does not fit into memory; taking half of them.", size)
                size = (size + 1) // 2
                continue
            for i, row, numbers in zip(at[start : start + size], part, logprobs, strict=True):
                own = numbers[: len(row.completion_ids)].tolist()
                replaced[i] = replace(records[i], logprobs=own, sampled_logprobs=records[i].logprobs)
            start += size
        return replaced

    def _forward(self, rows: Sequence[CompletedRow], shape: PaddedShape) -> torch.Tensor:
        with self._module.gathered(), self._module.borrowed_plainly():
            return teacher_forced_logprobs(
                self._module.model, rows, shape, pad_id=self._pad_id, position_ids=self._absolute
            )


def _key(record: Record) -> tuple[PromptKey, int]:
    return PromptKey(record.seed, record.row_id), record.sample
