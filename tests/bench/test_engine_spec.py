"""Engines as they are written on the command line, and how the best setting of one is found."""

from __future__ import annotations

import pytest

from jobs.bench.lib import engine_spec, seats
from jobs.bench.lib.engine_spec import Spec


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
            assert (seats.ROOT / "jobs" / "bench" / "engines" / f"{engine.module}.py").is_file()
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
