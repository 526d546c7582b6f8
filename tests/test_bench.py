"""The benchmark's workload format and table maths; speed itself is never asserted."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import run
import workload
from table import Run, first_peer, render, summarise
from workload import Request, Shape

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
        shape = workload.NAMED["w1"]
        assert workload.build(PROMPTS, shape) == workload.build(PROMPTS, shape)
        other = workload.build(PROMPTS, Shape(seed=shape.seed + 1))
        assert other != workload.build(PROMPTS, shape)

    def test_lengths_from_a_table(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("TIMESTAMP,GeneratedTokens\na,50\nb,60\n")
        lengths = workload.csv_lengths(tmp_path / "l.csv", "GeneratedTokens")
        assert {request.n for request in workload.build(PROMPTS, Shape(), lengths)} == {50, 60}

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


class TestTable:
    RUNS = (
        Run("ours", tokens=100, seconds=1.0, peak_rss_bytes=GIB),
        Run("static:32", tokens=100, seconds=5.0, peak_rss_bytes=2 * GIB),
        Run("ours", tokens=100, seconds=2.0, peak_rss_bytes=3 * GIB),
        Run("static:32", tokens=100, seconds=4.0, peak_rss_bytes=GIB),
        Run("ours", tokens=100, seconds=0.5, peak_rss_bytes=GIB),
        Run("static:32", tokens=100, seconds=10.0, peak_rss_bytes=GIB),
    )

    def test_medians_extremes_and_ratios(self) -> None:
        ours, static = summarise(self.RUNS)
        assert (ours.engine, ours.runs, ours.failed) == ("ours", 3, 0)
        assert (ours.slowest, ours.rate, ours.fastest) == (50, 100, 200)
        assert (static.slowest, static.rate, static.fastest) == (10, 20, 25)
        assert (ours.ratio, static.ratio) == (5, 1)
        assert (ours.peak_rss_bytes, static.peak_rss_bytes) == (3 * GIB, 2 * GIB)

    def test_the_first_peer_is_the_first_that_is_not_ours(self) -> None:
        assert first_peer(["ours:8", "ours", "continuous", "static:32"]) == "continuous"
        assert first_peer(["ours"]) is None

    def test_failed_runs_do_not_count(self) -> None:
        rows = summarise([*self.RUNS, Run("ours", error="killed"), Run("continuous", error="no memory")])
        by_name = {row.engine: row for row in rows}
        assert (by_name["ours"].rate, by_name["ours"].runs, by_name["ours"].failed) == (100, 4, 1)
        assert by_name["continuous"].rate is by_name["continuous"].ratio is by_name["continuous"].slowest is None

    def test_no_ratio_without_a_peer(self) -> None:
        for runs in ([self.RUNS[0]], [self.RUNS[0], Run("static:32", error="killed")]):
            assert {row.ratio for row in summarise(runs)} == {None}

    def test_it_reads_as_columns(self) -> None:
        lines = render(summarise([*self.RUNS, Run("ours", error="killed"), Run("continuous", error="x")])).splitlines()
        assert lines[0].split() == ["engine", "tok/s", "slowest", "fastest", "x", "static:32", "peak", "RSS", "runs"]
        assert lines[1].split() == ["ours", "100.0", "50.0", "200.0", "5.00", "3072", "MiB", "3/4"]
        assert lines[3].split() == ["continuous", "-", "-", "-", "-", "-", "0/1"]
        assert len({len(line) for line in lines}) == 1


def test_an_engine_that_fails_is_a_figure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.ENGINES, "broken", "no_such_module")
    plan = run.Plan(str(tmp_path), tmp_path / "w.json", "float32", "cpu")
    figure, kept = run.run_once("broken:4", plan, tmp_path / "out.json")
    assert "no_such_module" in figure.error
    assert kept["command"].endswith("--cap 4")


def test_every_engine_has_its_module() -> None:
    for module in run.ENGINES.values():
        assert (run.HERE / "engines" / f"{module}.py").is_file()
