"""GGUF files, read through transformers into plain modules."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def require_gguf(path: Path) -> None:
    """Refuse early where the package that reads the format is missing.

    Raises:
        ValueError: the package gguf is not installed.
    """
    if util.find_spec("gguf") is None:
        raise ValueError(f"model.path {str(path)!r} is a GGUF file, which needs the package gguf: `pip install gguf`.")


def read_model(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a GGUF file, every weight unpacked into the plain tensors of transformers' own modules."""
    require_gguf(path)
    # Newer versions may keep the weights in blocks, in modules and with an attention of their own.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False, **options
    )
    # Nothing is quantized any more, but while the mark stays the model cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file."""
    require_gguf(path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    return tokenizer
