"""Check that a run holds every sample exactly once, from its directory alone: ``python -m rollout.verify DIR``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from rollout.argument_parser import SentenceParser
from rollout.errors import Exit, InputError
from rollout.logs import say
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.missing_tasks import missing_tasks
from rollout.run_dir.part_file import ShardKey, read_parts
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.row_ids_file import check_row_ids, read_row_ids
from rollout.run_dir.run import RunDir, read_run
from rollout.run_dir.shard_checks import foreign_files
from rollout.run_dir.shard_comparison import SHOWN, Codes, Listed, ShardComparison, ShardRecords
from rollout.run_dir.shards import Manifest, RecordCounts, read_columns, read_manifest

_EPILOG = "Exit status: 0 the run is complete; 1 it is not, and each finding is printed; 2 there is no run in DIR."


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
    foreign: Listed[str] = field(default_factory=Listed)
    """Files and samples that do not belong to this run."""
    missing: Listed[SampleKey] = field(default_factory=Listed)
    duplicated: Listed[SampleKey] = field(default_factory=Listed)
    errors: Listed[tuple[SampleKey, str]] = field(default_factory=Listed)
    """Samples with an error and its class; they do not make a run incomplete."""
    error_classes: Counter[str] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        return not (self.uncommitted or self.torn or self.foreign or self.missing or self.duplicated)


def verify(folder: Path) -> Findings:
    """Compare a run's directory with the ids of its input rows.

    Records are read in batches, so memory does not grow with the run, but by a few bytes for each sample at fault.

    Raises:
        InputError: the folder holds no run, or not all of its input rows' ids.
    """
    paths = RunPaths(folder)
    run = read_run(paths)
    check_row_ids(paths.rows, run.rows_sha256)
    row_ids = read_row_ids(paths.rows)
    if len(row_ids) != run.rows:
        raise InputError(f"{paths.rows} holds {len(row_ids)} ids, but the run has {run.rows} input rows.")
    comparison = ShardComparison(run, row_ids)
    findings = Findings(run.rows * run.samples)
    samples = _SamplesAtFault(comparison)
    for shard in range(run.shards):
        records = _checked_shard(run, shard, comparison, findings)
        if records is None:
            samples.gone.append(shard)
        else:
            findings.foreign.extend(records.foreign.first, len(records.foreign))
            findings.errors.extend(records.errors.first, len(records.errors))
            findings.error_classes.update(records.counts.errors)
            samples.add(shard, records)
    files = foreign_files(run)
    findings.foreign.extend(files, len(files))
    samples.resolve(findings)
    findings.found = findings.expected - len(findings.missing)
    return findings


class _SamplesAtFault:
    """Samples that shards lack, have twice, or have though they are another's."""

    def __init__(self, comparison: ShardComparison) -> None:
        self._comparison = comparison
        self.gone: list[int] = []
        """Shards of which no sample is there."""
        self._missing: dict[int, Codes] = {}
        self._duplicated: list[Codes] = []
        self._strays: list[Codes] = []

    def add(self, shard: int, records: ShardRecords) -> None:
        """Take the samples of a shard that differ from what it should hold."""
        for kept, codes in ((self._duplicated, records.duplicated), (self._strays, records.strays)):
            if len(codes):
                kept.append(codes)
        if len(records.missing):
            self._missing[shard] = records.missing

    def resolve(self, findings: Findings) -> None:
        """Find out which samples are missing from the whole run, and which it has twice."""
        none = np.zeros(0, np.int64)
        strays, counts = np.unique(np.concatenate([none, *self._strays]), return_counts=True)
        lacking: dict[int, Codes | range] = {shard: self._comparison.codes(shard) for shard in self.gone}
        lacking |= self._missing
        elsewhere = np.zeros(len(strays), np.bool_)
        """Whether a stray sample is missing from its own shard."""
        for codes in lacking.values():
            low, high = np.searchsorted(strays, [codes[0], codes[-1] + 1])
            within = strays[low:high]
            elsewhere[low:high] |= True if isinstance(codes, range) else np.isin(within, codes, assume_unique=True)
        missing = (int(code) for shard in sorted(lacking) for code in _without(lacking[shard], strays))
        count = sum(map(len, lacking.values())) - int(np.count_nonzero(elsewhere))
        findings.missing.extend(map(self._comparison.key, missing), count)
        twice = np.unique(np.concatenate([none, *self._duplicated, strays[~elsewhere | (counts > 1)]]))
        findings.duplicated.extend((self._comparison.key(int(code)) for code in twice), len(twice))


def _without(codes: Codes | range, strays: Codes) -> Iterator[int]:
    """Yield the codes that are not among sorted strays."""
    for code in codes:
        place = int(np.searchsorted(strays, code))
        if place == len(strays) or strays[place] != code:
            yield code


def _checked_shard(run: RunDir, shard: int, comparison: ShardComparison, findings: Findings) -> ShardRecords | None:
    """Compare a shard; None if it is not committed or does not match its manifest."""
    manifest_path, path = run.paths.manifest(shard), run.paths.shard(shard, run.format)
    if not manifest_path.exists():
        findings.uncommitted.append(path.name)
        key = ShardKey(run.fingerprint.digest, shard)
        findings.in_part_files += len(read_parts(run.files, run.paths, key).finished)
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
        records = comparison.compare(shard)
        _check_counts(records.counts, manifest)
    except (ValueError, OSError) as error:
        findings.torn.append(f"{path.name}: {error}")
        return None
    return records


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
        # A sum of rewards that are not numbers is none either.
        both_nan = value != value and declared != declared
        if value != declared and not both_nan:
            raise ValueError(f"its manifest declares {name}={declared}, but its records have {name}={value}")


def report(findings: Findings) -> list[str]:
    """Format the findings for the terminal."""
    lines = []
    for title, items, count in (
        ("shards not committed", findings.uncommitted, len(findings.uncommitted)),
        ("shards torn", findings.torn, len(findings.torn)),
        ("files and samples of no prompt of this run", findings.foreign.first, len(findings.foreign)),
        ("samples missing", map(_named, findings.missing.first), len(findings.missing)),
        ("samples duplicated", map(_named, findings.duplicated.first), len(findings.duplicated)),
        ("samples in error", [f"{_named(key)}: {name}" for key, name in findings.errors.first], len(findings.errors)),
    ):
        if count:
            lines.append(f"{title}: {count}")
            lines += [f"  {_printable(item)}" for item in islice(items, SHOWN)]
            lines += [f"  and {count - SHOWN} more"] if count > SHOWN else []
    if findings.errors:
        classes = [f"{_printable(name)} {count}" for name, count in findings.error_classes.most_common()]
        lines.append("errors by class: " + ", ".join(classes))
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


def _named(key: SampleKey) -> str:
    return f"{key.row_id} sample {key.sample}"


def _printable(text: str) -> str:
    """Return a text of a file as it can be printed: without what steers a terminal, and on one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return 0 if the run is complete, 1 if it is not, 2 if there is no run."""
    parser = SentenceParser("python -m rollout.verify", description=__doc__, epilog=_EPILOG)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the output.dir of a run")
    parser.add_argument(
        "--missing-array",
        action="store_true",
        help="print what to give sbatch --array= for the shards that are missing or damaged; nothing if none is",
    )
    try:
        asked = parser.parse_args(arguments)
        if asked.missing_array:
            return _print_missing_array(asked.dir)
        findings = verify(asked.dir)
    except (InputError, OSError) as error:
        say(str(error), sys.stderr)
        return Exit.BAD_INPUT
    say("\n".join(report(findings)))
    return Exit.COMPLETE if findings.complete else Exit.CRASHED


def _print_missing_array(folder: Path) -> Exit:
    missing = missing_tasks(read_run(RunPaths(folder)))
    if not missing.tasks:
        return Exit.COMPLETE
    say(missing.array)
    say(missing.sentence(), sys.stderr)
    return Exit.CRASHED


if __name__ == "__main__":
    sys.exit(main())
