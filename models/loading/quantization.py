"""Refuse quantized checkpoints that transformers would load without their scales, with a mere warning.

It reads the formats that it knows, or names the package that is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from rollout.models.errors import UnsupportedModel

_SCALES = ("scale", "scales", "scale_inv", "weight_scale", "weight_scale_inv", "weight_packed", "qweight", "absmax")


def refuse_quantization(config: PreTrainedConfig, path: str) -> None:
    """Refuse a format that the installed transformers cannot read.

    Args:
        path: names the model in messages.

    Raises:
        UnsupportedModel: one sentence with the name of the format.
    """
    declared = getattr(config, "quantization_config", None)
    if isinstance(declared, dict):
        method = str(declared.get("quant_method", "bitsandbytes"))  # older checkpoints of bitsandbytes have none
        if not any(name == method or name.startswith(f"{method}_") for name in AUTO_QUANTIZATION_CONFIG_MAPPING):
            raise UnsupportedModel(
                f"path {path!r} is quantized by {method!r}, which the installed transformers cannot read: "
                "give the model before quantization."
            )
    if isinstance(getattr(config, "quantization", None), dict):
        raise UnsupportedModel(
            f"path {path!r} is quantized for MLX, which transformers cannot read: give the model before quantization."
        )


def refuse_unread_scales(path: str, unexpected: Iterable[Any]) -> None:
    """Refuse a checkpoint whose weights were read without the scales that belong to them.

    Args:
        path: names the model in messages.
        unexpected: names of weights that the model has no place for.

    Raises:
        UnsupportedModel: scales are among them.
    """
    scales = sorted(str(name) for name in unexpected if str(name).rsplit(".", 1)[-1] in _SCALES)
    if scales:
        raise UnsupportedModel(
            f"path {path!r} holds quantized weights whose scales transformers does not read ({scales[0]}): "
            "give the model before quantization, or one whose config.json has its quantization_config."
        )
