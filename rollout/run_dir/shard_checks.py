"""Check what is on disk of committed shards, and set aside what is damaged so that it is generated again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from rollout.errors import InputError
from rollout.run_dir.file_system import names_in, see_afresh
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.run import RunDir
from rollout.run_dir.run_folders import make_run_folder
from rollout.run_dir.shards import read_manifest

logger = logging.getLogger(__name__)

_NAMED = 5
"""Foreign files that a warning names."""


@dataclass(frozen=True, slots=True)
class DamagedShard:
    """A committed shard that is not what its manifest says."""

    shard: int
    reason: str


def damaged_shards(run: RunDir, *, full: bool) -> Iterator[DamagedShard]:
    """Yield the committed shards whose file is not what the manifest describes.

    Args:
        full: read the files as well, and compare their digests; otherwise their sizes.
    """
    seen_afresh = False
    for shard in sorted(run.committed()):
        reason = damage_of(run, shard, full=full)
        if reason and not seen_afresh:
            # This machine may not see yet what another has put there.
            see_afresh(run.files, run.paths.shards)
            seen_afresh = True
            reason = damage_of(run, shard, full=full)
        if reason:
            yield DamagedShard(shard, reason)


def damage_of(run: RunDir, shard: int, *, full: bool) -> str:
    """Return what is wrong with a committed shard, empty if nothing is, as `damaged_shards` finds it."""
    path = run.paths.shard(shard, run.format)
    try:
        manifest = read_manifest(run.paths.manifest(shard), run.files)
        size = run.files.size(path)
    except FileNotFoundError:
        return "its file is gone"
    except InputError as error:
        return str(error).rstrip(".")
    if (manifest.shard, manifest.file) != (shard, path.name):
        return f"its manifest describes shard {manifest.shard}, {manifest.file}"
    if manifest.fingerprint != run.fingerprint.digest:
        return "its manifest is another run's"
    samples = run.samples_of([shard])
    if manifest.samples != samples:
        return f"its manifest has {manifest.samples} samples instead of {samples}"
    if size != manifest.bytes:
        return f"its file has {size} bytes instead of {manifest.bytes}"
    if full and file_sha256(path, run.files) != manifest.sha256:
        return "its file is not what was written: the SHA-256 differs"
    return ""


def set_aside(run: RunDir, damaged: DamagedShard) -> None:
    """Move a damaged shard out of the way, so that it is generated again."""
    files, paths = run.files, run.paths
    path = paths.shard(damaged.shard, run.format)
    logger.warning(
        "Shard %d is damaged (%s): it is generated again, and what is left of it is moved to %s.",
        damaged.shard,
        damaged.reason,
        paths.damaged,
    )
    make_run_folder(files, paths, paths.damaged)
    # The manifest first: without one, the file counts for nothing.
    for old in (paths.manifest(damaged.shard), path):
        try:
            files.rename(old, paths.damaged / old.name)
        except FileNotFoundError:
            logger.debug("%s is gone already.", old)
    files.sync_folder(paths.shards)


def foreign_files(run: RunDir) -> list[str]:
    """Return the names in ``shards/`` that are not of this run, in order; a loader of ``shards/*`` would read them."""
    paths = run.paths
    own = {path.name for shard in range(run.shards) for path in (paths.manifest(shard), paths.shard(shard, run.format))}
    # NFS gives a name such as .nfs01 to a file that is removed while a process has it open.
    return sorted(name for name in names_in(run.files, paths.shards) if name not in own and not name.startswith(".nfs"))


def warn_of_foreign_files(run: RunDir) -> None:
    """Say which files among the shards are not of this run."""
    if names := foreign_files(run):
        some = ", ".join(ascii(name) for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
        logger.warning(
            "%s holds files that are not of this run, which a loader of all its files reads as well: remove %s.",
            run.paths.shards,
            some,
        )
