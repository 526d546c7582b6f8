"""Make models with random weights in the shape of known ones, for machines without weights.

``random:NAME`` on a command line is a folder with a configuration and nothing else: weights are drawn on the device
that they are used on, prompts are drawn tokens, and no engine needs a tokenizer. Speed does not depend on what the
numbers are, as long as no text ends before its time.

Engines that convert a model first need weights and a tokenizer in files; this writes such a folder, with the packaged
model's tokenizer:

    python -m jobs.bench.lib.random_models random:qwen2.5-0.5b FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from jobs.bench import peer_envs

PREFIX = "random:"
_LLAMA_3_1_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: What the smaller models of Qwen2.5 have in common.
_QWEN2_5: dict[str, Any] = {
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "architectures": ["Qwen2ForCausalLM"],
}
#: Model type and configuration, as published with the models.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14} | _QWEN2_5,
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12} | _QWEN2_5,
    ),
    "llama-3.1-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
        | {"rope_parameters": _LLAMA_3_1_ROPE, "tie_word_embeddings": False}
        | {"bos_token_id": 128_000, "eos_token_id": 128_009, "architectures": ["LlamaForCausalLM"]},
    ),
    # For trying out the commands.
    "tiny": (
        "llama",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 199, "max_position_embeddings": 4096, "tie_word_embeddings": True}
        | {"bos_token_id": 1, "eos_token_id": 2, "architectures": ["LlamaForCausalLM"]},
    ),
}


def resolve(model: str) -> str:
    """Return the folder or file of a model named on a command line.

    Raises:
        ValueError: there is no such model.
    """
    # Slow to import, and not needed to refuse a mistyped command.
    from rollout.models.loading.load import resolve_path

    # Engines run in another working directory.
    return str(folder(model) if model.startswith(PREFIX) else Path(resolve_path(model)).resolve())


def folder(name: str) -> Path:
    """Return the folder of ``random:NAME``; write it if it is missing.

    Raises:
        ValueError: there is no such name.
    """
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        known = ", ".join(PREFIX + each for each in SHAPES)
        raise ValueError(f"no model {name!r}: there are {known}")
    from transformers import AutoConfig

    model_type, fields = SHAPES[shape]
    made = peer_envs.ROOT / "models" / "random" / shape
    AutoConfig.for_model(model_type, **fields, dtype="bfloat16").save_pretrained(made)
    return made


def write(name: str, into: Path) -> None:
    """Write a model with drawn weights in bfloat16 and the packaged model's tokenizer, whose ids its vocabulary has.

    Raises:
        ValueError: there is no such name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rollout.models.loading.load import ModelSource, load_tokenizer, resolve_path

    config = AutoConfig.from_pretrained(folder(name))
    tokenizer = load_tokenizer(ModelSource(resolve_path("packaged:SmolLM2-135M-Instruct")))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(into)
    cast(Any, tokenizer).save_pretrained(into)


def main() -> None:
    """Write a model's folder."""
    parser = argparse.ArgumentParser(description="Writes a model with random weights.")
    parser.add_argument("name", help=", ".join(PREFIX + shape for shape in SHAPES))
    parser.add_argument("into", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    try:
        write(given.name, given.into)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
