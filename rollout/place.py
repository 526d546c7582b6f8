"""Where this process stands among those that work on the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A rank of a launch, and the launch's place in a SLURM array."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this machine."""
    array_index: int = 0
    array_count: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
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
        )

    @property
    def workers(self) -> int:
        """All processes that share the run."""
        return self.world_size * self.array_count

    @property
    def worker(self) -> int:
        """This one's number among them."""
        return self.array_index * self.world_size + self.rank


class Ranks:
    """The ranks of one launch, which start together; a launch of one needs no process group.

    They only agree on where to begin, so they talk over the CPU, whatever device the model is on.
    """

    def __init__(self, place: Place) -> None:
        self._state: Any = None
        if place.world_size > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=True)
            # Without this, ranks that do not see each other would all take themselves for the first.
            assert self._state.num_processes == place.world_size, self._state

    def of_first(self, value: T) -> T:
        """What rank 0 calls it with; all ranks call it."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group; ranks may be done at different times."""
        if self._state is not None:
            self._state.destroy_process_group()
