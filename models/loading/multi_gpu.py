"""Where a model's weights go: to one device, over several of this process, or in slices to several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from rollout.models.errors import UnsupportedModel

#: Whose results hold keys; where a plan gives each process some of them, these are whole heads or nothing.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def spread(path: str, config: PreTrainedConfig, device: torch.device, device_map: str) -> dict[str, Any]:
    """What ``from_pretrained`` must be told for accelerate to spread the layers over the CUDA devices of this process.

    Args:
        path: how messages name the model.
        device: of this process, were it for a model on one.

    Raises:
        UnsupportedModel: models of this family must lie on one device.
        ValueError: there are no CUDA devices, or fewer than processes.
    """
    if device.type != "cuda":
        raise ValueError(
            f"model.device_map is {device_map!r}, but there is no CUDA device here to spread a model over: "
            "set model.device_map=null."
        )
    memory = _own_memory()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if len(memory) > 1 and getattr(known, "_is_stateful", False):
        raise UnsupportedModel(
            f"model.path {path!r} is of model_type {config.model_type!r}, which keeps recurrent states and must lie on "
            "one device: set model.device_map=null."
        )
    return {"device_map": device_map, "max_memory": memory}


def check_spread(path: str, model: PreTrainedModel) -> None:
    """Refuse what found no room on CUDA devices: each forward would read it from the disk.

    Raises:
        ValueError: accelerate had no other place for some weights.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            f"model.path {path!r} needs more memory for its weights than is free on the CUDA devices of a process "
            f"({', '.join(map(str, _own_memory()))}): take more devices, a smaller model, or model.dtype=bfloat16."
        )


def sliced(path: str, config: PreTrainedConfig) -> dict[str, Any]:
    """What ``from_pretrained`` must be told to give each process of this launch a slice of every layer.

    Args:
        path: how messages name the model.

    Raises:
        UnsupportedModel: transformers has no plan for this family, or its heads do not come out even.
        ValueError: there is but one process.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        raise ValueError(
            "model.tensor_parallel is true, but this launch has one process: start several, for example with "
            "torchrun --nproc_per_node 2, or set model.tensor_parallel=false."
        )
    text = config.get_text_config(decoder=True)
    plan = text.base_model_tp_plan
    if not plan:
        raise UnsupportedModel(
            f"model.path {path!r} is of model_type {config.model_type!r}, for which transformers has no plan of tensor "
            "parallelism: set model.tensor_parallel=false."
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    by_heads = any(rule.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and way == "colwise" for rule, way in plan.items())
    if by_heads and heads % processes:
        raise UnsupportedModel(
            f"model.path {path!r} has {heads} key-value heads, which {processes} processes cannot share evenly: start "
            "as many processes as divide them, or set model.tensor_parallel=false."
        )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _own_memory() -> dict[int, int]:
    """The CUDA devices of this process and what each has free: the ranks of a machine share its devices evenly.

    Raises:
        ValueError: there are fewer devices than ranks.
    """
    count = torch.cuda.device_count()
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if ranks > count:
        raise ValueError(f"{ranks} processes share {count} CUDA devices: start at most one process a device.")
    own = range(count * rank // ranks, count * (rank + 1) // ranks)
    return {index: torch.cuda.mem_get_info(index)[0] for index in own}
