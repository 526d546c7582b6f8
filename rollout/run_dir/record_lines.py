"""Records as lines of text: exact, small, and fast to write, which the engine's loop waits for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rollout.records import REASONING, RECORD_COLUMNS, REF_LOGPROBS, Record

# Lists of numbers are stored as base64 of their little-endian bytes: a fifth of the size of decimal text.
_ARRAYS = {"prompt_ids": "<i4", "completion_ids": "<i4", "logprobs": "<f4", "sampler_logprobs": "<f4"}
_OPTIONAL_ARRAYS = {REF_LOGPROBS: "<f4", "weight_versions": "<i4", "end_ids": "<i4"}
"""Those of a reference model, and what a sample needs that goes on later; most records have none."""
_DTYPES = _ARRAYS | _OPTIONAL_ARRAYS
_FIELDS = frozenset({*RECORD_COLUMNS, REASONING})


class SampleKey(NamedTuple):
    """One sample of a run: the id of its input row, and its number."""

    row_id: str
    sample: int


def encode_record(record: Record) -> bytes:
    """Encode a record as text without a line break."""
    under_way = record.finish_reason == "abort"
    names = [REF_LOGPROBS, *(("weight_versions", "end_ids") if under_way else ())]
    values = {name: getattr(record, name) for name in (*RECORD_COLUMNS, REASONING)}
    values |= {name: value for name in names if (value := getattr(record, name))}
    for name in values.keys() & _DTYPES.keys():
        values[name] = base64.b64encode(np.asarray(values[name], dtype=_DTYPES[name]).tobytes()).decode("ascii")
    return json.dumps(values, separators=(",", ":")).encode("ascii")


def decode_record(text: bytes, numbers: Callable[[np.ndarray], Any] = np.ndarray.tolist) -> Record:
    """Decode a record.

    Args:
        numbers: makes a record's lists from arrays; they may stay arrays where a table is made of them.

    Raises:
        ValueError: the text does not hold a complete record.
    """
    values: Any = json.loads(text)
    if not isinstance(values, dict) or values.keys() - _OPTIONAL_ARRAYS.keys() != _FIELDS:
        raise ValueError("the line does not have the fields of a record")
    for name in values.keys() & _DTYPES.keys():
        array = np.frombuffer(base64.b64decode(values[name], validate=True), dtype=_DTYPES[name])
        values[name] = numbers(array)
    return Record(**values)
