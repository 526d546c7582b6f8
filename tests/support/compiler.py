"""Skip tests on machines without a C compiler."""

from __future__ import annotations

import pytest

from rollout.models.csrc import build
from rollout.models.csrc.build import KernelUnavailable


def needs_compiler() -> None:
    """Skip the test if there is no C compiler."""
    try:
        build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))
