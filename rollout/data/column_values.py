"""Values of a column: as Arrow data that holds them unchanged, as Python values again, and the type they have."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

JSON = pa.json_()
"""Storage of values that no one Arrow type holds unchanged: JSON text."""
MIXED = JSON
"""Type of a column whose values have several types."""
_PLAIN: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_MOST_FIELDS = 512
"""Beyond this number of fields, objects are maps with keys of their own rather than records."""
_SURROGATES = re.compile("[\ud800-\udfff]")


def to_arrow(values: list[Any]) -> tuple[pa.Array, pa.DataType]:
    """Store values of JSON unchanged: texts, integers, floats or booleans as such, anything else as `JSON`.

    Returns:
        The array, and the Arrow type that the values have.
    """
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return pa.nulls(len(values)), pa.null()
    if len(kinds) == 1 and (plain := _PLAIN.get(next(iter(kinds)))) is not None:
        try:
            return pa.array(values, plain), plain
        except UnicodeEncodeError:
            # A lone surrogate: JSON text can hold it as an escape.
            return _as_json(values), plain
        except OverflowError:
            return _as_json(values), MIXED
    return _as_json(values), _inferred(values)


def _as_json(values: list[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))


def _inferred(values: list[Any]) -> pa.DataType:
    try:
        # `infer_type` looks at the first item of a list alone.
        found = pa.array(values).type
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return MIXED
    # Other rows may have negative integers, which uint64 does not hold.
    return found if 0 < _fields(found) <= _MOST_FIELDS and "uint64" not in str(found) else MIXED


def _fields(kind: pa.DataType) -> int:
    """Count the values that a type holds; 0 if one of its structs has no field, which Parquet cannot store."""
    if not pa.types.is_nested(kind):
        return 1
    counts = [_fields(kind.field(index).type) for index in range(kind.num_fields)]
    return sum(counts) if counts and all(counts) else 0


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type with the usual name for the items of lists: each format and writer has a name of its own."""
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([(field.name, plain_type(field.type)) for field in fields])
    return kind


def merge_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that holds values of both, `MIXED` if there is none."""
    if one == other:
        return one
    if MIXED in (one, other):
        return other if pa.types.is_null(one) else one if pa.types.is_null(other) else MIXED
    try:
        schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
        merged = pa.unify_schemas(schemas, promote_options="permissive").field("value").type
    except pa.ArrowException:
        return MIXED
    return merged if _fields(merged) <= _MOST_FIELDS else MIXED


def python_values(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return the Python values of a column; text that is not UTF-8 has lone surrogates in place of its bad bytes."""
    if _holds_json(column.type):
        return [_decoded(value, column.type) for value in column.to_pylist()]
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise
        raw = column.cast(pa.large_binary()).to_pylist()
        values = [None if value is None else value.decode(errors="surrogateescape") for value in raw]
    return values


def _holds_json(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.JsonType):
        return True
    return pa.types.is_nested(kind) and any(_holds_json(kind.field(index).type) for index in range(kind.num_fields))


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """Parse the JSON texts inside a value of a type."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {name: _decoded(field, kind.field(name).type) for name, field in value.items()}
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_decoded(item, kind.value_type) for item in value]
    return value


def to_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the values of a column in the type that holds all of them; U+FFFD replaces lone surrogates."""
    if column.type == kind:
        return column
    if not _holds_json(kind) and not _holds_json(column.type):
        return column.cast(kind)
    values = python_values(column)
    if kind == MIXED:
        return pa.chunked_array([_as_json(values)])
    return pa.chunked_array([pa.array([_without_surrogates(value) for value in values], kind)])


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(item) for key, item in value.items()}
    return value
