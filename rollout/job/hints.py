"""Say at the start of a job what may be meant otherwise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rollout.config.schema import DataConfig
from rollout.data.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LOOKED_AT = 16


def hint_at_chat(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, config: DataConfig) -> None:
    """Log a hint where plain texts go to a model that has a chat template, as they are.

    Texts with special tokens of the model have the template applied already. Only the first prompts are looked at.
    """
    if tokenizer.chat_template is None or config.as_chat or prompts.chat_row is not None:
        return
    rows = prompts.rows(0, min(_LOOKED_AT, len(prompts)))
    first = [row.prompt for row in rows if row.prompt is not None]
    texts = [prompt for prompt in first if isinstance(prompt, str)]
    markers = [token for token in tokenizer.all_special_tokens if token]
    if not texts or len(texts) < len(first) or any(marker in text for text in texts for marker in markers):
        return
    logger.info(
        "The prompts are plain text and the model continues them as they are, though it has a chat template: "
        "data.as_chat=true makes each a user message."
    )
