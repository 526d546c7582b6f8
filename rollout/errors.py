"""Errors that a user can act on, and the exit status each ends the job with."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of a job."""

    COMPLETE = 0
    CRASHED = 1
    BAD_INPUT = 2
    ERROR_ROWS = 4
    RESUMABLE = 75


class InputError(ValueError):
    """Configuration or input that a job cannot start with; the message is one sentence saying what to do."""
