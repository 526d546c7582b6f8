"""The columns of records: their types, their values as Arrow arrays, and the names of input columns beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

PREFIX = "input_"
"""Put before the name of an input column that a record has as well."""

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("sample", pa.int32()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("text", pa.string()),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("sampler_logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string()),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("reward", pa.float32()),
        pa.field("seed", pa.int64()),
        pa.field("weight_version", pa.int32()),
        pa.field("attempt", pa.int32()),
    ]
)


#: The columns that each value of `output.logprobs` leaves out.
ABSENT_LOGPROBS = {"both": (), "model": ("sampler_logprobs",), "none": ("logprobs", "sampler_logprobs")}


def as_utf8(text: str) -> str:
    """Return a text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def column_of(records: Sequence[Any], field: pa.Field) -> pa.Array:
    """Return the values of one field of records as an array of its type."""
    values: list[Any] = [getattr(record, field.name) for record in records]
    if pa.types.is_string(field.type):
        return pa.array([as_utf8(value) for value in values], field.type)
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    dtype = field.type.value_type.to_pandas_dtype()
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(value, dtype) for value in values)])
    return pa.ListArray.from_arrays(_offsets(values), pa.array(flat), type=field.type)


def _offsets(values: Iterable[Sequence[Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *(len(value) for value in values)]), pa.int32())
