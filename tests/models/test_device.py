"""Self-tests of kernels."""

from __future__ import annotations

import pytest
import torch

from rollout.models.device import failure_of


def test_failure_of_returns_message_error_or_none() -> None:
    assert failure_of(lambda: None) is None
    assert failure_of(lambda: "it draws other tokens") == "it draws other tokens"
    assert failure_of(lambda: str([][1])) == "IndexError: list index out of range"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError()]
)
def test_failure_of_raises_out_of_memory_errors(error: Exception) -> None:
    def check() -> str | None:
        raise error

    with pytest.raises(type(error)):
        failure_of(check)
