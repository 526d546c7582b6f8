"""Errors that a user can act on, the exit status each ends the job with, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple


class Exit(IntEnum):
    """Exit statuses of a job."""

    COMPLETE = 0
    CRASHED = 1
    BAD_INPUT = 2
    ERROR_ROWS = 4
    RESUMABLE = 75


class InputError(ValueError):
    """Configuration or input that a job cannot start with; the message is one sentence saying what to do."""


class PromptError(InputError):
    """One prompt that cannot be used: it becomes an error record, and other prompts are unaffected.

    Args:
        error_class: ``error_class`` of the record, e.g. ``bad_prompt``.
        message: ``error`` of the record, one sentence.
    """

    def __init__(self, error_class: str, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class Check(NamedTuple):
    """One parameter, its value, whether the value is allowed, and which values are."""

    name: str
    value: object
    allowed: bool
    wanted: str


def check_all(checks: Iterable[Check]) -> None:
    """Refuse the first value that is not allowed.

    Raises:
        InputError: a value is not allowed; the message names the parameter and the allowed values.
    """
    for check in checks:
        if not check.allowed:
            raise InputError(f"{check.name} is {check.value!r}, but must be {check.wanted}.")


def shorten(text: str, longest: int, keep: int | None = None) -> str:
    """Return ``text``, or its first ``keep`` characters and ``...`` if it has more than ``longest``."""
    return text if len(text) <= longest else text[: longest - 3 if keep is None else keep] + "..."
