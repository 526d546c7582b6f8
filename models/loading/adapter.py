"""Load a PEFT adapter onto its base model: its added tokens, its weights, and a sentence where it does not fit."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from rollout.models.errors import UnsupportedModel, clause
from rollout.models.loading.checkpoint import ADAPTER_WEIGHTS, check_adapter
from rollout.models.module.adapters import why_unsupported
from rollout.models.module.inspect import output_device, vocabulary_size

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
#: What follows the name of an embedding in an adapter's file, and the dimension of its tensor that counts tokens.
_TOKEN_DIMENSIONS = {
    "weight": 0,
    "base_layer.weight": 0,
    "modules_to_save.weight": 0,
    "lora_embedding_A": 1,
    "lora_B.weight": 0,
}
#: Tokens whose logits are compared before and after an adapter is merged, and how far they may be from each other,
#: relative to their norm: merged weights are rounded.
_MERGE_TOKENS = 8
_MERGE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_MERGE_TOLERANCE = 0.3
_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[[^]]*\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[[^]]*\])\)"
)


def require_adapter(folder: Path) -> Any:
    """Return the ``PeftConfig`` of an adapter that can be loaded here, before its base model is loaded.

    Raises:
        UnsupportedModel: adapters of its type are not served.
        ValueError: it is no adapter for a causal language model, cannot be read, or PEFT is missing.
    """
    check_adapter(folder)
    if util.find_spec("peft") is None:
        raise ValueError("adapter needs the package peft: `pip install 'rollout[peft]'`.")
    from peft import PeftConfig  # an optional dependency, slow to import

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(f"adapter {str(folder)!r} cannot be read ({clause(error)}).") from error
    reason = why_unsupported(config)
    if reason:
        raise UnsupportedModel(f"adapter {str(folder)!r} {reason}, which is not served here: choose another adapter.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"adapter {str(folder)!r} was trained for the task {config.task_type}: give one for CAUSAL_LM."
        )
    return config


def with_adapter(
    model: PreTrainedModel, folder: Path, config: Any, device: torch.device, tokenizer_size: int | None
) -> nn.Module:
    """Load an adapter and merge it into the weights; one that cannot be merged stays around the module.

    If the adapter was trained with another number of tokens, the embeddings are resized to it first.

    Args:
        config: what `require_adapter` returned.
        tokenizer_size: number of ids of the adapter's own tokenizer, None if it has none.

    Raises:
        ValueError: it does not fit the model; the message names the first tensor that does not.
    """
    from peft import PeftModel

    _resize_embeddings(model, folder, config, tokenizer_size)
    remedy = "set path to the model it was trained on"
    try:
        with warnings.catch_warnings():
            # PEFT only warns about adapter weights that it did not find, and ignores those that it has no place for.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            wrapped = PeftModel.from_pretrained(model, str(folder), config=config, torch_device=str(device))
    except Exception as error:
        raise ValueError(
            f"adapter {str(folder)!r} does not fit the model at path ({_why_not(error)}): {remedy}."
        ) from error
    names = _ignored_weights(wrapped, folder)
    if names:
        raise ValueError(
            f"adapter {str(folder)!r} does not fit the model at path (it has {len(names)} weights that the model has "
            f"no place for, such as {names[0]}): {remedy}."
        )
    return _merged(wrapped, folder)


def _merged(wrapped: Any, folder: Path) -> nn.Module:
    """Return the plain module with the adapter merged, or the wrapped one if this adapter cannot be merged."""
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        return _unmerged(wrapped, "its type has no way to")
    if _changes_shared_weights(wrapped):
        return _unmerged(wrapped, "it changes some layers that share their weights with others")
    expected = _logits(wrapped)
    try:
        model: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:
        if "NaN" in str(error):
            raise ValueError(
                f"adapter {str(folder)!r} makes weights that are no numbers ({clause(error)}): train it again, or set "
                "dtype=float32."
            ) from error
        model = _unmerged(wrapped, clause(error))
    # An attempt that failed may have changed the module.
    distance = float((_logits(model) - expected).norm() / expected.norm())
    if not distance <= _MERGE_TOLERANCE.get(wrapped.dtype, _HALF_MERGE_TOLERANCE):
        raise ValueError(
            f"adapter {str(folder)!r} gives other results when it is merged into the weights (relative distance "
            f"{distance:.2g}): call the library with the PEFT model itself."
        )
    return model


def _unmerged(wrapped: Any, reason: str) -> nn.Module:
    """Return the wrapped module and log why it stays wrapped."""
    logger.info("The adapter is not merged into the weights (%s): it runs beside them, which is slower.", reason)
    plain: nn.Module = wrapped
    return plain


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    """Return the logits [tokens, V] of a few tokens, in eval mode."""
    ids = torch.arange(3, 3 + _MERGE_TOKENS, device=output_device(model))[None] % vocabulary_size(model)
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def _changes_shared_weights(wrapped: nn.Module) -> bool:
    """Return whether an adapter changes a layer whose weights another layer has too, such as tied embeddings."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    counts = Counter(id(weight) for _, weight in wrapped.named_parameters(remove_duplicate=False))
    layers = [module.get_base_layer() for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    return any(counts[id(weight)] > 1 for layer in layers for weight in layer.parameters())


def _resize_embeddings(model: PreTrainedModel, folder: Path, config: Any, tokenizer_size: int | None) -> None:
    """Give the model as many tokens as the adapter was trained with."""
    rows = vocabulary_size(model)
    stored = _stored_tokens(model, folder)
    wanted = stored or max(rows, tokenizer_size or 0, 1 + max(_token_indices(config), default=-1))
    if wanted == rows:
        return
    logger.info("The adapter resizes the model's vocabulary from %d to %d tokens.", rows, wanted)
    # New rows that the adapter does not store are drawn at random, so they must be the same in every process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(wanted, mean_resizing=stored is None)
    if stored is None:
        logger.warning(
            "The adapter's tokenizer has %d more tokens than the model, but the adapter stores no embeddings for all "
            "of them; those missing are set to the mean of the others, as resize_token_embeddings does.",
            wanted - rows,
        )


def _ignored_weights(wrapped: Any, folder: Path) -> list[str]:
    """Return the names of weights in an adapter's file that PEFT would not write for the loaded model, sorted."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    embeddings = tuple(f"{_PREFIX}{name}." for name in _embedding_names(wrapped.get_base_model()))
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return sorted(name for name in set(file.keys()) - own if not name.startswith(embeddings))


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that embed tokens and compute logits."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is found for found in embeddings)]


def _stored_tokens(model: PreTrainedModel, folder: Path) -> int | None:
    """Return the number of tokens of the embeddings in an adapter's file; None if it holds none."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name in _embedding_names(model):
                for tail, dimension in _TOKEN_DIMENSIONS.items():
                    key = f"{_PREFIX}{name}.{tail}"
                    if key in file.keys():  # noqa: SIM118 - the file is no mapping
                        return int(file.get_slice(key).get_shape()[dimension])
    except Exception as error:
        raise ValueError(f"adapter {str(folder)!r} cannot be read ({clause(error)}): copy it again.") from error
    return None


def _token_indices(config: Any) -> list[int]:
    """Return the ids of the tokens that an adapter trains by themselves."""
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [int(index) for some in lists for index in some]


def _why_not(error: Exception) -> str:
    """Return why PEFT could not load an adapter: the first tensor of another size, or the error's first line."""
    found = _SIZE_MISMATCH.search(str(error))
    if found is None:
        return clause(error)
    name, in_adapter, in_model = found.groups()
    return f"{name.removeprefix(_PREFIX)} is {in_adapter} in the adapter, but {in_model} in the model"
