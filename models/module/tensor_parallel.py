"""Tensor parallelism: find the process group over which a model's weights are sharded."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from rollout.models.errors import UnsupportedModel
from rollout.models.module.inspect import family_name, unwrap_model

_DIMENSION = "tp"
"""Name that transformers gives the dimension of a device mesh, if it names it."""


def tensor_parallel_group(model: nn.Module) -> ProcessGroup | None:
    """Return the tensor-parallel group of a model, None if this process holds the whole model.

    Raises:
        UnsupportedModel: weights are sharded in any other way.
    """
    weights: list[object] = list(model.parameters())  # typed as plain tensors, but may be DTensors
    meshes = {weight.device_mesh for weight in weights if isinstance(weight, DTensor)}
    if not meshes:
        return None
    mesh = next(iter(meshes))
    # Some versions of transformers leave a mesh of this dimension alone unnamed.
    unnamed = mesh.mesh_dim_names is None and mesh.ndim == 1 and unwrap_model(model).tp_size == mesh.size()
    if len(meshes) > 1 or not (unnamed or mesh.mesh_dim_names == (_DIMENSION,)):
        raise UnsupportedModel(
            f"{family_name(model)} has weights sharded over the mesh dimensions {mesh.mesh_dim_names}; only "
            f"{_DIMENSION!r} is supported: gather the weights first."
        )
    group: ProcessGroup = mesh.get_group()
    return group


def broadcast_from_first(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Overwrite a tensor, of the same shape on all ranks, with that of the group's first rank, and return it."""
    torch.distributed.broadcast(tensor, group=group, group_src=0)
    return tensor
