"""Values of a column: as Arrow data that holds them unchanged, as Python values again, and the type they have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

JSON = pa.json_()
"""Storage of values that no one Arrow type holds unchanged: JSON text."""
MIXED = JSON
"""Type of a column whose values have several types."""
_PLAIN: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
_ANNOTATED = {pa.uuid(): pa.string(), pa.bool8(): pa.bool_()}
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
    """Return the type in which a column is written.

    Types that lay out or annotate values in a way of their own, such as views and UUIDs, become the usual type of
    those, and the items of lists get their usual name: each format and writer has a name of its own.
    """
    if pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.OpaqueType | pa.FixedShapeTensorType):
        return plain_type(kind.storage_type)
    return _ANNOTATED.get(kind) or _without_views(kind)


def _without_views(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(_without_views(kind.value_type))
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(_without_views(kind.value_type))
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([(field.name, _without_views(field.type)) for field in fields])
    return _VIEWS.get(kind, kind)


def merge_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that holds values of both, `MIXED` if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    for same, merge in _MERGES:
        if same(one) and same(other):
            merged = merge(one, other)
            return merged if _fields(merged) <= _MOST_FIELDS else MIXED
    return MIXED


def _merge_integers(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if pa.uint64() in (one, other) and (pa.types.is_signed_integer(one) or pa.types.is_signed_integer(other)):
        return MIXED
    return _unified(one, other)


def _merge_timestamps(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    return _unified(one, other) if one.tz == other.tz else MIXED


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("value").type


def _merge_lists(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    item = merge_types(one.value_type, other.value_type)
    large = pa.types.is_large_list(one) or pa.types.is_large_list(other)
    return MIXED if item == MIXED else pa.large_list(item) if large else pa.list_(item)


def _merge_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    fields: dict[str, pa.DataType] = {}
    for kind in (one, other):
        for index in range(kind.num_fields):
            name = kind.field(index).name
            fields[name] = merge_types(fields.get(name, pa.null()), kind.field(index).type)
    return MIXED if MIXED in fields.values() else pa.struct(fields.items())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


#: The first whose test holds for both types merges them.
_MERGES: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any], pa.DataType]], ...] = (
    (pa.types.is_integer, _merge_integers),
    (_is_number, lambda _one, _other: pa.float64()),
    (_is_text, lambda _one, _other: pa.large_string()),
    (_is_list, _merge_lists),
    (pa.types.is_struct, _merge_structs),
    (pa.types.is_timestamp, _merge_timestamps),
)


def has_wide_integers(column: pa.ChunkedArray) -> bool:
    """Return whether a column has integers beyond those that a float of 64 bits tells apart."""
    if not pa.types.is_integer(column.type) or column.type.bit_width < 64:
        return False
    low, high = pc.min_max(column).values()
    return bool(low.is_valid and (low.as_py() < -(2**53) or high.as_py() > 2**53))


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
    """Return the values of a column in the type that holds all of them; U+FFFD replaces what is not valid Unicode."""
    if _is_text(column.type) and _is_text(kind):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return pa.chunked_array([pa.array([_without_surrogates(value) for value in python_values(column)], kind)])
    if column.type == kind:
        return column
    if kind != MIXED:
        column = _laid_out_as_usual(column, kind)
    if kind != MIXED and not _holds_json(column.type):
        # Of merged types only integers in lists of floats lose something: what is beyond 53 bits.
        return column.cast(kind, safe=False)
    values = python_values(column)
    if kind == MIXED:
        return pa.chunked_array([_as_json(values)])
    plain = [_without_surrogates(value) for value in values]
    try:
        return pa.chunked_array([pa.array(plain, kind)])
    except pa.ArrowInvalid:
        return pa.chunked_array([pa.array(plain).cast(kind, safe=False)])


def _laid_out_as_usual(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the values of a column in a form that Arrow can cast to a type of `plain_type`."""
    if pa.types.is_run_end_encoded(column.type):
        return pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], column.type.value_type)
    if isinstance(column.type, pa.UuidType):
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())
    if isinstance(column.type, pa.BaseExtensionType) and not isinstance(column.type, pa.JsonType):
        return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_nested(column.type) and "view" in str(column.type):
        return pa.chunked_array([column.to_pylist()], kind)
    return column


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(item) for key, item in value.items()}
    return value
