"""The place of this process among those that work on the same run, and what ranks of a launch exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

#: How long tensor-parallel ranks wait for each other's messages. A rank that dies is noticed at once.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Topology:
    """The rank of this process in its launch, and the index of the launch in a SLURM array."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this machine."""
    array_index: int = 0
    array_count: int = 1
    tensor_parallel: bool = False
    """Whether the ranks of the launch are one worker: rank 0 does its work, each rank holds a slice of the model."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], tensor_parallel: bool = False) -> Topology:
        """Read the variables that ``accelerate launch`` or torchrun, and SLURM, set."""

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        world_size = number("WORLD_SIZE", 1)
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        return cls(
            rank=number("RANK", 0),
            world_size=world_size,
            local_world_size=number("LOCAL_WORLD_SIZE", world_size),
            array_index=(number("SLURM_ARRAY_TASK_ID", first) - first) // step,
            array_count=number("SLURM_ARRAY_TASK_COUNT", 1),
            tensor_parallel=tensor_parallel and world_size > 1,
        )

    @property
    def workers(self) -> int:
        """Number of workers that share the run."""
        return self.array_count if self.tensor_parallel else self.world_size * self.array_count

    @property
    def worker(self) -> int:
        """Index of this process's worker."""
        return self.array_index if self.tensor_parallel else self.array_index * self.world_size + self.rank


class Ranks:
    """The ranks of one launch; a launch of one needs no process group.

    All ranks agree on whether there is work, and tensor-parallel ranks on the requests to run. Messages go over the
    CPU, whatever device the model is on.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._state: Any = None
        self._group: Any = None
        if topology.world_size > 1:
            from accelerate import PartialState
            from torch import cuda, distributed

            if topology.tensor_parallel and cuda.is_available():
                distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
            timeout = {"timeout": _TIMEOUT} if topology.tensor_parallel else {}
            self._state = PartialState(cpu=True, **timeout)
            # Ranks that do not see each other would all act as rank 0.
            assert self._state.num_processes == topology.world_size, self._state
            if topology.tensor_parallel:
                # The default group and its threads live as long as the model's device mesh, beyond `close`. A thread
                # that still frees a message when the interpreter exits would abort the process.
                self._group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value; all ranks must call it."""
        if self._state is None:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def share(self, requests: Iterable[T]) -> Iterable[T]:
        """Return rank 0's requests; with tensor parallelism, also send each to the ranks in `received`."""
        if not self._topology.tensor_parallel:
            return requests
        # Sent at once, not with the first request: the other ranks must enter the engine when rank 0 does.
        self.broadcast(True)
        return self._send(requests)

    def _send(self, requests: Iterable[T]) -> Iterator[T]:
        for request in requests:
            yield self.broadcast((request,))[0]
        self.broadcast(())

    def received(self) -> Iterator[Iterator[Any]]:
        """Yield each iterable that rank 0 shares, until it calls `end_sharing`; for the other ranks."""
        while self.broadcast(False):
            yield self._receive()

    def _receive(self) -> Iterator[Any]:
        placeholder: tuple[Any, ...] = ()
        while message := self.broadcast(placeholder):
            yield message[0]

    def end_sharing(self) -> None:
        """End `received` on the other ranks; for rank 0."""
        if self._topology.tensor_parallel:
            self.broadcast(False)

    def close(self) -> None:
        """Leave the process group; ranks may do so at different times."""
        self._group = None
        if self._state is not None:
            self._state.destroy_process_group()
