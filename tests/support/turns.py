"""Turns of a conversation that tests hold in sessions."""

from __future__ import annotations

from rollout import SamplingParams
from rollout.records import Batch, Record

PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)


def text_of(record: Record) -> list[int]:
    return record.prompt_ids + record.completion_ids


def next_turn(batch: Batch, tool: int = 7) -> list[list[int]]:
    return [text_of(record) + [5 + i for i in range(tool)] for record in batch]


def ids_of(batch: Batch) -> list[list[int]]:
    return [record.completion_ids for record in batch]
