"""Check what an engine is given as its model and tokenizer."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from rollout.errors import InputError, shorten


def check_model_arguments(model: object, tokenizer: object) -> None:
    """Refuse arguments of another kind than a module and its tokenizer.

    Raises:
        InputError: the message names the argument and says what to give.
    """
    if isinstance(model, PreTrainedTokenizerBase | ProcessorMixin) or isinstance(tokenizer, nn.Module):
        raise InputError("model and tokenizer are swapped: write Engine(model, tokenizer).")
    if isinstance(model, str):
        raise InputError(
            f"model is the name {shorten(model, 60)!r}, but must be a loaded module: "
            f"AutoModelForCausalLM.from_pretrained({shorten(model, 60)!r})."
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"model is of type {type(model).__name__}, but must be a loaded transformers causal LM.")
    if isinstance(tokenizer, str):
        raise InputError(
            f"tokenizer is the name {shorten(tokenizer, 60)!r}, but must be a loaded tokenizer: "
            f"AutoTokenizer.from_pretrained({shorten(tokenizer, 60)!r})."
        )
    if isinstance(tokenizer, ProcessorMixin):
        raise InputError("tokenizer is a processor, but must be a tokenizer: give processor.tokenizer.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer is of type {type(tokenizer).__name__}, but must be a transformers tokenizer, or None."
        )
