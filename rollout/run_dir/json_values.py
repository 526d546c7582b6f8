"""Write values of any Arrow type as JSON, for shards in JSON lines."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.types as types


def json_value(scalar: pa.Scalar) -> Any:
    """Return a value as JSON can hold it.

    Dates and times become ISO 8601 text, durations seconds, bytes base64, decimals text, and NaN and infinities null,
    for which JSON has no numbers. Maps become lists of pairs. Bytes of a text that are not UTF-8 become U+FFFD.
    """
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.UuidScalar):
        return str(scalar.as_py())
    if isinstance(scalar, pa.ExtensionScalar):
        value = json_value(scalar.value)
        return json.loads(value, parse_constant=lambda _: None) if isinstance(scalar.type, pa.JsonType) else value
    return next(convert for holds, convert in _CONVERSIONS if holds(scalar.type))(scalar)


def _text(scalar: pa.Scalar) -> str:
    return str(scalar.as_buffer().to_pybytes().decode("utf-8", errors="replace"))


def _bytes(scalar: pa.Scalar) -> str:
    return base64.b64encode(scalar.as_buffer().to_pybytes()).decode("ascii")


def _float(scalar: pa.Scalar) -> float | None:
    return _finite(scalar.as_py())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _list(scalar: pa.Scalar) -> list[Any]:
    values = scalar.values
    if types.is_integer(values.type) or types.is_boolean(values.type):
        return list(values.to_pylist())
    if types.is_floating(values.type):
        return [_finite(value) for value in values.to_pylist()]
    return [json_value(value) for value in values]


def _map(scalar: pa.Scalar) -> list[Any]:
    pairs = scalar.values
    return [[json_value(key), json_value(value)] for key, value in zip(pairs.field(0), pairs.field(1), strict=True)]


def _struct(scalar: pa.Scalar) -> dict[str, Any]:
    return {field.name: json_value(scalar[number]) for number, field in enumerate(scalar.type)}


def _time(scalar: pa.Scalar) -> str | int:
    try:
        return str(scalar.as_py().isoformat())
    except (ValueError, OverflowError):  # a date that Python cannot hold, or nanoseconds without pandas
        return int(scalar.value)


def _duration(scalar: pa.Scalar) -> float:
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    return int(scalar.value) / per_second[scalar.type.unit]


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    variable = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(variable or types.is_fixed_size_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    views = types.is_list_view(kind) or types.is_large_list_view(kind)
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or views)


#: The first whose test holds converts a value; the last converts all others.
_CONVERSIONS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Scalar], Any]], ...] = (
    (_is_text, _text),
    (types.is_integer, lambda scalar: scalar.as_py()),
    (types.is_floating, _float),
    (types.is_boolean, lambda scalar: scalar.as_py()),
    (types.is_struct, _struct),
    (types.is_map, _map),
    (_is_list, _list),
    (types.is_dictionary, lambda scalar: json_value(scalar.value)),
    (_is_bytes, _bytes),
    (types.is_duration, _duration),
    (lambda kind: types.is_temporal(kind) and not types.is_interval(kind), _time),
    (lambda _: True, lambda scalar: str(scalar.as_py())),
)
