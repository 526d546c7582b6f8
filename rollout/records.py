"""Records, one per (dataset row, sample), and the batch that ``generate`` returns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from rollout import batch_layouts
from rollout.errors import InputError, shorten
from rollout.record_columns import PREFIX, SCHEMA, as_utf8, column_of

if TYPE_CHECKING:
    import datasets
    import pandas
    import torch

    from rollout.batch_layouts import Padded
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
    ``text``. ``weight_versions`` has one number per completion token, the version of the weights that it was drawn
    with; ``weight_version`` is the last of them. ``ref_logprobs`` are the log-probabilities of a job's reference model.

    ``finish_reason`` is ``abort`` where a stop condition or an interruption ended the sample; `Engine.generate`
    continues such records. One that was still waiting has no tokens: it is no completion. Its ``end_ids`` are ids that
    end it besides the model's end-of-sequence ids and ``stop_token_ids``, such as that of a chat's turn.
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
    weight_versions: list[int] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    """What ``logprobs`` were when the tokens were drawn, if ``exact`` has replaced them; else empty."""

    @property
    def kept_mass(self) -> list[float]:
        """The share of the model's probability that could be drawn, one per completion token; 1 without filters.

        It is the model's probability of the token over the sampler's. Top-k, top-p, min-p and bans (allowed ids, bad
        words, a minimum length, biases of minus infinity) leave the proportions of what they keep, so for them it is
        the mass of the tokens kept. Penalties and finite biases change proportions: then it is that ratio alone, an
        importance weight, which may be above 1.
        """
        own = self.sampled_logprobs or self.logprobs
        return [math.exp(model - sampler) for model, sampler in zip(own, self.sampler_logprobs, strict=True)]

    @property
    def finished(self) -> bool:
        """Whether the completion ended by itself, at a stop or at its length limit."""
        return self.finish_reason in ("stop", "length")

    def __repr__(self) -> str:
        """Describe the record in a line, without its lists of numbers."""
        end = self.finish_reason if not self.error_class else f"{self.finish_reason}: {self.error_class}"
        reward = "" if self.reward is None else f", reward {self.reward:g}"
        return (
            f"<Record {self.row_id!r} sample {self.sample}: {len(self.prompt_ids)} + {len(self.completion_ids)} "
            f"tokens, {end}{reward}, {shorten(self.text, _SHOWN_CHARACTERS)!r}>"
        )


_LIBRARY_ONLY = frozenset({"row", "weight_versions", "end_ids", "sampled_logprobs"})
"""Fields that are no columns of their own."""
REASONING = "reasoning"
"""The column that a run writes before the text if reasoning is split from it."""
REF_LOGPROBS = "ref_logprobs"
"""The column that a run writes behind the log-probabilities if it has a reference model."""
RECORD_COLUMNS = tuple(f.name for f in fields(Record) if f.name not in _LIBRARY_ONLY | {REASONING, REF_LOGPROBS})
"""The columns that a run writes of a record, in their order; the input's columns stand after the first two."""


def record_columns(split_reasoning: bool, reference: bool) -> tuple[str, ...]:
    """Return the names of the columns that a run may write of a record, in no order.

    Args:
        split_reasoning: whether reasoning has a column of its own.
        reference: whether the log-probabilities of a reference model have one.
    """
    return (*RECORD_COLUMNS, *([REASONING] if split_reasoning else ()), *([REF_LOGPROBS] if reference else ()))


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

    @property
    def finished(self) -> tuple[Record, ...]:
        """The records of completions that ended by themselves."""
        return tuple(record for record in self.records if record.finished)

    @property
    def aborted(self) -> tuple[Record, ...]:
        """The records that ``resume`` continues; those of samples that were still waiting have no tokens."""
        return tuple(record for record in self.records if record.finish_reason == "abort")

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
        """Return the records as padded CPU tensors; an error or abort record contributes the tokens it has.

        Raises:
            InputError: ``pad_token_id`` is None, as it is in a tokenizer without one, or no whole number.
        """
        return batch_layouts.to_padded(self.records, pad_token_id)

    def to_verl(self, pad_token_id: int, *, prompt_length: int, response_length: int) -> dict[str, torch.Tensor]:
        """Return the records as CPU tensors with the names, shapes and paddings of a verl ``DataProto``.

        ``prompts`` [B, P] are left-padded, ``responses`` and ``response_mask`` [B, R] right-padded; ``input_ids``,
        ``attention_mask`` and ``position_ids`` [B, P + R] are those of both together. All are int64;
        ``rollout_log_probs`` [B, R] are `Record.sampler_logprobs` in float32, 0 on padding. A record without tokens,
        such as an error, has a row whose ``response_mask`` is 0 everywhere.

        Args:
            pad_token_id: fills the padding.
            prompt_length: P; prompts must not be longer.
            response_length: R; completions must not be longer.

        Raises:
            InputError: a prompt or a completion is longer, or an argument is no whole number.
        """
        return batch_layouts.to_verl(self.records, pad_token_id, prompt_length, response_length)

    def to_nemo_rl(self, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Return the records as CPU tensors with the names, shapes and paddings of NeMo-RL's ``GenerationOutputSpec``.

        ``output_ids`` [B, L] int64 are prompt and completion, right-padded; ``generation_lengths`` and
        ``unpadded_sequence_lengths`` [B] int64 are the lengths of the completion and of both; ``logprobs`` [B, L] are
        `Record.sampler_logprobs` in float32, 0 on prompts and padding; ``truncated`` [B] bool is False where the
        completion ended at a stop. A record without tokens, such as an error, has generation length 0.

        Raises:
            InputError: ``pad_token_id`` is no whole number.
        """
        return batch_layouts.to_nemo_rl(self.records, pad_token_id)


def _column_of_rows(values: list[Any]) -> pa.Array:
    """Return values of any kind as an array; of mixed kinds, or kinds that Arrow does not know, as JSON text."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array([None if value is None else as_utf8(json.dumps(value, default=str)) for value in values])
