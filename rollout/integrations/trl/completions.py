"""Records of a call as TRL takes them: exactly one completion for each prompt, and never an empty one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from rollout.errors import InputError
from rollout.records import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completions:
    """The completions of one turn, in the order of its prompts.

    A row without a completion, e.g. because its prompt is too long, stands as one end-of-sequence token, which TRL
    can carry and which is left out of the loss.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    """Of the full vocabulary after the temperature, as the trainer computes them."""
    sampler_logprobs: list[list[float]]
    """Of what top-k, top-p and min-p left."""
    finish_reasons: list[str]
    failed: list[bool]
    """Rows that stand for an error."""


def completions_of(records: Iterable[Record], eos_token_id: int) -> Completions:
    """Return one completion for each record, and warn of the rows that have none.

    Args:
        records: one for each prompt, in the order of the prompts.
        eos_token_id: what stands for a completion that there is none of.

    Raises:
        InputError: no row has a completion, so that nothing could be trained on.
    """
    records = list(records)
    failed = [not record.completion_ids for record in records]
    if failed and all(failed):
        raise InputError(f"None of a call's {len(records)} prompts has a completion; the first: {_why(records[0])}")
    for row, record in enumerate(records):
        if failed[row]:
            logger.warning(
                "Row %d of %d (%s) has no completion and is left out of the loss: %s",
                *(row, len(records), record.row_id, _why(record)),
            )
    return Completions(
        ids=[record.completion_ids or [eos_token_id] for record in records],
        logprobs=[record.logprobs or [0.0] for record in records],
        sampler_logprobs=[record.sampler_logprobs or [0.0] for record in records],
        finish_reasons=[record.finish_reason for record in records],
        failed=failed,
    )


def _why(record: Record) -> str:
    return record.error or f"it ended with {record.finish_reason!r} before its first token."


def without_failed(completions: Completions) -> tuple[list[list[int]], list[list[float]]]:
    """Return ids and log-probabilities of a later turn, which may be empty: rows that failed end before it."""
    ids, logprobs = completions.ids, completions.logprobs
    return (
        [[] if fails else row for row, fails in zip(ids, completions.failed, strict=True)],
        [[] if fails else row for row, fails in zip(logprobs, completions.failed, strict=True)],
    )
