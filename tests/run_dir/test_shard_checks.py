"""A job ends with 0 only when what is on disk is sound, and generates again what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.run_dir.paths import RunPaths
from rollout.verify import verify
from tests.support.jobs import EXPECTED, JOB, FakeEngine, config_of, keys, load_fake, read_records, without_attempt


def cut(paths: RunPaths) -> None:
    path = paths.shard(2, "parquet")
    path.write_bytes(path.read_bytes()[:-1])


def flip(paths: RunPaths) -> None:
    path = paths.shard(2, "parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def swap(paths: RunPaths) -> None:
    paths.manifest(2).write_bytes(paths.manifest(3).read_bytes())


def shorten_manifest(paths: RunPaths) -> None:
    paths.manifest(2).write_bytes(b"")


def remove(paths: RunPaths) -> None:
    paths.shard(2, "parquet").unlink()


@pytest.mark.parametrize(
    ("damage", "check"),
    [(remove, "fast"), (cut, "fast"), (swap, "fast"), (shorten_manifest, "fast"), (flip, "full")],
)
def test_damaged_shard_of_a_complete_run_is_generated_again(
    tmp_path: Path, damage: Callable[[RunPaths], None], check: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, *JOB, f"output.check={check}")
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    whole = read_records(paths.root)
    damage(paths)
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert sorted(engine.asked) == EXPECTED[24:36]
    assert "Shard 2 is damaged" in caplog.text
    assert without_attempt(read_records(paths.root)) == without_attempt(whole)
    assert verify(paths.root).complete


def test_shard_damaged_during_the_run_is_generated_again_before_it_ends(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out")

    class Damaging(FakeEngine):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            yield from super().run(*args, **kwargs)
            if len(self.asked) == 60:
                for path in paths.shards.glob("*.parquet"):
                    path.write_bytes(b"")

    assert run_job(config_of(tmp_path, *JOB), load_fake(Damaging())) == Exit.COMPLETE
    assert keys(read_records(paths.root)) == EXPECTED
    assert verify(paths.root).complete
