"""A sweep: each job has a folder, mistakes are found first, and the outcome of every job is returned."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

import rollout.cli.overrides
import rollout.cli.requeue
import rollout.cli.run
import rollout.job.job
from rollout.cli.sweep import job_folders
from rollout.config.schema import Config
from rollout.errors import Exit, InputError
from tests.cli.conftest import Ask


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ("sampling.temperature=0.5,1.0", ["runs/ppo_sampling/temperature-0.5", "runs/ppo_sampling/temperature-1.0"]),
        ("batcher=sla,static", ["runs/ppo_sampling/batcher-sla", "runs/ppo_sampling/batcher-static"]),
        ("seed=range(2) data.path=a/b,a-b", [f"runs/ppo_sampling/{number}" for number in range(4)]),
        ("seed=4,5 'output.dir=x/${seed}'", ["x/4", "x/5"]),
        ("data.limit=3", ["runs/ppo_sampling"]),
    ],
)
def test_jobs_of_a_sweep_have_a_folder_each(ask: Ask, arguments: str, folders: list[str]) -> None:
    said = ask(f"-m +experiment=ppo_sampling {arguments}")
    assert said.status == 0, said.err
    assert [config.output.dir for config in said.configs] == folders


def test_single_run_keeps_its_folder(ask: Ask) -> None:
    assert [config.output.dir for config in ask("+experiment=ppo_sampling").configs] == ["runs/ppo_sampling"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("output.dir=x seed=1,2", "write 'output.dir=x/${seed}'."),
        ("output.dir=x batcher=sla,static", "write 'output.dir=x/${hydra:job.num}'."),
        ("seed=1,2 sampling.n=1,0", "sampling.n is 0"),
        ("seed=1,b", "seed is b, but must be a whole number"),
        ("batcher=sla,statik", "did you mean static"),
        ("seed=interval(1,2)", "range(START,STOP,STEP)"),
        ("data.limit=1,", "data.limit is '1,'"),
    ],
)
def test_mistake_in_one_job_stops_the_sweep_before_it_begins(
    sentence: Callable[[str], str], arguments: str, said: str
) -> None:
    assert said in sentence(f"-m +experiment=ppo_sampling {arguments}")


def test_suggested_folder_is_one_for_each_job(ask: Ask) -> None:
    said = ask("-m seed=1,2 'output.dir=x/${seed}'")
    assert [config.output.dir for config in said.configs] == ["x/1", "x/2"]


def test_long_names_give_way_to_job_numbers() -> None:
    jobs = [["data.path=" + "a" * 200, "seed=1"], ["data.path=" + "b" * 200, "seed=1"]]
    assert job_folders(jobs, ["x", "x"], named=False) == ["x/0", "x/1"]


def test_failing_jobs_are_listed_with_their_sentence(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config, **_: object) -> Exit:
        if config.seed == 1:
            raise InputError("the data is torn.")
        if config.seed == 2:
            raise ZeroDivisionError("a bug")
        return Exit.ERROR_ROWS if config.seed == 3 else Exit.COMPLETE

    monkeypatch.setattr(rollout.job.job, "run_job", run)
    said = ask("-m +experiment=ppo_sampling seed=0,1,2")
    lines = said.err.splitlines()
    assert said.status == Exit.BAD_INPUT
    assert lines[-2] == "Job 1 (seed=1) ended with status 2: the data is torn."
    assert lines[-1].startswith("Job 2 (seed=2) ended with status 1: The job crashed (ZeroDivisionError)")
    assert ask("-m +experiment=ppo_sampling seed=0,3").status == Exit.ERROR_ROWS


def test_launcher_that_is_not_installed_is_named(
    sentence: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout.cli.overrides, "find_spec", lambda name: None)
    assert "hydra/launcher=slurm needs a package: install rollout[slurm]." in sentence(
        "-m hydra/launcher=slurm seed=1,2"
    )


def test_launcher_that_loses_a_job_is_told_in_a_sentence(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        raise RuntimeError("Job 7 has not produced any output\nand more lines.")

    monkeypatch.setattr(Hydra, "multirun", launch)
    said = ask("-m +experiment=ppo_sampling seed=1,2")
    assert said.status == Exit.CRASHED
    assert said.err.splitlines()[-1].startswith(
        "A job of the sweep was not started or was killed (Job 7 has not produced any output): the same command resumes"
    )


@pytest.mark.parametrize(
    ("environment", "queued"),
    [
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 7_2"),
        ({"SLURM_JOB_ID": "9"}, "requeue 9"),
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "1"}, ""),
        ({"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "100"}, None),
        ({"SUBMITIT_EXECUTOR": "local"}, None),
        ({"SUBMITIT_EXECUTOR": ""}, None),
    ],
)
def test_job_that_stopped_early_is_queued_again_where_slurm_runs_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], queued: str | None
) -> None:
    program, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name, value in ({"SUBMITIT_EXECUTOR": "slurm"} | environment).items():
        monkeypatch.setenv(name, value)
    values = OmegaConf.create({"launcher": {"max_num_timeout": 100}})
    monkeypatch.setattr(rollout.cli.requeue.HydraConfig, "get", lambda: values)
    with contextlib.nullcontext() if queued is None else pytest.raises(SystemExit, match="75"):
        rollout.cli.requeue.requeue_if_submitted()
    assert calls.read_text().strip() == (queued or "")


@pytest.mark.parametrize(("status", "asked"), [(Exit.COMPLETE, 0), (Exit.ERROR_ROWS, 0), (Exit.RESUMABLE, 1)])
def test_only_a_job_that_stopped_early_may_be_queued_again(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, status: Exit, asked: int
) -> None:
    times: list[bool] = []
    monkeypatch.setattr(rollout.job.job, "run_job", lambda config, **_: status)
    monkeypatch.setattr(rollout.cli.run, "requeue_if_submitted", lambda: times.append(True))
    assert ask("+experiment=ppo_sampling").status == status
    assert len(times) == asked
    assert ask("+experiment=ppo_sampling job.deadline=1h").status == status
    assert len(times) == asked


def test_interrupted_job_is_resumable(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config, **_: object) -> Exit:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout.job.job, "run_job", run)
    said = ask("output.dir=x")
    assert said.status == 75
    assert said.err.splitlines()[-1] == "Stopped: the same command resumes the run in x."


def test_console_script_finds_a_reward_in_the_working_directory(tmp_path: Path) -> None:
    """The script lies elsewhere, so the working directory is not on its path as it is with ``python -m``."""
    (tmp_path / "my_reward.py").write_text("raise ImportError('found')\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    script = tmp_path / "bin" / "rollout"
    script.parent.mkdir()
    script.write_text("import sys\nfrom rollout.__main__ import main\nsys.exit(main())\n")
    arguments = ["reward._target_=my_reward.score", "output.dir=out", "data.path=rows.jsonl"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "reward._target_=my_reward.score cannot be used: found."
