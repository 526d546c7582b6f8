"""Records, one per (dataset row, sample), and the batch that ``generate`` returns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from rollout.errors import InputError, shorten
from rollout.record_columns import PREFIX, SCHEMA, as_utf8, column_of

if TYPE_CHECKING:
    import datasets
    import pandas
    import torch

    from rollout.stats import Stats

FinishReason = Literal["stop", "length", "abort", "error"]


_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One completion, or the error that prevented it.

    ``logprobs`` has one number per completion token: ``log_softmax(logits / temperature)`` over the full vocabulary
    in fp32 (raw logits when greedy). ``sampler_logprobs`` is the same after top-k, top-p and min-p renormalisation.
    ``completion_ids`` keeps the end-of-sequence id. ``error_class`` and ``error`` are empty unless ``finish_reason``
    is ``error`` or a reward function failed (``reward_failed``). ``row`` holds the other columns of a prompt that was
    given as a mapping. ``reasoning`` is what stood between the model's think tokens, if the engine splits it from
    ``text``.
    """

    row_id: str
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    logprobs: list[float]
    sampler_logprobs: list[float]
    finish_reason: FinishReason
    error_class: str = ""
    error: str = ""
    reward: float | None = None
    seed: int = 0
    weight_version: int = 0
    attempt: int = 0
    reasoning: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Describe the record in a line, without its lists of numbers."""
        end = self.finish_reason if not self.error_class else f"{self.finish_reason}: {self.error_class}"
        reward = "" if self.reward is None else f", reward {self.reward:g}"
        return (
            f"<Record {self.row_id!r} sample {self.sample}: {len(self.prompt_ids)} + {len(self.completion_ids)} "
            f"tokens, {end}{reward}, {shorten(self.text, _SHOWN_CHARACTERS)!r}>"
        )


REASONING = "reasoning"
"""The column that a run writes before the text if reasoning is split from it."""
RECORD_COLUMNS = tuple(f.name for f in fields(Record) if f.name not in (REASONING, "row"))
"""The columns that a run writes of a record, in their order; the input's columns stand after the first two."""


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


@dataclass(frozen=True, slots=True, repr=False)
class Batch:
    """The records of one call, in prompt order, then sample order."""

    records: tuple[Record, ...]
    stats: Stats

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        """Describe the batch in a line."""
        rows = len({record.row_id for record in self.records})
        tokens = sum(len(record.completion_ids) for record in self.records)
        errors = sum(bool(record.error_class) for record in self.records)
        return f"<Batch of {len(self)} records of {rows} prompts: {tokens} tokens, {errors} errors>"

    def to_dataset(self) -> datasets.Dataset:
        """Return the records as a dataset: the columns of a job's shards, with those of `Record.row`.

        A column of a row that a record has gets the prefix ``input_``. Values of mixed types become JSON text.
        ``reasoning`` is a column if a record has any.

        Raises:
            InputError: a column's name with the prefix is another column's.
        """
        import datasets

        own = list(SCHEMA)
        if any(record.reasoning for record in self.records):
            own.insert(SCHEMA.get_field_index("text"), pa.field(REASONING, pa.string()))
        taken = {column.name for column in own}
        names = {name: f"{PREFIX}{name}" if name in taken else name for name in self._row_columns()}
        if clash := names.keys() & {new for old, new in names.items() if new != old}:
            raise InputError(
                f"The rows of the prompts have a column {clash.pop()} and one that would be renamed to it."
            )
        rows = {new: [record.row.get(old) for record in self.records] for old, new in names.items()}
        columns = [
            *((field.name, column_of(self.records, field)) for field in own[:2]),
            *((name, _column_of_rows(values)) for name, values in rows.items()),
            *((field.name, column_of(self.records, field)) for field in own[2:]),
        ]
        return datasets.Dataset(pa.table(dict(columns)))

    def to_pandas(self) -> pandas.DataFrame:
        """Return the columns of `to_dataset` as a table of pandas."""
        return self.to_dataset().to_pandas()

    def _row_columns(self) -> Iterable[str]:
        return dict.fromkeys(name for record in self.records for name in record.row)

    def to_padded(self, pad_token_id: int) -> Padded:
        """Return the records as padded CPU tensors; an error record contributes the tokens it has.

        Raises:
            InputError: ``pad_token_id`` is None, as it is in a tokenizer without one.
        """
        if pad_token_id is None:
            raise InputError("pad_token_id is None: give any id, e.g. eos_token_id; the masks leave it out.")
        import torch

        prompts = [record.prompt_ids for record in self.records]
        completions = [record.completion_ids for record in self.records]

        def padded(
            sequences: list[list[int]] | list[list[float]],
            fill: float,
            dtype: torch.dtype,
            side: Literal["left", "right"],
        ) -> torch.Tensor:
            tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
            if not tensors:
                return torch.zeros(0, 0, dtype=dtype)
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)

        return Padded(
            prompt_ids=padded(prompts, pad_token_id, torch.int64, "left"),
            prompt_mask=padded([[1] * len(ids) for ids in prompts], 0, torch.int64, "left"),
            completion_ids=padded(completions, pad_token_id, torch.int64, "right"),
            completion_mask=padded([[1] * len(ids) for ids in completions], 0, torch.int64, "right"),
            logprobs=padded([record.logprobs for record in self.records], 0.0, torch.float32, "right"),
            sampler_logprobs=padded([record.sampler_logprobs for record in self.records], 0.0, torch.float32, "right"),
        )


def _column_of_rows(values: list[Any]) -> pa.Array:
    """Return values of any kind as an array; of mixed kinds, or kinds that Arrow does not know, as JSON text."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array([None if value is None else as_utf8(json.dumps(value, default=str)) for value in values])
