"""Errors that a user can act on, the exit status each ends the job with, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from rollout.batcher.suggestions import near_name


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
            raise InputError(f"{check.name} is {check.value!r}, but must be {check.wanted}{_nearest(check)}.")


#: What others call some values.
_SPELLINGS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_SPELLINGS |= {"flash_attention_2": "flash_attn", "fa2": "flash_attn", "json": "jsonl", "wandb.ai": "wandb"}


def _nearest(check: Check) -> str:
    """Return which of the names in ``one of a, b`` the value may mean, as the end of a sentence."""
    if not check.wanted.startswith("one of ") or not isinstance(check.value, str):
        return ""
    names = check.wanted.removeprefix("one of ").replace(" or ", ", ").split(", ")
    typed = check.value.lower().removeprefix("torch.")
    near = _SPELLINGS.get(typed, near_name(typed, names))
    return f"; the nearest is {near}" if near in names else ""


def shorten(text: str, longest: int, keep: int | None = None) -> str:
    """Return ``text``, or its first ``keep`` characters and ``...`` if it has more than ``longest``."""
    return text if len(text) <= longest else text[: longest - 3 if keep is None else keep] + "..."
