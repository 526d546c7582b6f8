"""What is made of the figures."""

from __future__ import annotations

from jobs.bench.lib import tables
from jobs.bench.lib.tables import FirstToken, Run, Start, first_tokens, render, summarise
from tests.support.bench import GIB


def test_a_first_start_and_later_ones() -> None:
    starts = [Start("vllm", setting, took) for setting, took in [("a", 90), ("b", 70), ("b", 20), ("b", 30)]]
    assert first_tokens(starts) == [FirstToken("vllm", 90, 25)]
    assert first_tokens(starts[:1]) == [FirstToken("vllm", 90, None)]
    assert first_tokens([]) == []


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
        assert (ours.seconds, static.seconds) == (1, 5)
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
        assert lines[1] == [
            "w1",
            "ours@float32",
            "1.0",
            "100.0",
            "50.0",
            "200.0",
            "1.00",
            "700",
            "3072",
            "MiB",
            "3/4",
            "0",
        ]
        assert lines[2] == [
            "w1",
            "static:32@float32",
            "5.0",
            "20.0",
            "10.0",
            "25.0",
            "5.00",
            "0",
            "2048",
            "MiB",
            "3",
            "1",
        ]
        assert lines[3] == ["w1", "vllm:8", "-", "-", "-", "-", "-", "-", "-", "0/1", "0"]

    def test_it_reads_as_markdown(self) -> None:
        text = tables.markdown([tables.FIRST_TOKENS, tables.first_token_cells(FirstToken("vllm", 90, None))])
        assert text.splitlines() == [
            "| engine | first token, empty caches | first token, later starts |",
            "| --- | --- | --- |",
            "| vllm | 90.0 s | - |",
        ]
