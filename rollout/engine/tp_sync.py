"""Agreement among the ranks of a tensor-parallel model, whose loops run in lock step.

Every rank must take the same decisions. Requests and weights are the same on all ranks; measurements are not, so every
rank uses the smallest headroom, and the times and sampled tokens of rank 0.
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
    """A process that holds the whole model and need not agree with others."""

    alone = True

    def headroom(self, own: Headroom) -> Headroom:
        """Return the smallest headroom of all ranks."""
        return own

    def first_rank_value(self, value: float) -> float:
        """Return the value that rank 0 measured."""
        return value

    def first_rank_tokens(self, own: Sampled) -> Sampled:
        """Return the tokens that rank 0 sampled."""
        return own

    def first_rank_samples(self, own: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """Return the samples (row id, index) that rank 0 names."""
        return own

    def all(self, own: bool) -> bool:
        """Return whether ``own`` is true on all ranks."""
        return own


class TensorParallelSync(SingleProcess):
    """One of several ranks, which must all call the same methods in the same order.

    Args:
        group: the ranks, with a backend for tensors on the model's device.
    """

    alone = False

    def __init__(self, group: ProcessGroup) -> None:
        # Host numbers must not take the way over a GPU.
        host = distributed.new_group(
            distributed.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
        )
        # torch keeps the groups alive until they are destroyed, and we must not keep them longer: a group's threads end
        # with it, and a thread that frees a tensor while the interpreter shuts down aborts the process.
        self._group = weakref.ref(group)
        self._host_group = weakref.ref(host)

    def headroom(self, own: Headroom) -> Headroom:
        """See `SingleProcess.headroom`."""
        return _SmallestHeadroom(own, self)

    def first_rank_value(self, value: float) -> float:
        """See `SingleProcess.first_rank_value`."""
        return float(broadcast_from_first(torch.tensor(value, dtype=torch.float64), _alive(self._host_group)))

    def first_rank_tokens(self, own: Sampled) -> Sampled:
        """See `SingleProcess.first_rank_tokens`."""
        group = _alive(self._group)
        return Sampled(
            tokens=broadcast_from_first(own.tokens.contiguous(), group),
            logprobs=broadcast_from_first(own.logprobs.contiguous(), group),
            sampler_logprobs=broadcast_from_first(own.sampler_logprobs.contiguous(), group),
        )

    def first_rank_samples(self, own: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """See `SingleProcess.first_rank_samples`."""
        named = [sorted(own)]
        distributed.broadcast_object_list(named, group=_alive(self._host_group), group_src=0)
        return frozenset(named[0])

    def all(self, own: bool) -> bool:
        """See `SingleProcess.all`."""
        return bool(self.smallest(own))

    def smallest(self, value: int) -> int:
        """Return the smallest value of all ranks."""
        smallest = torch.tensor(value, dtype=torch.int64)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN, group=_alive(self._host_group))
        return int(smallest)


def _alive(group: weakref.ref[ProcessGroup]) -> ProcessGroup:
    found = group()
    assert found is not None, "the process group was destroyed"
    return found


class _SmallestHeadroom:
    """Headroom of the rank with the least; every rank holds an equal share of the model and of the KV cache."""

    def __init__(self, own: Headroom, sync: TensorParallelSync) -> None:
        self._own = own
        self._sync = sync
        self.total_bytes = sync.smallest(own.total_bytes)

    def free_bytes(self) -> int:
        return self._sync.smallest(self._own.free_bytes())


def sync_for(model: nn.Module) -> SingleProcess:
    """Return the synchronisation that ``model`` needs.

    Raises:
        UnsupportedModel: the weights are sharded in an unsupported way.
    """
    group = tensor_parallel_group(model)
    return SingleProcess() if group is None else TensorParallelSync(group)
