"""Tokenise prompts ahead of need, while the engine computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from rollout.data.dataset_row import DatasetRow, Prompt
from rollout.errors import PromptError
from rollout.tokenization.prompt import Chat, EncodedPrompt

BLOCK_ROWS = 256
_BLOCK_CHARACTERS = 1 << 20
"""A block ends early with this much text: a token id takes more memory than the characters that it stands for."""


class EncodedRow(NamedTuple):
    """One input row and its prompt as the engine takes it."""

    row: DatasetRow
    prompt: EncodedPrompt | PromptError
    """The error if the row has no prompt, or one that cannot be encoded."""


EncodeRows = Callable[[Iterable[DatasetRow]], Iterator[EncodedRow]]
"""Yields input rows in order, with their encoded prompts."""


class BatchEncoder(Protocol):
    """The part of `PromptEncoder` that encodes blocks."""

    def encode_batch(self, prompts: list[Prompt]) -> list[EncodedPrompt | PromptError]: ...


class PromptReader:
    """Encodes the prompts of input rows.

    A thread takes and tokenises one block of rows ahead. Fast tokenizers work without Python's lock, so the engine goes
    on meanwhile, and memory is bounded by two blocks.
    """

    def __init__(self, encoder: BatchEncoder) -> None:
        self._encoder = encoder

    def encoded(self, rows: Iterable[DatasetRow]) -> Iterator[EncodedRow]:
        """Yield input rows in order with their encoded prompts; the thread iterates over ``rows``."""
        blocks = _blocks(rows)
        with ThreadPoolExecutor(1, thread_name_prefix="prompts") as thread:
            ahead = thread.submit(self._next_block, blocks)
            while block := ahead.result():
                ahead = thread.submit(self._next_block, blocks)
                yield from block

    def _next_block(self, blocks: Iterator[list[DatasetRow]]) -> list[EncodedRow]:
        rows = next(blocks, [])
        found = iter(self._encoder.encode_batch([row.prompt for row in rows if row.prompt is not None]))
        return [
            EncodedRow(row, PromptError(row.error_class, row.error) if row.prompt is None else next(found))
            for row in rows
        ]


def _blocks(rows: Iterable[DatasetRow]) -> Iterator[list[DatasetRow]]:
    block: list[DatasetRow] = []
    size = 0
    for row in rows:
        block.append(row)
        size += _characters(row.prompt)
        if len(block) == BLOCK_ROWS or size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _characters(prompt: Prompt | None) -> int:
    """Return about how many characters a prompt has; for token ids, about how many they stand for."""
    if prompt is None:
        return 0
    if isinstance(prompt, str):
        return len(prompt)
    messages = prompt.messages if isinstance(prompt, Chat) else prompt
    return sum(4 if isinstance(item, int) else len(str(item.get("content"))) for item in messages)
