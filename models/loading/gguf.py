"""Read GGUF files through transformers into plain modules.

Torch and transformers are imported when a file is read: a job asks for the packaged model's folder before it knows
whether it has anything to generate, and they take seconds.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_gguf(path: Path) -> None:
    """Refuse a GGUF file before loading if the package that reads the format is missing.

    Raises:
        ValueError: the package gguf is not installed.
    """
    if util.find_spec("gguf") is None:
        raise ValueError(f"path {str(path)!r} is a GGUF file, which needs the package gguf: `pip install gguf`.")


def read_model(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Read the model of a GGUF file, with every weight unpacked into plain tensors of ``dtype``."""
    import transformers
    from transformers import AutoModelForCausalLM

    require_gguf(path)
    # By default, newer versions may keep the weights quantized, in modules and with attention of their own.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False, **options
    )
    # The weights are no longer quantized, but transformers refuses to save a model with this field.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    require_gguf(path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    return tokenizer
