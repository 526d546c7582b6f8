"""The paths in a run's directory."""

from __future__ import annotations

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
        return self.root / "rows.parquet"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def trackers(self) -> Path:
        """What a tracker writes."""
        return self.root / "trackers"

    @property
    def work(self) -> Path:
        """Locks, part files and files being written; removed when the run is complete."""
        return self.root / "work"

    @property
    def run_lock(self) -> Path:
        return self.work / "run.lock"

    def shard(self, index: int, form: str) -> Path:
        return self.shards / f"{index:05d}.{form}"

    def manifest(self, index: int) -> Path:
        return self.shards / f"{index:05d}.json"

    def part(self, index: int) -> Path:
        return self.work / f"{index:05d}.part.jsonl"

    def lock(self, index: int) -> Path:
        return self.work / f"{index:05d}.lock"

    def temporary(self, path: Path) -> Path:
        """Where the holder of the lock of ``path`` writes the file before renaming it."""
        return self.work / f"{path.name}.tmp"

    def metrics(self, worker: int) -> Path:
        return self.root / "metrics" / f"rank-{worker:05d}.jsonl"

    @property
    def report(self) -> Path:
        """The HTML report of the run."""
        return self.root / "report.html"
