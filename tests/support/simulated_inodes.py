"""Files and folders of a simulated disk: what is there, what others still see, and what is flushed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Version(Generic[T]):
    value: T
    machine: str
    time: float
    visible: dict[str, float] = field(default_factory=dict)
    """When each other machine sees it."""


class History(Generic[T]):
    """A value, and what other machines may still believe it to be."""

    __slots__ = ("_versions",)

    def __init__(self, value: T, machine: str, now: float) -> None:
        self._versions = [_Version(value, machine, now)]

    @property
    def latest(self) -> T:
        return self._versions[-1].value

    def put(self, value: T, machine: str, now: float, delay: float) -> None:
        if not delay:
            self._versions.clear()
        # What no machine believes any longer is forgotten.
        while len(self._versions) > 1 and self._versions[1].time <= now - delay:
            del self._versions[0]
        self._versions.append(_Version(value, machine, now))

    def publish(self) -> None:
        """Let all machines see the latest value."""
        del self._versions[:-1]
        self._versions[0].time = -math.inf

    def settled(self, now: float, delay: float) -> bool:
        """Return whether all machines see the latest value."""
        return self._versions[-1].time <= now - delay

    def tell(self, machine: str) -> None:
        """Let a machine know the latest value: the disk has just decided by it."""
        self._versions[-1].visible[machine] = 0.0

    def view(self, machine: str, now: float, delay: float, rng: random.Random, fresh: float = -math.inf) -> T:
        """Return the newest value that a machine has seen, of ``fresh`` or later."""
        for version in reversed(self._versions):
            if version.machine == machine or version.time <= max(now - delay, fresh):
                return version.value
            visible = version.visible.get(machine)
            if visible is None:
                share = rng.choice((0.0, rng.random(), 1.0))
                visible = version.visible[machine] = version.time + share * delay
            if visible <= now:
                return version.value
        return self._versions[0].value


@dataclass(slots=True)
class Write:
    offset: int
    data: bytes
    machine: str


@dataclass(eq=False, slots=True)
class File:
    content: History[bytes]
    durable: bytes = b""
    """What was flushed."""
    writes: list[Write] = field(default_factory=list)
    """Writes since, in their order."""


@dataclass(eq=False, slots=True)
class Folder:
    names: dict[str, History[Inode | None]] = field(default_factory=dict)
    durable: dict[str, Inode] = field(default_factory=dict)
    """The names that were flushed, and all changes before them."""
    pending: list[Change] = field(default_factory=list)
    """Changes since the folder was flushed."""
    removed: bool = False
    fresh: dict[str, float] = field(default_factory=dict)
    """When each machine last changed a name, and saw what others had changed."""

    def inodes(self) -> dict[str, Inode]:
        return {name: inode for name, history in self.names.items() if (inode := history.latest) is not None}


Inode = File | Folder


@dataclass(eq=False, slots=True)
class Change:
    """A change of one name, or of two in a rename; it survives a power cut as a whole or not at all."""

    entries: list[tuple[Folder, str, Inode | None]]
    flushed: bool = False

    def apply(self) -> None:
        for folder, name, inode in self.entries:
            if inode is None:
                folder.durable.pop(name, None)
            else:
                folder.durable[name] = inode
