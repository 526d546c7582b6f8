"""Turn one row of a dataset into a prompt, or into the error that makes it unusable."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from rollout.config.schema import DataConfig
from rollout.errors import shorten

Message = dict[str, Any]
Prompt = str | list[Message] | list[int]
"""Plain text, chat messages for the template, or token ids."""


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One input row: its prompt, or the class and text of the error that makes it unusable."""

    index: int
    row_id: str
    prompt: Prompt | None
    columns: dict[str, Any]
    """All columns if a reward reads them, otherwise those that the configuration names."""
    error_class: str = ""
    error: str = ""
    length_hint: float | None = None
    """Expected tokens of its completions; None where the column has no positive number."""


def dataset_row(index: int, row_id: str, columns: dict[str, Any], config: DataConfig) -> DatasetRow:
    """Check the prompt of a row and add the system prompt that the configuration asks for."""
    value = columns[config.prompt_column]
    row = DatasetRow(index=index, row_id=row_id, prompt=None, columns=columns)
    if value is None:
        return replace(row, error_class="bad_prompt", error="The prompt is null.")
    if value in ("", []):
        return replace(row, error_class="empty_prompt", error="The prompt is empty.")
    if isinstance(value, str):
        return replace(row, prompt=_with_system(value, config))
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        if min(value) < 0:
            return replace(row, error_class="bad_prompt", error=f"The token id {min(value)} is negative.")
        return replace(row, prompt=value)
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return replace(row, prompt=_with_system(without_nulls(value), config))
    shown = shorten(repr(value), longest=80)
    error = f"The prompt {shown} is neither text, nor chat messages with roles, nor token ids."
    return replace(row, error_class="bad_prompt", error=error)


def as_length_hint(value: float | None) -> float | None:
    """Return a positive finite number, or None."""
    return None if value is None or not 0 < value < math.inf else float(value)


def without_nulls(value: Any) -> Any:
    """Remove null fields: Arrow adds a field of any message to all messages, but templates test for presence."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(field) for key, field in value.items() if field is not None}
    return value


def _with_system(prompt: str | list[Message], config: DataConfig) -> str | list[Message]:
    if isinstance(prompt, str):
        if not config.as_chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": config.system_prompt}, *prompt]


def is_chat(prompt: Prompt | None) -> bool:
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and isinstance(prompt[0], dict)
