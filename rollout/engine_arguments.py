"""The allowed ranges of the engine's arguments, which a job's configuration must satisfy as well."""

from __future__ import annotations

import math
from numbers import Integral, Real

from rollout.errors import Check
from rollout.models.attention.names import ATTENTION_BACKENDS


def argument_checks(
    *,
    latency_budget_ms: float | None,
    max_rows: int,
    min_rows: int,
    max_kv_bytes: int | None,
    reserve_fraction: float,
    keep_prefixes_bytes: int,
    attention: str,
    none: str = "None",
) -> list[Check]:
    """Return one check for each argument, under the argument's name.

    Args:
        none: how the reader of the message writes None.
    """
    return [
        Check(
            "latency_budget_ms",
            latency_budget_ms,
            latency_budget_ms is None or (_is_a(Real, latency_budget_ms) and 0 < latency_budget_ms < math.inf),
            f"a number above 0, or {none} for no budget",
        ),
        Check("min_rows", min_rows, _is_a(Integral, min_rows) and min_rows >= 1, "a whole number of at least 1"),
        Check(
            "max_rows",
            max_rows,
            _is_a(Integral, max_rows) and (not _is_a(Integral, min_rows) or max_rows >= min_rows),
            f"a whole number of at least min_rows ({min_rows})",
        ),
        Check(
            "max_kv_bytes",
            max_kv_bytes,
            max_kv_bytes is None or (_is_a(Real, max_kv_bytes) and max_kv_bytes > 0),
            f"a number above 0, or {none} for all headroom",
        ),
        Check(
            "reserve_fraction",
            reserve_fraction,
            _is_a(Real, reserve_fraction) and 0 <= reserve_fraction < 1,
            "a number of at least 0 and below 1",
        ),
        Check(
            "keep_prefixes_bytes",
            keep_prefixes_bytes,
            _is_a(Integral, keep_prefixes_bytes) and keep_prefixes_bytes >= 0,
            "a whole number of at least 0",
        ),
        Check("attention", attention, attention in ATTENTION_BACKENDS, f"one of {', '.join(ATTENTION_BACKENDS)}"),
    ]


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
