"""What is tried out before it is used."""

from __future__ import annotations

import pytest
import torch

from rollout.models.device import failure_of


def test_what_is_said_what_fails_and_what_is_right() -> None:
    assert failure_of(lambda: None) is None
    assert failure_of(lambda: "it draws other tokens") == "it draws other tokens"
    assert failure_of(lambda: str([][1])) == "IndexError: list index out of range"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError()]
)
def test_a_lack_of_memory_says_nothing_about_what_was_tried(error: Exception) -> None:
    def check() -> str | None:
        raise error

    with pytest.raises(type(error)):
        failure_of(check)
