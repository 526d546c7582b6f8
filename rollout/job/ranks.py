"""Where this process stands among those that work on the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

#: How long ranks that work together wait for each other. One that dies is noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Topology:
    """A rank of a launch, and the launch's place in a SLURM array."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this machine."""
    array_index: int = 0
    array_count: int = 1
    together: bool = False
    """Whether the ranks of the launch are one worker: the first does its work, the others hold a share of its model."""

    @classmethod
    def of(cls, environment: Mapping[str, str], together: bool = False) -> Topology:
        """As ``accelerate launch`` or torchrun, and SLURM, say in environment variables."""

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
            together=together and world_size > 1,
        )

    @property
    def workers(self) -> int:
        """All that share the work of the run."""
        return self.array_count if self.together else self.world_size * self.array_count

    @property
    def worker(self) -> int:
        """This one's number among them."""
        return self.array_index if self.together else self.array_index * self.world_size + self.rank


class Ranks:
    """The ranks of one launch, which start together; a launch of one needs no process group.

    They agree on where to begin, and those that are one worker on what it is asked. For that they talk over the CPU,
    whatever device the model is on.
    """

    def __init__(self, place: Topology) -> None:
        self._place = place
        self._state: Any = None
        self._group: Any = None
        if place.world_size > 1:
            from accelerate import PartialState
            from torch import cuda, distributed

            if place.together and cuda.is_available():
                distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
            self._state = PartialState(cpu=True, **({"timeout": _PATIENCE} if place.together else {}))
            # Without this, ranks that do not see each other would all take themselves for the first.
            assert self._state.num_processes == place.world_size, self._state
            if place.together:
                # The default group lives as long as the model's device mesh, so beyond `close`, and so do its threads:
                # one that still lets go of what was sent when the interpreter ends would abort the process.
                self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def of_first(self, value: T) -> T:
        """What rank 0 calls it with; all ranks call it."""
        if self._state is None:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def shared(self, requests: Iterable[T]) -> Iterable[T]:
        """What the first rank asks its engine, so that those that hold its model with it get it by `followed`."""
        if not self._place.together:
            return requests
        self.of_first(True)  # at once, for the others must begin when this one does
        return self._sent(requests)

    def _sent(self, requests: Iterable[T]) -> Iterator[T]:
        for request in requests:
            yield self.of_first((request,))[0]
        self.of_first(())

    def followed(self) -> Iterator[Iterator[Any]]:
        """All that the first rank shares, until it is `done`; for the other ranks."""
        while self.of_first(False):
            yield self._received()

    def _received(self) -> Iterator[Any]:
        nothing: tuple[Any, ...] = ()
        while received := self.of_first(nothing):
            yield received[0]

    def done(self) -> None:
        """The first rank has no more to share."""
        if self._place.together:
            self.of_first(False)

    def close(self) -> None:
        """Leave the process group; ranks may be done at different times."""
        self._group = None
        if self._state is not None:
            self._state.destroy_process_group()
