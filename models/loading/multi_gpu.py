"""Arguments of ``from_pretrained`` for a model on several GPUs: one process's GPUs, or several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from rollout.models.errors import UnsupportedModel

#: Linear layers that compute keys. A tensor parallel plan that splits them must give each process whole heads.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def device_map_options(
    path: str,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    *,
    device: torch.device,
    device_map: str,
) -> dict[str, Any]:
    """Return the arguments that make accelerate spread the layers over this process's CUDA devices.

    Args:
        path: names the model in messages.
        model_class: class of the model, if transformers has one.
        device: the device of this process for a model on one device.

    Raises:
        UnsupportedModel: models of this family must lie on one device.
        ValueError: there is no CUDA device, or fewer devices than processes.
    """
    if device.type != "cuda":
        raise ValueError(
            f"device_map is {device_map!r}, but there is no CUDA device here to spread a model over: "
            "leave device_map unset."
        )
    free_bytes = _free_bytes_per_device()
    if len(free_bytes) > 1 and getattr(model_class, "_is_stateful", False):
        raise UnsupportedModel(
            f"path {path!r} is of model_type {config.model_type!r}, which keeps recurrent states and must lie on "
            "one device: leave device_map unset."
        )
    return {"device_map": device_map, "max_memory": free_bytes}


def refuse_disk_offload(path: str, model: PreTrainedModel) -> None:
    """Refuse a model with weights that accelerate left on the disk: each forward would read them again.

    Raises:
        ValueError: the CUDA devices had no room for some weights.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        devices = ", ".join(map(str, _free_bytes_per_device()))
        raise ValueError(
            f"path {path!r} needs more memory for its weights than is free on the CUDA devices of a process "
            f"({devices}): use more devices, a smaller model, or dtype=bfloat16."
        )


def tensor_parallel_options(path: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments that give each process of this launch a slice of every layer.

    Args:
        path: names the model in messages.

    Raises:
        UnsupportedModel: transformers has no plan for this family, or its heads cannot be shared evenly.
        ValueError: the launch has one process only.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        raise ValueError(
            "tensor_parallel is true, but this launch has one process: start several, for example with "
            "torchrun --nproc_per_node 2, or turn tensor_parallel off."
        )
    decoder = config.get_text_config(decoder=True)
    plan = decoder.base_model_tp_plan
    if not plan:
        raise UnsupportedModel(
            f"path {path!r} is of model_type {config.model_type!r}, for which transformers has no tensor parallel "
            "plan: turn tensor_parallel off."
        )
    heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    splits_heads = any(
        module.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == "colwise" for module, style in plan.items()
    )
    if splits_heads and heads % processes:
        raise UnsupportedModel(
            f"path {path!r} has {heads} key-value heads, which {processes} processes cannot share evenly: start "
            "as many processes as divide them, or turn tensor_parallel off."
        )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _free_bytes_per_device() -> dict[int, int]:
    """Return the free bytes of each CUDA device of this process; the ranks of a machine share its devices evenly.

    Raises:
        ValueError: there are fewer devices than ranks.
    """
    count = torch.cuda.device_count()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > count:
        raise ValueError(
            f"device_map shares {count} CUDA devices among {ranks} processes: start at most one process per device."
        )
    own = range(count * rank // ranks, count * (rank + 1) // ranks)
    return {index: torch.cuda.mem_get_info(index)[0] for index in own}
