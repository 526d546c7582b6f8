"""The prompt reader: rows in order with their encoded prompts or errors, read one block ahead."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from rollout.data.dataset_row import DatasetRow, Prompt
from rollout.errors import InputError, PromptError
from rollout.job.prompt_reader import BLOCK_ROWS, PromptReader
from rollout.tokenization.prompt import EncodedPrompt

ROWS = 5 * BLOCK_ROWS + 7


@dataclass
class ToyRows:
    """Texts of one length; every third row has no prompt. Counts the rows that were read."""

    length: int = 10
    read: int = 0
    fail_at: int | None = None

    def rows(self, start: int, stop: int) -> Iterator[DatasetRow]:
        for index in range(start, stop):
            if index == self.fail_at:
                raise InputError("row cannot be read")
            self.read += 1
            empty = index % 3 == 0
            row = DatasetRow(index, f"row-{index}", None if empty else f"{index:{self.length}}", {})
            yield DatasetRow(index, row.row_id, None, {}, "bad_prompt", "It is null.") if empty else row


@dataclass
class ToyEncoder:
    """Encodes a text as its number, and refuses those that end in 5."""

    batches: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def encode_batch(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt | PromptError]:
        self.batches.append(len(prompts))
        self.threads.add(threading.get_ident())
        texts = [str(prompt) for prompt in prompts]
        return [PromptError("bad_prompt", text) if text[-1] == "5" else EncodedPrompt([int(text)]) for text in texts]


def test_rows_come_in_order_with_their_prompts_or_errors() -> None:
    found = list(PromptReader(ToyEncoder()).encoded(ToyRows().rows(2, ROWS)))
    assert [entry.row.index for entry in found] == list(range(2, ROWS))
    for row, prompt in found:
        if row.index % 3 == 0:
            assert isinstance(prompt, PromptError)
            assert str(prompt) == "It is null."
        elif row.index % 10 == 5:
            assert isinstance(prompt, PromptError)
        else:
            assert prompt == EncodedPrompt([row.index])


def test_one_block_is_read_ahead_by_another_thread() -> None:
    rows, encoder = ToyRows(), ToyEncoder()
    reader = PromptReader(encoder).encoded(rows.rows(0, ROWS))
    next(reader)
    for _ in range(BLOCK_ROWS - 1):
        next(reader)
    # The second block is on its way, and the third is not begun before the second is taken.
    assert rows.read <= 2 * BLOCK_ROWS
    assert isinstance(reader, Generator)
    reader.close()
    assert threading.get_ident() not in encoder.threads
    assert not any(thread.name.startswith("prompts") for thread in threading.enumerate())


def test_blocks_of_long_prompts_are_short() -> None:
    encoder = ToyEncoder()
    list(PromptReader(encoder).encoded(ToyRows(length=1 << 18).rows(0, 20)))
    assert max(encoder.batches) <= 4


def test_no_rows_are_no_error() -> None:
    assert list(PromptReader(ToyEncoder()).encoded([])) == []


def test_error_of_the_dataset_is_raised_where_it_is_read() -> None:
    reader = PromptReader(ToyEncoder()).encoded(ToyRows(fail_at=BLOCK_ROWS + 1).rows(0, ROWS))
    assert len([next(reader) for _ in range(BLOCK_ROWS)]) == BLOCK_ROWS
    with pytest.raises(InputError, match="row cannot be read"):
        next(reader)
