"""``python -m rollout.verify DIR``: is every sample there exactly once? Reads what is on disk alone."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollout.errors import Exit, InputError
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir, read_row_ids, read_run
from rollout.run_dir.shards import file_sha256, read_manifest, read_shard

SHOWN = 20
"""So many of a kind are named; the rest is counted."""

Sample = tuple[str, int]
"""Row id and sample."""


@dataclass
class Findings:
    """What a run's folder holds, against what it should."""

    expected: int
    found: int = 0
    """Samples of the input that are there, once or more."""
    uncommitted: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    """Shards whose file is not what the manifest says, with the reason."""
    foreign: list[str] = field(default_factory=list)
    """Files and samples that are not of this run."""
    missing: list[Sample] = field(default_factory=list)
    doubled: list[Sample] = field(default_factory=list)
    errors: list[tuple[Sample, str]] = field(default_factory=list)
    """Error records, with their class: a run is complete with them."""

    @property
    def complete(self) -> bool:
        return not (self.uncommitted or self.torn or self.foreign or self.missing or self.doubled)


def verify(folder: Path) -> Findings:
    """Reconcile a folder with the input of its run.

    Raises:
        InputError: the folder holds no run.
    """
    paths = RunPaths(folder)
    run = read_run(paths)
    row_ids = read_row_ids(paths)
    if len(row_ids) != run.rows:
        raise InputError(f"{paths.rows} holds {len(row_ids)} ids, but the run has {run.rows} rows.")
    findings = Findings(run.rows * run.samples)
    times = np.zeros((run.rows, run.samples), np.int32)
    """How often each sample was seen."""
    for shard in range(run.shards):
        table = _checked_shard(run, shard, findings)
        if table is not None:
            _count(table, row_ids, times, findings)
    _look_for_foreign_files(run, findings)
    findings.found = int(np.count_nonzero(times))
    findings.missing = _named(times == 0, row_ids)
    findings.doubled = _named(times > 1, row_ids)
    return findings


def _checked_shard(run: RunDir, shard: int, findings: Findings) -> pa.Table | None:
    """The shard's records, if it is committed and whole."""
    manifest_path, path = run.paths.manifest(shard), run.paths.shard(shard, run.format)
    if not manifest_path.exists():
        findings.uncommitted.append(path.name)
        return None
    try:
        manifest = read_manifest(manifest_path)
        if not path.exists():
            raise ValueError("the file is missing")
        if path.stat().st_size != manifest.bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, the manifest says {manifest.bytes}")
        if file_sha256(path) != manifest.sha256:
            raise ValueError("its sha256 is not that of the manifest")
        if manifest.fingerprint != run.fingerprint.digest:
            raise ValueError("its manifest is of another fingerprint")
        table = read_shard(path, ["row_id", "sample", "error_class"])
        rows = pc.count_distinct(table.column("row_id")).as_py()
        if (table.num_rows, rows) != (manifest.samples, manifest.rows):
            raise ValueError(
                f"it has {table.num_rows} samples of {rows} rows, "
                f"the manifest says {manifest.samples} of {manifest.rows}"
            )
    except ValueError as error:
        findings.torn.append(f"{path.name}: {error}")
        return None
    return table


def _count(table: pa.Table, row_ids: pa.ChunkedArray, times: np.ndarray, findings: Findings) -> None:
    indices = pc.index_in(table.column("row_id"), value_set=row_ids)
    rows = pc.fill_null(indices, -1).to_numpy()
    samples = table.column("sample").to_numpy()
    known = (rows >= 0) & (samples >= 0) & (samples < times.shape[1])
    np.add.at(times, (rows[known], samples[known]), 1)
    names = table.column("row_id")
    findings.foreign += [f"{names[int(at)]} sample {samples[at]}" for at in np.flatnonzero(~known)]
    classes = table.column("error_class")
    in_error = np.flatnonzero(pc.not_equal(classes, "").to_numpy())
    findings.errors += [((names[int(at)].as_py(), int(samples[at])), classes[int(at)].as_py()) for at in in_error]


def _look_for_foreign_files(run: RunDir, findings: Findings) -> None:
    """Whoever loads ``shards/*`` would load these too."""
    if not run.paths.shards.exists():
        return
    own = {path.name for k in range(run.shards) for path in (run.paths.manifest(k), run.paths.shard(k, run.format))}
    findings.foreign += sorted(file.name for file in run.paths.shards.iterdir() if file.name not in own)


def _named(where: np.ndarray, row_ids: pa.ChunkedArray) -> list[Sample]:
    return [(row_ids[int(row)].as_py(), int(sample)) for row, sample in np.argwhere(where)]


def report(findings: Findings) -> list[str]:
    """The findings, for people."""
    lines = []
    for title, items in (
        ("shards not committed", findings.uncommitted),
        ("shards torn", findings.torn),
        ("not of this run", findings.foreign),
        ("samples missing", [f"{row_id} sample {sample}" for row_id, sample in findings.missing]),
        ("samples doubled", [f"{row_id} sample {sample}" for row_id, sample in findings.doubled]),
        ("samples in error", [f"{row_id} sample {sample}: {kind}" for (row_id, sample), kind in findings.errors]),
    ):
        if items:
            lines.append(f"{title}: {len(items)}")
            lines += [f"  {item}" for item in items[:SHOWN]]
            lines += [f"  and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    if findings.errors:
        classes = Counter(kind for _, kind in findings.errors).most_common()
        lines.append("errors by class: " + ", ".join(f"{kind} {count}" for kind, count in classes))
    if findings.torn or findings.doubled:
        lines.append("To have a shard made again, remove its manifest (shards/NNNNN.json) and run the same command.")
    if findings.uncommitted:
        lines.append("To go on, run the same command again.")
    verdict = "complete" if findings.complete else "INCOMPLETE"
    lines.append(f"{verdict}: {findings.found} of {findings.expected} samples")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is found, and return 0 if the run is complete, 1 if not, 2 if there is no run."""
    parser = argparse.ArgumentParser("python -m rollout.verify", description=__doc__)
    parser.add_argument("dir", type=Path, help="the output.dir of a run")
    folder = parser.parse_args(arguments).dir
    try:
        findings = verify(folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return Exit.BAD_INPUT
    print("\n".join(report(findings)))
    return Exit.COMPLETE if findings.complete else Exit.CRASHED


if __name__ == "__main__":
    sys.exit(main())
