"""The place of this process among those that work on the same run, and what ranks of a launch exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from rollout.job.stop_signals import Stopped

T = TypeVar("T")

#: How long tensor-parallel ranks wait for each other's messages. A rank that dies is noticed at once.
_TIMEOUT = timedelta(days=7)


#: What rank 0 tells the other ranks of a tensor-parallel worker.
_SHARED, _IDLE, _ENDED = "shared", "idle", "ended"
#: Where a rank that stops says so, in the store in which the ranks of a launch meet.
_STOP = "rollout/stop"


@dataclass(frozen=True, slots=True)
class Topology:
    """The rank of this process in its launch, and the place of the launch among those that share the run.

    A launch is what ``accelerate launch`` or torchrun starts, on one machine or several: its ranks meet in a process
    group. A process that is started alone is a launch of one rank. The tasks of a SLURM array, and the tasks that
    `srun` starts, are launches of their own that meet in the run's directory alone, unless they start one together.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks of the launch on this machine."""
    launch: int = 0
    launches: int = 1
    tensor_parallel: bool = False
    """Whether the ranks of the launch are one worker: rank 0 does its work, each rank holds a slice of the model."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], tensor_parallel: bool = False) -> Topology:
        """Read the variables that ``accelerate launch`` or torchrun, and SLURM, set."""

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        world_size = number("WORLD_SIZE", 1)
        # Only processes that srun starts are of a step. In the shell of a batch script SLURM_NTASKS may be above 1 too,
        # and there is one process.
        tasks = number("SLURM_STEP_NUM_TASKS", 1) if "SLURM_STEP_ID" in environment else 1
        # Each machine of a launch that torchrun made is a task of the step; where a script sets the ranks itself, all
        # of the step's tasks are.
        machines = min(tasks, number("GROUP_WORLD_SIZE", tasks if world_size > 1 else 1))
        launches, launch = tasks // machines, number("SLURM_PROCID", 0) // machines if tasks > 1 else 0
        if "SUBMITIT_EXECUTOR" not in environment:
            # Of an array that submitit starts, each task is a job of a sweep with a run of its own.
            first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
            launch += (number("SLURM_ARRAY_TASK_ID", first) - first) // step * launches
            launches *= number("SLURM_ARRAY_TASK_COUNT", 1)
        return cls(
            rank=number("RANK", 0),
            world_size=world_size,
            local_world_size=number("LOCAL_WORLD_SIZE", world_size),
            launch=launch,
            launches=launches,
            tensor_parallel=tensor_parallel and world_size > 1,
        )

    @property
    def workers(self) -> int:
        """Number of workers that share the run."""
        return self.launches if self.tensor_parallel else self.world_size * self.launches

    @property
    def worker(self) -> int:
        """Index of this process's worker."""
        return self.launch if self.tensor_parallel else self.launch * self.world_size + self.rank


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

    def announce_stop(self, reason: str) -> None:
        """Tell the other ranks that this one stops, and why; they need not be listening, and the first reason stays."""
        if self._state is not None:
            with suppress(RuntimeError):  # rank 0, which has what is announced, may have ended
                # An empty value stands for a key that is not there.
                _store().compare_set(_STOP, "", reason)

    def announced_stop(self) -> str | None:
        """Return why another rank stops, None if none does."""
        if self._state is None:
            return None
        try:
            return _store().get(_STOP).decode() if _store().check([_STOP]) else None
        except RuntimeError:
            return "the end of rank 0"

    def share(self, requests: Iterable[T]) -> Iterable[T]:
        """Return rank 0's requests; with tensor parallelism, also send each to the ranks in `received`."""
        if not self._topology.tensor_parallel:
            return requests
        # Sent at once, not with the first request: the other ranks must enter the engine when rank 0 does.
        self.broadcast(_SHARED)
        return self._send(requests)

    def _send(self, requests: Iterable[T]) -> Iterator[T]:
        for request in requests:
            yield self.broadcast((request,))[0]
        self.broadcast(())

    def received(self) -> Iterator[Iterator[Any] | None]:
        """Yield each iterable that rank 0 shares, until it calls `end_sharing`; for the other ranks.

        None is for nothing but a look at the signals, which wait while this rank waits for rank 0.
        """
        while (said := self.broadcast(_ENDED)) != _ENDED:
            yield self._receive() if said == _SHARED else None

    def _receive(self) -> Iterator[Any]:
        placeholder: tuple[Any, ...] = ()
        while message := self.broadcast(placeholder):
            yield message[0]

    def idle(self) -> None:
        """Let the other ranks look at their signals; for rank 0, while it has no requests."""
        if self._topology.tensor_parallel:
            self.broadcast(_IDLE)

    def end_sharing(self) -> None:
        """End `received` on the other ranks; for rank 0."""
        if self._topology.tensor_parallel:
            self.broadcast(_ENDED)

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Tell the other ranks if the block is stopped or its run's folder fails, and stop if another rank has.

        Raises:
            Stopped: another rank has stopped, so that what was expected from it does not come.
        """
        try:
            yield
        except (Stopped, OSError):
            self.announce_stop("another rank")
            raise
        except RuntimeError as error:
            if self._state is None or not self._another_stopped():
                raise
            raise Stopped("") from error

    def _another_stopped(self) -> bool:
        try:
            return bool(_store().check([_STOP]))
        except RuntimeError:
            # Rank 0 is gone, and with it what it may have said.
            return False

    def close(self) -> None:
        """Leave the process group; ranks may do so at different times."""
        self._group = None
        if self._state is not None:
            self._state.destroy_process_group()


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
