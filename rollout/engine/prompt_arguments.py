"""The forms in which a caller may give prompts and their ids, as one stream of prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from rollout.errors import InputError, PromptError, shorten
from rollout.tokenization.prompt import Chat, Prompt
from rollout.tokenization.sharegpt import as_messages, is_sharegpt
from rollout.tokenization.stored_chat import stored_messages
from rollout.tokenization.template_columns import chat_of

logger = logging.getLogger(__name__)

PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """One prompt as the caller gave it, and what stood beside it."""

    prompt: Any
    """A text, chat messages or token ids; anything else is an error of this prompt."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of a prompt that was given as a mapping."""

    def with_template_columns(self) -> Prompt:
        """Return the prompt; chat messages with the tools and template arguments that stand beside them.

        Raises:
            PromptError: these columns hold something else, or a chat that is stored in another form cannot be read.
        """
        own = _with_chats_read(self.prompt)
        is_chat = isinstance(own, Sequence) and own and isinstance(own[0], Mapping)
        prompt: Prompt = chat_of(own, self.row) if is_chat else own
        return prompt


def given_prompts(prompts: Any, attention_mask: Any = None, pad_id: int | None = None) -> Iterable[GivenPrompt]:
    """Return the prompts of a call; a sequence if their number is known.

    A single text, chat, id list or row is one prompt. Rows of a 2-D array of ids are prompts without the positions that
    the mask leaves out. Mappings are rows of a dataset if they have a prompt, or a tokenizer's output.

    Raises:
        InputError: the argument has no form that can be read, or padded ids come without a mask.
    """
    if _is_tokenized(prompts):
        mask = prompts.get("attention_mask") if attention_mask is None else attention_mask
        return given_prompts(prompts["input_ids"], mask, pad_id)
    if _is_array(prompts) and _is_numeric(prompts):
        return _rows_of_ids(prompts, attention_mask, pad_id)
    if attention_mask is not None:
        if isinstance(prompts, Sequence) and not isinstance(prompts, str):
            return _masked_lists(prompts, attention_mask)
        raise InputError("attention_mask belongs to token ids: give it with a tensor or lists of ids alone.")
    if isinstance(prompts, Mapping):
        return _rows_of_mapping(prompts)
    if isinstance(prompts, str | Chat):
        return [GivenPrompt(prompts)]
    is_other = isinstance(prompts, bytes | int | float | Set) or _is_number(prompts)
    if prompts is None or is_other or not isinstance(prompts, Iterable):
        raise InputError(
            f"prompts is {shorten(repr(prompts), 60)}, but must be texts, chats, lists of token ids or rows of a "
            "dataset."
        )
    if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):
        return [_given(row) for row in prompts.to_dict("records")]  # a table of pandas, which iterates over its columns
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__len__"):
        return (_given(prompt) for prompt in prompts)
    items = list(prompts)
    if items and all(isinstance(item, Mapping) and not item.keys() & {PROMPT, "role", "input_ids"} for item in items):
        raise InputError(
            f"prompts are rows with the columns {', '.join(map(str, items[0]))}, but a row of a dataset has {PROMPT!r}."
        )
    return [GivenPrompt(items)] if _is_one_prompt(items) else [_given(item) for item in items]


def _is_one_prompt(items: Sequence[Any]) -> bool:
    """Return whether a list is one prompt itself: chat messages, or numbers."""
    if not items:
        return False
    return all(_is_message(item) for item in items) or all(_is_number(item) for item in items)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and PROMPT not in item


def _is_number(item: Any) -> bool:
    if isinstance(item, Integral | float):
        return True
    return _is_array(item) and not item.shape and not isinstance(item, str)


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of numpy, or a tensor; `rollout` does not import their libraries for it."""
    return hasattr(value, "shape") and hasattr(value, "tolist") and hasattr(value, "dtype")


def _is_numeric(array: Any) -> bool:
    kind = getattr(array.dtype, "kind", None)
    return kind in (None, "i", "u", "f", "b") and len(array.shape) > 0 and hasattr(array, "__getitem__")


def _is_tokenized(prompts: Any) -> bool:
    return isinstance(prompts, Mapping) and "input_ids" in prompts and PROMPT not in prompts


def _rows_of_ids(ids: Any, mask: Any, pad_id: int | None) -> list[GivenPrompt]:
    if len(ids.shape) > 2:
        raise InputError(f"prompts is an array of shape {tuple(ids.shape)}, but ids have the shape [prompts, tokens].")
    rows = ids.tolist() if len(ids.shape) == 2 else [ids.tolist()]
    if mask is not None:
        return _masked_lists(rows, mask)
    if pad_id is not None and len(rows) > 1 and any(row and pad_id in (row[0], row[-1]) for row in rows):
        raise InputError(f"Rows of prompts begin or end with the padding id {pad_id}: give attention_mask as well.")
    return [GivenPrompt(row) for row in rows]


def _masked_lists(prompts: Sequence[Any], mask: Any) -> list[GivenPrompt]:
    """Return id lists without the positions where the mask is 0."""
    if not _is_array(mask) and (isinstance(mask, str) or not isinstance(mask, Iterable)):
        raise InputError(f"attention_mask is {shorten(repr(mask), 60)}, but must have the shape of the token ids.")
    rows, masks = ([_as_list(row) for row in _as_list(value)] for value in (prompts, mask))
    rows, masks = ([value] if value and not isinstance(value[0], Sequence) else value for value in (rows, masks))
    lengths, kept = ([len(row) if _is_list(row) else -1 for row in value] for value in (rows, masks))
    if lengths != kept or -1 in lengths:
        raise InputError("attention_mask must have the shape of the token ids in prompts.")
    others = [value for row in masks for value in row if not isinstance(value, Real) or value not in (0, 1)]
    if others:
        raise InputError(
            f"attention_mask has {shorten(repr(others[0]), 60)}, but must have 1 for tokens and 0 for padding."
        )
    return [
        GivenPrompt([token for token, kept in zip(row, kept_of, strict=True) if kept])
        for row, kept_of in zip(rows, masks, strict=True)
    ]


def _rows_of_mapping(prompts: Mapping[str, Any]) -> list[GivenPrompt]:
    """Return the one row that a mapping is, or the rows of a mapping of columns, as slices of a dataset are."""
    if PROMPT not in prompts:
        if _is_message(prompts):
            return [GivenPrompt([prompts])]
        raise InputError(
            f"prompts is a mapping with the keys {', '.join(map(str, prompts))}, but a row of a dataset has {PROMPT!r}."
        )
    values = prompts[PROMPT]
    is_text_or_lists = isinstance(values, list) and all(isinstance(value, str | list) for value in values)
    if not (is_text_or_lists and values):
        return [_given(prompts)]
    if any(not hasattr(column, "__len__") or len(column) != len(values) for column in prompts.values()):
        raise InputError("prompts is a mapping of columns that differ in length.")
    return [_given({name: column[i] for name, column in prompts.items()}) for i in range(len(values))]


def _given(item: Any) -> GivenPrompt:
    if isinstance(item, Mapping) and PROMPT in item:
        return GivenPrompt(_plain(item[PROMPT]), {name: value for name, value in item.items() if name != PROMPT})
    if _is_tokenized(item):
        given = given_prompts(item)
        ids = list(given)
        return ids[0] if len(ids) == 1 else GivenPrompt(item)
    return GivenPrompt(_plain(item))


def _plain(prompt: Any) -> Any:
    """Return a prompt without arrays: they hold ids, or chat messages, as tables of pandas do."""
    if _is_array(prompt) and len(prompt.shape):
        values = prompt.tolist()
        return _plain(values[0] if _is_numeric(prompt) and len(prompt.shape) == 2 and len(prompt) == 1 else values)
    if isinstance(prompt, list) and any(isinstance(message, Mapping) for message in prompt):
        return [
            {name: _plain(value) for name, value in message.items()} if isinstance(message, Mapping) else message
            for message in prompt
        ]
    return prompt


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _as_list(value: Any) -> Any:
    return value.tolist() if _is_array(value) else value


def _with_chats_read(prompt: Any) -> Any:
    """Return the messages of a chat that is text, or in ShareGPT's form; other prompts unchanged."""
    read = prompt
    if isinstance(prompt, str):
        try:
            read = stored_messages(prompt)
        except ValueError as error:
            raise PromptError(
                "bad_prompt", f"The prompt begins as chat messages stored as text, but cannot be read: {error}."
            ) from error
        if read is None:
            return prompt
        _say_once("Prompts store chat messages as text; they are read as messages.")
    if isinstance(read, list) and is_sharegpt(read):
        try:
            read = as_messages(read)
        except ValueError as error:
            raise PromptError("bad_prompt", f"The prompt is a chat in ShareGPT's form, but {error}.") from error
        _say_once("Prompts are chats in ShareGPT's form; from and value are read as role and content.")
    return read


@lru_cache(maxsize=8)
def _say_once(message: str) -> None:
    logger.info(message)


def check_prompt(prompt: Any) -> None:
    """Refuse a prompt that is neither text, nor chat messages, nor token ids.

    Raises:
        PromptError: the prompt is something else.
    """
    if isinstance(prompt, str | Chat):
        return
    if prompt is None:
        raise PromptError("bad_prompt", "The prompt is None.")
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        # An id list may be long: its types are few.
        kinds = set(map(type, prompt))
        are_ids = all(hasattr(kind, "__index__") and kind is not bool for kind in kinds)
        if are_ids or all(issubclass(kind, Mapping) for kind in kinds):
            return
    raise PromptError(
        "bad_prompt",
        f"The prompt {shorten(repr(prompt), 80)} is neither text, nor chat messages, nor token ids.",
    )


def given_row_ids(row_ids: Any, prompts: Iterable[GivenPrompt]) -> Iterator[str]:
    """Yield one id per prompt as a string; without any, the prompts' indices.

    Raises:
        InputError: an id is neither text nor a whole number, or stands twice, or a list has too few or too many.
    """
    row_ids = [row_ids] if isinstance(row_ids, str | int) else _as_list(row_ids)
    if isinstance(row_ids, bytes | Set | Mapping) or not isinstance(row_ids, Iterable):
        raise InputError(
            f"row_ids is {shorten(repr(row_ids), 60)}, but must have one string or whole number per prompt."
        )
    if isinstance(prompts, Sequence) and isinstance(row_ids, Sized) and len(row_ids) != len(prompts):
        raise InputError(f"row_ids has {len(row_ids)} entries, but there are {len(prompts)} prompts.")
    return _checked_ids(row_ids)


def given_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises:
        InputError: it is no 64-bit integer.
    """
    if type(seed) is bool or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**63:
        raise InputError(f"seed is {shorten(repr(seed), 60)}, but must be a 64-bit integer.")
    return int(seed)


def _checked_ids(row_ids: Iterable[Any]) -> Iterator[str]:
    seen: set[str] = set()
    for given in row_ids:
        if type(given) is bool or not isinstance(given, str | Integral):
            raise InputError(f"row_ids has {shorten(repr(given), 60)}, but ids are strings or whole numbers.")
        row_id = str(given)
        if not row_id.isascii() and row_id != row_id.encode(errors="ignore").decode():
            raise InputError(f"row_ids has {shorten(repr(given), 60)}, which is not valid Unicode.")
        if row_id in seen:
            raise InputError(f"row_ids must differ from each other, but {shorten(row_id, 60)!r} stands twice.")
        seen.add(row_id)
        yield row_id
