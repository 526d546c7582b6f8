"""Models whose weights several processes hold together, each a slice of them: tensor parallelism."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from rollout.models.errors import UnsupportedModel
from rollout.models.module.inspect import family_name, unwrap_model

_DIMENSION = "tp"
"""What transformers calls it in a device mesh, if it has a name."""


def tensor_parallel_group(model: nn.Module) -> ProcessGroup | None:
    """The processes that compute each forward together, of which this is one; None where it holds the whole model.

    Raises:
        UnsupportedModel: weights are sharded in another way.
    """
    weights: list[object] = list(model.parameters())  # which torch's types take for plain tensors
    meshes = {weight.device_mesh for weight in weights if isinstance(weight, DTensor)}
    if not meshes:
        return None
    mesh = next(iter(meshes))
    # Some versions of transformers give a mesh that is of nothing else no name.
    unnamed = mesh.mesh_dim_names is None and mesh.ndim == 1 and unwrap_model(model).tp_size == mesh.size()
    if len(meshes) > 1 or not (unnamed or mesh.mesh_dim_names == (_DIMENSION,)):
        raise UnsupportedModel(
            f"{family_name(model)} has weights sharded over the mesh dimensions {mesh.mesh_dim_names}, of which "
            f"only {_DIMENSION!r} alone is served: gather the weights first."
        )
    group: ProcessGroup = mesh.get_group()
    return group


def broadcast_from_first(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """A tensor as the first process of a group has it, of the same shape in all; it is overwritten by that."""
    torch.distributed.broadcast(tensor, group=group, group_src=0)
    return tensor
