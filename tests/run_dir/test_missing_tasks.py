"""Which array tasks to submit again: those whose own part of the shards is missing or damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rollout.data.prompts import read_prompts
from rollout.errors import PromptError
from rollout.run_dir.attempts import read_attempts, slurm_array
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.missing_tasks import MissingTasks, compress, missing_tasks
from rollout.run_dir.run import RunDir, open_run, prepare_folder
from rollout.run_dir.workers import Worker, Workers
from rollout.verify import main
from tests.support.jobs import config_of, one_by_one, shard_worker


def opened(folder: Path, workers: int) -> RunDir:
    """Begin a run of 20 rows in shards of one."""
    config = config_of(folder, "data.limit=20", "output.rows_per_shard=1", "data.id_column=id")
    return open_run(
        prepare_folder(config.output.dir),
        config,
        Fingerprint({}),
        read_prompts(config.data).row_ids,
        dtype="float32",
        attention="gather",
        workers=workers,
        template_dates={},
        token="one",
    )


def commit_all(folder: Path, run: RunDir) -> None:
    """Commit all shards, each prompt being one that cannot be encoded."""
    config = config_of(folder, "data.limit=20", "output.rows_per_shard=1", "data.id_column=id")

    def refuse(prompt: object) -> None:
        raise PromptError("bad_prompt", "no")

    worker = shard_worker(run, read_prompts(config.data), config, encode=one_by_one(refuse))
    assert list(worker.requests()) == []
    worker.close()


def lose(run: RunDir, shards: list[int]) -> None:
    for shard in shards:
        run.paths.manifest(shard).unlink()


def test_numbers_are_compressed_as_slurm_takes_them() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        numbers = sorted(rng.sample(range(1001), rng.randint(0, 300)))
        text = compress(numbers)
        read = []
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            read += range(int(first), int(last or first) + 1)
        assert read == numbers
    assert compress([0, 3, 4, 5, 6, 7, 9]) == "0,3-7,9"


@pytest.mark.parametrize(
    ("environment", "workers", "lost", "array"),
    [
        # Four tasks of five shards each.
        ({"TASK_COUNT": "4"}, 4, [0, 4, 12], "0,2"),
        ({"TASK_COUNT": "4", "TASK_MIN": "10", "TASK_STEP": "5"}, 4, [5, 19], "15,25"),
        # Two workers a task: the first task's begin with shards 0 and 5.
        ({"TASK_COUNT": "2"}, 4, [9, 10, 19], "0-1"),
        ({"TASK_COUNT": "2"}, 4, [10, 19], "1"),
        # More tasks than shards: the task whose part holds the shard.
        ({"TASK_COUNT": "40"}, 40, [0, 19], "1,39"),
        # Begun by one process, or by one launch of four.
        ({}, 1, [3, 17], "0"),
        ({}, 4, [3, 17], "0,3"),
    ],
)
def test_tasks_are_those_that_begin_with_a_missing_shard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    workers: int,
    lost: list[int],
    array: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    run = opened(tmp_path, workers)
    commit_all(tmp_path, run)
    assert missing_tasks(run) == MissingTasks((), (), 20, 0, ())
    lose(run, lost)
    found = missing_tasks(run)
    assert (found.uncommitted, found.damaged, found.samples) == (tuple(lost), (), len(lost))
    assert found.array == array
    # As the claims of these tasks' workers have it.
    per_task = workers // (int(environment.get("TASK_COUNT", 0)) or workers)
    first = int(environment.get("TASK_MIN", 0))
    step = int(environment.get("TASK_STEP", 1))
    claimed: set[int] = set()
    for task in [(number - first) // step for number in found.tasks]:
        for rank in range(task * per_task, (task + 1) * per_task):
            me = Worker.of_process(1, rank, {})
            claims = ShardClaims(run.files, run.paths, Workers(run.files, run.paths, me, 120), 20, Place(rank, workers))
            part = set(claims._part)
            claimed |= part & set(lost)
    assert claimed == set(lost)


def test_damaged_shards_are_missing_too(tmp_path: Path) -> None:
    run = opened(tmp_path, workers=20)
    commit_all(tmp_path, run)
    data = bytearray(run.paths.shard(7, run.format).read_bytes())
    data[len(data) // 2] ^= 1
    run.paths.shard(7, run.format).write_bytes(data)
    found = missing_tasks(run)
    assert (found.uncommitted, found.damaged, found.array) == ((), (7,), "7")
    assert "output.check=full" in found.sentence()


def test_a_submission_of_some_tasks_again_keeps_the_first_arrays_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "10")
    run = opened(tmp_path, workers=10)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "8")
    opened(tmp_path, workers=2)
    assert [attempt["array"] for attempt in read_attempts(run.files, run.paths)] == [
        {"first": 0, "step": 1, "tasks": 10},
        {"first": 8, "step": 1, "tasks": 2},
    ]
    assert missing_tasks(run).array == "0-9"


def test_arrays_of_submitit_are_no_arrays_of_one_run() -> None:
    assert slurm_array({"SLURM_ARRAY_TASK_COUNT": "3", "SUBMITIT_EXECUTOR": "slurm"}) is None
    assert slurm_array({}) is None


def test_the_command_prints_the_list_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(tmp_path, workers=5)
    commit_all(tmp_path, run)
    assert main([str(run.paths.root), "--missing-array"]) == 0
    assert capsys.readouterr() == ("", "")
    lose(run, [0, 19])
    assert main([str(run.paths.root), "--missing-array"]) == 1
    assert capsys.readouterr() == ("0,4\n", "2 of 20 shards (2 samples) are missing.\n")
    assert main([str(tmp_path / "nothing"), "--missing-array"]) == 2
