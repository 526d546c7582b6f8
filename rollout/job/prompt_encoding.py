"""How a job encodes prompts: with what the configuration names, after a trial on the first input rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from rollout.config.schema import DataConfig
from rollout.data.dataset_row import is_chat
from rollout.data.prompts import Prompts
from rollout.errors import InputError, PromptError
from rollout.tokenization.prompt import EncodedPrompt, EncodingOptions, Prompt
from rollout.tokenization.template_columns import read_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Chats to try before the model is loaded. A fault of the template or of a setting fails them all.
_TRIED_ROWS = 256
#: Rows whose tokens stand for those of all; they lie at equal distances.
_COMPARED_ROWS = 64


class Encoder(Protocol):
    """The part of `PromptEncoder` that a job uses."""

    @property
    def dates(self) -> Mapping[str, str]: ...

    def dated(self, dates: Mapping[str, str]) -> Encoder: ...

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...

    def encode_batch(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt | PromptError]: ...


def make_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, model_path: str) -> Encoder:
    """Return the job's encoder, having tried it on the first input rows.

    Raises:
        InputError: the template cannot be read, there is none, or it refuses all of the first chats.
    """
    # Imported here because it imports transformers, which takes seconds.
    from rollout.tokenization.prompt_encoder import PromptEncoder

    if prompts.chat_row is not None and tokenizer.chat_template is None and config.chat_template is None:
        raise InputError(
            f"Input row {prompts.chat_row} has chat messages, but model.path={model_path} has no chat template: "
            "use a model that has one, name a file with data.chat_template, or use a data.prompt_column of text with "
            "data.as_chat=false."
        )
    try:
        options = EncodingOptions(
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs or {},
            tools=None if config.tools is None else read_tools(config.tools),
            add_special_tokens=config.add_special_tokens,
        )
        encoder = PromptEncoder(tokenizer, options)
    except InputError as error:
        # Its sentences about an option begin with the option's name.
        raise InputError(f"data.{error}") from error
    _try_first_chats(encoder, prompts, config)
    return encoder


def _try_first_chats(encoder: Encoder, prompts: Prompts, config: DataConfig) -> None:
    """Encode the first chats, which also logs what the encoder has to say before the model is loaded."""
    first_error: tuple[str, str] | None = None
    rows = prompts.rows(0, min(len(prompts), _TRIED_ROWS))
    for row in islice((row for row in rows if row.prompt is not None), _TRIED_ROWS):
        assert row.prompt is not None
        try:
            encoder.encode(row.prompt)
        except PromptError as error:
            if is_chat(row.prompt):
                first_error = first_error or (row.row_id, str(error))
                continue
        return
    if first_error is not None:
        row_id, reason = first_error
        advice = "; unset data.system_prompt" if config.system_prompt is not None and "ystem" in reason else ""
        raise InputError(f"None of the first chats can be encoded, input row {row_id} among them: {reason}{advice}")


def prompt_tokens(encoder: Encoder, prompts: Prompts) -> str:
    """Return the digest of the token ids of some prompts, which tells when tokenizer or template give others.

    Other versions of their packages may do so with the same files. The dates that a template writes do not count.
    """
    indices = range(0, len(prompts), max(1, len(prompts) // _COMPARED_ROWS))
    rows = [row for index in indices for row in prompts.rows(index, index + 1)]
    encoder = encoder.dated({form: form for form in encoder.dates})
    encoded = encoder.encode_batch([row.prompt for row in rows if row.prompt is not None])
    # The sentence of an error may be that of a library, which words it otherwise in another version.
    shown = [item.error_class if isinstance(item, PromptError) else [*item] for item in encoded]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()
