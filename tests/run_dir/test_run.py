"""The directory of a run: created once, resumed, refused for another job."""

from __future__ import annotations

import json
import secrets
import threading
from pathlib import Path

import pytest

from rollout.errors import InputError
from rollout.run_dir.attempts import read_attempts
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.row_ids_file import read_row_ids
from rollout.run_dir.run import (
    RunDir,
    existing_run,
    open_run,
    prepare_folder,
    read_run,
)
from tests.support.jobs import config_of

IDS = [f"row {i}" for i in range(10)]
FINGERPRINT = Fingerprint({"seed": 0, "sampling.temperature": 1.0})


def opened(folder: Path, *overrides: str, fingerprint: Fingerprint = FINGERPRINT, workers: int = 1) -> RunDir:
    config = config_of(folder, *overrides)
    return open_run(
        prepare_folder(config.output.dir),
        config,
        fingerprint,
        IDS,
        dtype="float32",
        attention="gather",
        workers=workers,
        template_dates={},
        token=secrets.token_hex(4),
    )


def test_first_attempt_writes_run_json_and_ids(tmp_path: Path) -> None:
    run = opened(tmp_path, "sampling.n=3", "output.rows_per_shard=4")
    assert (run.rows, run.samples, run.rows_per_shard, run.shards, run.attempt) == (10, 3, 4, 3, 0)
    assert [list(run.shard_rows(shard)) for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert read_row_ids(run.paths.rows).to_pylist() == IDS
    stored = json.loads(run.paths.run.read_text())
    assert stored["fingerprint"] == FINGERPRINT.values
    assert stored["digest"] == FINGERPRINT.digest
    assert stored["config"]["sampling"]["n"] == 3
    assert set(stored["packages"]) >= {"rollout", "torch", "transformers", "python"}
    (attempt,) = read_attempts(LOCAL, run.paths)
    assert (attempt["attempt"], attempt["attention"]) == (0, "gather")
    assert attempt["batcher"]["name"] == "predictive"
    assert not list(run.paths.shards.iterdir())


def test_later_attempts_keep_the_partition(tmp_path: Path) -> None:
    opened(tmp_path, "output.rows_per_shard=4")
    run = opened(tmp_path, "output.rows_per_shard=2", "batcher=static", workers=5)
    assert (run.rows_per_shard, run.attempt) == (4, 1)
    assert opened(tmp_path).attempt == 2
    attempts = list(read_attempts(LOCAL, run.paths))
    assert [attempt["batcher"]["name"] for attempt in attempts] == ["predictive", "static", "predictive"]
    assert [attempt["workers"] for attempt in attempts] == [1, 5, 1]


def test_workers_starting_at_once_agree_on_one_run(tmp_path: Path) -> None:
    runs = []
    config = config_of(tmp_path)

    def start() -> None:
        runs.append(
            open_run(
                prepare_folder(config.output.dir),
                config,
                FINGERPRINT,
                IDS,
                dtype="float32",
                attention="gather",
                workers=2,
                template_dates={},
                token=secrets.token_hex(4),
            )
        )

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 6
    assert len({run.rows_per_shard for run in runs}) == 1
    assert sorted(run.attempt for run in runs) == list(range(6))


def test_other_fingerprint_is_refused_with_the_differences(tmp_path: Path) -> None:
    run = opened(tmp_path)
    before = run.paths.run.read_bytes()
    other = Fingerprint({"seed": 1, "sampling.temperature": 0.5})
    for attempt in (lambda: existing_run(run.paths, other), lambda: opened(tmp_path, fingerprint=other)):
        with pytest.raises(InputError) as refused:
            attempt()
        assert "seed was 0 and is 1" in str(refused.value)
        assert "sampling.temperature was 1.0 and is 0.5" in str(refused.value)
    assert run.paths.run.read_bytes() == before


def test_other_dtype_is_refused(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with pytest.raises(InputError, match=r"set model\.dtype=float32"):
        open_run(
            run.paths,
            config_of(tmp_path),
            FINGERPRINT,
            IDS,
            dtype="bfloat16",
            attention="gather",
            workers=1,
            template_dates={},
            token="other",
        )


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(InputError, match=r"^output\.dir=.* cannot be written \(.*\): choose another folder\.$"):
            prepare_folder(str(folder))


def test_shards_without_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    prepare_folder(str(tmp_path))
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no run\.json"):
        prepare_folder(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "attempts": 3}'])
def test_unreadable_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        read_run(RunPaths(tmp_path))


def test_folder_without_a_run_has_no_existing_run(tmp_path: Path) -> None:
    assert existing_run(RunPaths(tmp_path), FINGERPRINT) is None
    with pytest.raises(InputError, match="holds no run"):
        read_run(RunPaths(tmp_path))
