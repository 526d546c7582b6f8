"""Tiny models saved to folders, for tests of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollout.models.loading.load import ModelSource, load_model

CPU = torch.device("cpu")


def tiny_config(**changes: Any) -> LlamaConfig:
    """Return the configuration of a Llama with two layers, and with other fields if they are given."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**fields | changes)


def save_tiny(folder: Path) -> None:
    """Save a bfloat16 model with seeded weights and a word tokenizer to ``folder``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    model.to(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def save_words_llama(folder: Path, positions: int, *, end: str | None = None) -> None:
    """Save a llama of random weights, and a tokenizer of 64 words.

    Args:
        positions: of the model's context.
        end: the token with which completions end; None: they never end by themselves.
    """
    torch.manual_seed(0)
    config = tiny_config(max_position_embeddings=positions, bos_token_id=None, eos_token_id=63)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 63)}, end or "w63": 63}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token=end).save_pretrained(folder)


def refused(source: ModelSource, kind: type[Exception] = ValueError) -> str:
    """Return the one-sentence error that `load_model` raises."""
    with pytest.raises(kind) as caught:
        load_model(source, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
