"""Check that a run holds every sample exactly once, from its directory alone: ``python -m rollout.verify DIR``."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollout.argument_parser import SentenceParser
from rollout.errors import Exit, InputError
from rollout.run_dir.part_file import SampleKey, count_lines
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir, read_row_ids, read_run
from rollout.run_dir.shards import (
    COUNTED_COLUMNS,
    Manifest,
    RecordCounts,
    count_table,
    file_sha256,
    read_columns,
    read_manifest,
    read_shard,
)

_EPILOG = "Exit status: 0 the run is complete; 1 it is not, and each finding is printed; 2 there is no run in DIR."
SHOWN = 20
"""Most items of each kind to list; the others are counted."""


@dataclass
class Findings:
    """Differences between what a run's directory holds and what it should hold."""

    expected: int
    found: int = 0
    """Expected samples that are present, once or more."""
    uncommitted: list[str] = field(default_factory=list)
    in_part_files: int = 0
    """Finished samples of shards that are not committed."""
    torn: list[str] = field(default_factory=list)
    """Shards whose file does not match their manifest, with the reason."""
    foreign: list[str] = field(default_factory=list)
    """Files and samples that do not belong to this run."""
    missing: list[SampleKey] = field(default_factory=list)
    duplicated: list[SampleKey] = field(default_factory=list)
    errors: list[tuple[SampleKey, str]] = field(default_factory=list)
    """Samples with an error and its class; they do not make a run incomplete."""

    @property
    def complete(self) -> bool:
        return not (self.uncommitted or self.torn or self.foreign or self.missing or self.duplicated)


def verify(folder: Path) -> Findings:
    """Compare a run's directory with the ids of its input rows.

    Raises:
        InputError: the folder holds no run, or not all of its input rows' ids.
    """
    paths = RunPaths(folder)
    run = read_run(paths)
    row_ids = read_row_ids(paths)
    if len(row_ids) != run.rows:
        raise InputError(f"{paths.rows} holds {len(row_ids)} ids, but the run has {run.rows} input rows.")
    findings = Findings(run.rows * run.samples)
    occurrences = np.zeros((run.rows, run.samples), np.int32)
    """[input rows, samples] records of each sample."""
    for shard in range(run.shards):
        table = _checked_shard(run, shard, findings)
        if table is not None:
            _count_samples(table, row_ids, occurrences, findings)
    _find_foreign_files(run, findings)
    findings.found = int(np.count_nonzero(occurrences))
    findings.missing = _keys_where(occurrences == 0, row_ids)
    findings.duplicated = _keys_where(occurrences > 1, row_ids)
    return findings


def _checked_shard(run: RunDir, shard: int, findings: Findings) -> pa.Table | None:
    """Read a shard's records; None if it is not committed or does not match its manifest."""
    manifest_path, path = run.paths.manifest(shard), run.paths.shard(shard, run.format)
    if not manifest_path.exists():
        findings.uncommitted.append(path.name)
        findings.in_part_files += count_lines(run.paths.part(shard))
        return None
    try:
        manifest = read_manifest(manifest_path)
        if not path.exists():
            raise ValueError("the file is missing")
        if path.stat().st_size != manifest.bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, but its manifest declares {manifest.bytes}")
        if file_sha256(path) != manifest.sha256:
            raise ValueError("its sha256 differs from its manifest's")
        if manifest.fingerprint != run.fingerprint.digest:
            raise ValueError("its manifest has another fingerprint")
        if (manifest.shard, manifest.file) != (shard, path.name):
            raise ValueError(f"its manifest describes shard {manifest.shard}, {manifest.file}")
        _check_columns(read_columns(path), run)
        table = read_shard(path, COUNTED_COLUMNS)
        _check_counts(count_table(table), manifest)
    except ValueError as error:
        findings.torn.append(f"{path.name}: {error}")
        return None
    return table


def _check_columns(found: dict[str, str], run: RunDir) -> None:
    """Refuse other columns than the run's; in JSON lines, only their names are known."""
    typed = run.format == "parquet"
    differing = [
        f"{name} is {found.get(name, 'absent')}"
        for name in dict.fromkeys([*run.columns, *found])
        if name not in found or name not in run.columns or (typed and found[name] != run.columns[name])
    ]
    if differing:
        raise ValueError(f"its columns differ from the run's: {', '.join(differing)}")


def _check_counts(found: RecordCounts, manifest: Manifest) -> None:
    """Refuse a manifest whose counts are not those of the records."""
    for name, value in asdict(found).items():
        declared = getattr(manifest, name)
        # Shards hold rewards in fp32, manifests their sum in fp64.
        close = name == "reward_sum" and math.isclose(value, declared, rel_tol=1e-5, abs_tol=1e-5 * found.rewards)
        if value != declared and not close:
            raise ValueError(f"its manifest declares {name}={declared}, but its records have {name}={value}")


def _count_samples(table: pa.Table, row_ids: pa.ChunkedArray, occurrences: np.ndarray, findings: Findings) -> None:
    """Add a shard's samples to ``occurrences``, and its foreign samples and errors to ``findings``."""
    indices = pc.index_in(table.column("row_id"), value_set=row_ids)
    rows = pc.fill_null(indices, -1).to_numpy()
    samples = table.column("sample").to_numpy()
    known = (rows >= 0) & (samples >= 0) & (samples < occurrences.shape[1])
    np.add.at(occurrences, (rows[known], samples[known]), 1)
    ids = table.column("row_id")
    findings.foreign += [f"{ids[int(i)]} sample {samples[i]}" for i in np.flatnonzero(~known)]
    classes = table.column("error_class")
    for i in np.flatnonzero(pc.not_equal(classes, "").to_numpy()):
        key = SampleKey(ids[int(i)].as_py(), int(samples[i]))
        findings.errors.append((key, classes[int(i)].as_py()))


def _find_foreign_files(run: RunDir, findings: Findings) -> None:
    """Find files that do not belong to the run; a loader of ``shards/*`` would read them."""
    if not run.paths.shards.exists():
        return
    own = {path.name for k in range(run.shards) for path in (run.paths.manifest(k), run.paths.shard(k, run.format))}
    findings.foreign += sorted(file.name for file in run.paths.shards.iterdir() if file.name not in own)


def _keys_where(mask: np.ndarray, row_ids: pa.ChunkedArray) -> list[SampleKey]:
    return [SampleKey(row_ids[int(row)].as_py(), int(sample)) for row, sample in np.argwhere(mask)]


def report(findings: Findings) -> list[str]:
    """Format the findings for the terminal."""
    lines = []
    for title, items in (
        ("shards not committed", findings.uncommitted),
        ("shards torn", findings.torn),
        ("files and samples of no prompt of this run", findings.foreign),
        ("samples missing", [f"{row_id} sample {sample}" for row_id, sample in findings.missing]),
        ("samples duplicated", [f"{row_id} sample {sample}" for row_id, sample in findings.duplicated]),
        ("samples in error", [f"{row_id} sample {sample}: {name}" for (row_id, sample), name in findings.errors]),
    ):
        if items:
            lines.append(f"{title}: {len(items)}")
            lines += [f"  {item}" for item in items[:SHOWN]]
            lines += [f"  and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    if findings.errors:
        classes = Counter(error_class for _, error_class in findings.errors).most_common()
        lines.append("errors by class: " + ", ".join(f"{error_class} {count}" for error_class, count in classes))
    if findings.torn or findings.duplicated:
        lines.append("To generate a shard again, remove its manifest (shards/NNNNN.json) and run the same command.")
    if findings.uncommitted:
        kept = (
            f"; the {findings.in_part_files} samples finished in part files are kept" if findings.in_part_files else ""
        )
        lines.append(f"To resume the run, run the same command again{kept}.")
    verdict = "complete" if findings.complete else "INCOMPLETE"
    lines.append(f"{verdict}: {findings.found} of {findings.expected} samples")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return 0 if the run is complete, 1 if it is not, 2 if there is no run."""
    parser = SentenceParser("python -m rollout.verify", description=__doc__, epilog=_EPILOG)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the output.dir of a run")
    try:
        findings = verify(parser.parse_args(arguments).dir)
    except InputError as error:
        print(error, file=sys.stderr)
        return Exit.BAD_INPUT
    print("\n".join(report(findings)))
    return Exit.COMPLETE if findings.complete else Exit.CRASHED


if __name__ == "__main__":
    sys.exit(main())
