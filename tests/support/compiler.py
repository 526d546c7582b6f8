"""Whether there is a C compiler."""

from __future__ import annotations

import pytest

from rollout.models.csrc import build
from rollout.models.csrc.build import KernelUnavailable


def needs_compiler() -> None:
    """Skip the test where there is none."""
    try:
        build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))
