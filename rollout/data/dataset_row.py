"""Turn one row of a dataset into a prompt, or into the error that makes it unusable."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rollout.config.schema import DataConfig
from rollout.errors import PromptError, shorten
from rollout.tokenization.prompt import Chat
from rollout.tokenization.sharegpt import as_messages, is_sharegpt
from rollout.tokenization.stored_chat import stored_messages
from rollout.tokenization.template_columns import TEMPLATE_COLUMNS, chat_of

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Prompt = str | Chat | list[Message] | list[int]
"""Plain text, chat messages for the template (with tools or template arguments of their own), or token ids."""


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
        try:
            messages = stored_messages(value)
        except ValueError as unreadable:
            reason = f"The prompt begins as chat messages stored as text, but cannot be read: {unreadable}."
            return replace(row, error_class="bad_prompt", error=reason)
        if messages is None:
            return _as_prompt(row, value, config)
        _say_stored_chats(config.path, config.prompt_column)
        value = messages
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        if min(value) < 0:
            return replace(row, error_class="bad_prompt", error=f"The token id {min(value)} is negative.")
        return replace(row, prompt=value)
    if isinstance(value, list) and is_sharegpt(value):
        _say_sharegpt(config.path, config.prompt_column)
        try:
            value = as_messages(value)
        except ValueError as unknown:
            return replace(
                row, error_class="bad_prompt", error=f"The prompt is a chat in ShareGPT's form, but {unknown}."
            )
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return _as_prompt(row, without_nulls(value), config)
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


@lru_cache(maxsize=8)
def _say_stored_chats(path: str, column: str) -> None:
    """Say once per dataset that its texts are taken as messages."""
    logger.info("data.prompt_column=%s of %s stores chat messages as text; they are read as messages.", column, path)


@lru_cache(maxsize=8)
def _say_sharegpt(path: str, column: str) -> None:
    """Say once per dataset how its chats are taken."""
    logger.info(
        "data.prompt_column=%s of %s has chats in ShareGPT's form; from and value are read as role and content.",
        column,
        path,
    )


@lru_cache(maxsize=8)
def _warn_about_own_system(path: str) -> None:
    """Warn once per dataset that a chat keeps its system message."""
    logger.warning(
        "data.system_prompt is not used where a chat of %s has a system message already, which is kept.", path
    )


def _as_prompt(row: DatasetRow, value: str | list[Message], config: DataConfig) -> DatasetRow:
    """Return the row with its prompt: a text, or a chat with its system prompt, tools and template arguments."""
    prompt = _with_system(value, config)
    if isinstance(prompt, str):
        return replace(row, prompt=prompt)
    given = {name: without_nulls(row.columns.get(name)) for name in TEMPLATE_COLUMNS}
    if all(value is None for value in given.values()):
        return replace(row, prompt=prompt)
    try:
        return replace(row, prompt=chat_of(prompt, given))
    except PromptError as error:
        return replace(row, error_class=error.error_class, error=str(error))


def _with_system(prompt: str | list[Message], config: DataConfig) -> str | list[Message]:
    if isinstance(prompt, str):
        if not config.as_chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is None:
        return prompt
    if prompt[0]["role"] == "system":
        _warn_about_own_system(config.path)
        return prompt
    return [{"role": "system", "content": config.system_prompt}, *prompt]


def is_chat(prompt: Prompt | None) -> bool:
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, Chat) or (isinstance(prompt, list) and isinstance(prompt[0], dict))
