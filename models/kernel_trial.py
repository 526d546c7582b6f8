"""Trying out what a compiler, a driver or a device may not be up to."""

from __future__ import annotations

from collections.abc import Callable

from rollout.models.device import is_out_of_memory
from rollout.models.errors import clause


def failure_of(check: Callable[[], str | None]) -> str | None:
    """What is wrong: what ``check`` says, or the error that it ends with; None if nothing.

    Errors that only say that there was no memory are raised: later there may be some.
    """
    try:
        return check()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return clause(error)
