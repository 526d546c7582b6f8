"""Sealed files: what was written is read, and nothing else."""

from __future__ import annotations

import json

import pytest

from rollout.run_dir.sealed_json import seal, unseal

VALUES = {"a": [1, 2.5, None, "é\u2028"], "b": {"c": {}, "x": float("inf")}, "deep": [[[[]]]]}


def test_values_are_read_again() -> None:
    assert unseal(seal(VALUES)) == VALUES
    assert unseal(seal({})) == {}


def test_any_flipped_bit_is_noticed() -> None:
    whole = seal(VALUES)
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):  # noqa: PT011  # the reason differs
            unseal(bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"[" * 100_000, json.dumps(VALUES).encode(), seal(VALUES) + b"\n", seal(VALUES)[:-1], b"\xff"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        unseal(data)
