"""Say at the start of a job what may be meant otherwise."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rollout.config.schema import DataConfig
from rollout.data.dataset_row import is_chat
from rollout.data.prompts import Prompts
from rollout.tokenization.messages import ASSISTANT_ROLES
from rollout.tokenization.prompt import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LOOKED_AT = 16
_STORED_IDS = re.compile(r"\s*\[\s*\d+(\s*,\s*\d+)*\s*\]\s*")


def hint_at_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, config: DataConfig) -> None:
    """Log what the first prompts may have been meant to be."""
    rows = prompts.rows(0, min(_LOOKED_AT, len(prompts)))
    first = [row.prompt for row in rows if row.prompt is not None]
    texts = [prompt for prompt in first if isinstance(prompt, str)]
    chats = [prompt for prompt in first if is_chat(prompt)]
    if texts and all(map(_STORED_IDS.fullmatch, texts)):
        logger.warning(
            "The prompts are texts like %r, which go to the model as these characters: if they are token ids, store "
            "them as lists of numbers.",
            texts[0][:40],
        )
    elif texts and len(texts) == len(first) and not config.as_chat:
        _hint_at_chat(tokenizer, texts)
    answered = [chat for chat in chats if _last_role(chat) in ASSISTANT_ROLES]
    if answered:
        logger.warning(
            "%d of the first %d chats end with an assistant's message, which the completion continues: leave it out "
            "of the prompt if it is the answer.",
            len(answered),
            len(chats),
        )


def hint_at_length(max_new_tokens: int, context_limit: int | None) -> None:
    """Log a hint where the model's context ends every completion before ``max_new_tokens``."""
    if context_limit is not None and max_new_tokens >= context_limit:
        logger.warning(
            "sampling.max_new_tokens is %d, but the model's context holds %d tokens with the prompt: completions end "
            "there at the latest, with finish_reason length.",
            max_new_tokens,
            context_limit,
        )


def _hint_at_chat(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Log a hint where plain texts go to a model that has a chat template, as they are.

    Texts with special tokens of the model have the template applied already.
    """
    markers = [token for token in tokenizer.all_special_tokens if token]
    if tokenizer.chat_template is None or any(marker in text for text in texts for marker in markers):
        return
    logger.info(
        "The prompts are plain text and the model continues them as they are, though it has a chat template: "
        "data.as_chat=true makes each a user message."
    )


def _last_role(prompt: object) -> object:
    messages = prompt.messages if isinstance(prompt, Chat) else prompt
    return messages[-1]["role"] if isinstance(messages, Sequence) else None
