"""The paths in a run's directory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files under ``output.dir``."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def rows(self) -> Path:
        """The ids of all input rows, in order, so that a run can be verified without its dataset."""
        return self.root / "rows.arrow"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def trackers(self) -> Path:
        """What a tracker writes."""
        return self.root / "trackers"

    @property
    def attempts(self) -> Path:
        """One file for each launch that has worked on the run."""
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:05d}.json"

    @property
    def work(self) -> Path:
        """Heartbeats, claims, part files and files being written; removed when the run is complete."""
        return self.root / "work"

    @property
    def workers(self) -> Path:
        return self.work / "workers"

    def heartbeat(self, writer: str) -> Path:
        return self.workers / f"{writer}.json"

    @property
    def claims(self) -> Path:
        return self.work / "claims"

    def claim(self, index: int) -> Path:
        return self.claims / f"{index:05d}"

    def asks(self, giver: str) -> Path:
        """What idle workers ask of a busy one, a file each."""
        return self.work / "asks" / giver

    def ask(self, giver: str, taker: str) -> Path:
        return self.asks(giver) / f"{taker}.json"

    def given(self, taker: str) -> Path:
        """Samples that a worker has been given."""
        return self.work / "given" / taker

    def parts(self, index: int) -> Path:
        """The part files of a shard, one a writer."""
        return self.work / "parts" / f"{index:05d}"

    @property
    def reopened(self) -> Path:
        """Committed shards whose records in error are generated again; gone when the run is complete."""
        return self.work / "reopened"

    @property
    def damaged(self) -> Path:
        """Shards that are not what their manifests say, set aside."""
        return self.root / "damaged"

    def shard(self, index: int, form: str) -> Path:
        return self.shards / f"{index:05d}.{form}"

    def manifest(self, index: int) -> Path:
        return self.shards / f"{index:05d}.json"

    def temporary(self, path: Path, writer: str) -> Path:
        """Where a writer writes a file before it gets its name."""
        return self.work / "tmp" / f"{writer}-{path.parent.name}-{path.name}"

    def metrics(self, worker: int) -> Path:
        return self.root / "metrics" / f"rank-{worker:05d}.jsonl"

    @property
    def report(self) -> Path:
        """The HTML report of the run."""
        return self.root / "report.html"


def numbers(names: Iterable[str], suffix: str = "") -> set[int]:
    """Return the numbers that name files, as those of shards, claims and attempts; other names are left out."""
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    # Digits such as ² are none that `int` reads.
    return {int(stem) for stem in stems if stem.isdecimal()}
