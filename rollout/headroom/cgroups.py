"""Find the control groups of this process, which limit a container or job below its machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A folder of one controller's files."""

    folder: Path
    version: Literal[1, 2]


def cgroups(controller: str, membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> Iterator[Cgroup]:
    """Yield the cgroups of ``controller`` around this process, innermost first; the limits of all of them apply.

    Inside a container the path may be the host's, with only the mount's root visible; missing folders are skipped.

    Args:
        controller: ``memory`` or ``cpu``.
        membership: file that lists this process's cgroups.
        mount: where cgroups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = (mount / "unified" if (mount / "unified").is_dir() else mount), 2
        elif controller in controllers.split(","):
            base, version = mount / controller, 1
        else:
            continue
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            if folder.is_dir():
                yield Cgroup(folder, 2 if version == 2 else 1)
