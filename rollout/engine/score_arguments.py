"""The forms in which a caller may give pairs of a prompt and a completion to score."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rollout.batcher.types import IntArray
from rollout.engine.prompt_arguments import check_prompt, given_prompts
from rollout.engine.scoring_sequences import Pair
from rollout.errors import InputError, PromptError, shorten
from rollout.records import Record
from rollout.tokenization.prompt_encoder import PromptEncoder

_NO_IDS: IntArray = np.zeros(0, np.int64)


def given_pairs(prompts: Any, completions: Any, temperature: Any, encoder: PromptEncoder) -> list[Pair]:
    """Return the pairs of a call; one that cannot be read has an error.

    Args:
        prompts: in any form of `given_prompts`; without ``completions``, records.
        completions: token ids or a text for each prompt.
        temperature: of the model's distribution; one for all pairs, or one for each.
        encoder: turns prompts and texts into token ids.

    Raises:
        InputError: an argument has no form that can be read, is padded, or lists differ in length.
    """
    if completions is None:
        records = _records(prompts)
        temperatures = _temperatures(temperature, len(records))
        return [_of_record(record, t) for record, t in zip(records, temperatures, strict=True)]
    _refuse_padding("prompt_ids", prompts, encoder.pad_id)
    _refuse_padding("completion_ids", completions, encoder.pad_id)
    given = list(given_prompts(prompts))
    listed = _completions(completions)
    if len(given) != len(listed):
        raise InputError(f"completion_ids has {len(listed)} entries, but there are {len(given)} prompts.")
    pairs = []
    for prompt, completion, t in zip(given, listed, _temperatures(temperature, len(given)), strict=True):
        try:
            check_prompt(prompt.prompt)
            prompt_ids = _ids(encoder.encode(prompt.with_template_columns()).token_ids, "prompt")
            pairs.append(Pair(prompt_ids, _completion_ids(completion, encoder.encode_completion), t))
        except PromptError as error:
            pairs.append(Pair(_NO_IDS, _NO_IDS, t, error.error_class, str(error)))
    return pairs


def _refuse_padding(name: str, given: Any, pad_id: int | None) -> None:
    """Refuse an array with rows that begin or end with the padding id; without a mask, padding cannot be told."""
    if pad_id is None or len(getattr(given, "shape", ())) != 2 or not hasattr(given, "tolist"):
        return
    if any(row and pad_id in (row[0], row[-1]) for row in given.tolist()):
        raise InputError(
            f"Rows of {name} begin or end with the padding id {pad_id}: give a list of rows without padding, e.g. "
            "[row[kept] for row, kept in zip(ids, mask.bool())]."
        )


def _records(given: Any) -> list[Record]:
    """Return the records of a batch, or a list of them."""
    records = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(record, Record) for record in records):
        raise InputError("completion_ids is missing: only records hold their own completions.")
    return records


def _of_record(record: Record, temperature: float) -> Pair:
    prompt_ids, completion_ids = (np.array(ids, np.int64) for ids in (record.prompt_ids, record.completion_ids))
    if record.finish_reason == "error":
        return Pair(prompt_ids, completion_ids, temperature, record.error_class, record.error)
    return Pair(prompt_ids, completion_ids, temperature)


def _temperatures(given: Any, count: int) -> list[float]:
    """Return the temperature of each pair."""
    given = given.tolist() if hasattr(given, "tolist") else given
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if len(values) != count:
        raise InputError(f"temperature has {len(values)} entries, but there are {count} pairs.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InputError(f"temperature is {shorten(repr(value), 60)}, but must be a finite number of at least 0.")
    return [float(value) for value in values]


def _completions(given: Any) -> list[Any]:
    """Return one completion per entry; a text, or a list of numbers, is a single one."""
    if isinstance(given, str):
        return [given]
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Iterable):
        raise InputError(
            f"completion_ids is {shorten(repr(given), 60)}, but must be lists of token ids or texts, one per prompt."
        )
    items = list(given)
    return [items] if items and all(hasattr(item, "__index__") and not _has_length(item) for item in items) else items


def _has_length(item: Any) -> bool:
    """Return whether a value has several elements: tensors have ``__index__`` as well."""
    return bool(getattr(item, "shape", ()))


def _completion_ids(given: Any, encode: Callable[[str], list[int]]) -> IntArray:
    if isinstance(given, str):
        return np.array(encode(given), np.int64)
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise PromptError(
            "bad_completion", f"The completion {shorten(repr(given), 80)} is neither token ids nor a text."
        )
    return _ids(given, "completion")


def _ids(given: Sequence[Any], name: str) -> IntArray:
    try:
        if any(isinstance(item, bool) for item in given):
            raise TypeError("'bool' is no token id")
        return np.array([operator.index(item) for item in given], np.int64)
    except (TypeError, OverflowError) as error:
        raise PromptError(f"bad_{name}", f"The {name} holds other than token ids: {error}.") from error
