"""Processes that hold one model together run one loop each, in lock step: all must decide alike.

What they decide follows from what they are asked and from what they measure. Requests and weights are the same in all;
what is measured is not, so all take the tightest headroom, and the first one's times and draws.
"""

from __future__ import annotations

import weakref

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup

from rollout.headroom.headroom import Headroom
from rollout.models.module.tensor_parallel import broadcast_from_first, tensor_parallel_group
from rollout.models.sampling.sampler import Sampled


class SingleProcess:
    """A process that holds the whole model, and so decides by itself."""

    alone = True

    def headroom(self, own: Headroom) -> Headroom:
        """What all of them have room for."""
        return own

    def measured(self, value: float) -> float:
        """What the first one measured."""
        return value

    def drawn(self, own: Sampled) -> Sampled:
        """What the first one drew."""
        return own

    def all(self, own: bool) -> bool:
        """Whether it is true of all."""
        return own


class TensorParallelSync(SingleProcess):
    """One of several processes. Each must call the same methods in the same order.

    Args:
        group: for tensors where the model is.
    """

    alone = False

    def __init__(self, group: ProcessGroup) -> None:
        # Numbers of the host do not go by way of a GPU.
        host = distributed.new_group(
            distributed.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
        )
        # torch holds them until they are destroyed. Nobody may for longer: the threads of a group end with it, and one
        # that still lets go of a tensor when the interpreter ends takes the whole process down.
        self._group, self._host = weakref.ref(group), weakref.ref(host)

    def headroom(self, own: Headroom) -> Headroom:
        """See `SingleProcess.headroom`."""
        return _Tightest(own, self)

    def measured(self, value: float) -> float:
        """See `SingleProcess.measured`."""
        return float(broadcast_from_first(torch.tensor(value, dtype=torch.float64), _living(self._host)))

    def drawn(self, own: Sampled) -> Sampled:
        """See `SingleProcess.drawn`."""
        tensors = (own.tokens, own.logprobs, own.sampler_logprobs)
        group = _living(self._group)
        return Sampled(*(broadcast_from_first(x.contiguous(), group) for x in tensors))

    def all(self, own: bool) -> bool:
        """See `SingleProcess.all`."""
        return bool(self.least(own))

    def least(self, value: int) -> int:
        """The least of all values."""
        least = torch.tensor(value, dtype=torch.int64)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=_living(self._host))
        return int(least)


def _living(group: weakref.ref[ProcessGroup]) -> ProcessGroup:
    found = group()
    assert found is not None, "the process group was destroyed"
    return found


class _Tightest:
    """Headroom of the process that has least; each holds as much of the model and of its keys and values."""

    def __init__(self, own: Headroom, sync_for: TensorParallelSync) -> None:
        self._own, self._sync = own, sync_for
        self.total_bytes = sync_for.least(own.total_bytes)

    def free_bytes(self) -> int:
        return self._sync.least(self._own.free_bytes())


def sync_for(model: nn.Module) -> SingleProcess:
    """Who decides for a model.

    Raises:
        UnsupportedModel: its weights are sharded in a way that is not served.
    """
    group = tensor_parallel_group(model)
    return SingleProcess() if group is None else TensorParallelSync(group)
