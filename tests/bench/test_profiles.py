"""Scripts that measure the engine in their own process; speed itself is never asserted."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.bench import batch_size_effect, decode_bandwidth, host_time, memory_pressure, policies_on_engine, soak
from jobs.bench import cpu_step_profile as steps
from jobs.bench.engines.transformers_continuous import Continuous
from jobs.bench.lib import cli, workload
from jobs.bench.lib.workload import Request, Shape
from rollout import SamplingParams
from rollout.batcher.types import StepSample
from rollout.models.attention.base import PagedAttention
from rollout.models.patches import decoder_stack
from rollout.requests import Request as EngineRequest
from tests.support.bench import PROMPTS
from tests.support.jobs import report_of
from tests.support.tiny_models import tiny


def total(work: Counter[steps.Work]) -> tuple[int, int]:
    """Return the bytes and operations of some work."""
    return sum(n * one.read_bytes for one, n in work.items()), sum(n * one.flops for one, n in work.items())


class TestSteps:
    def test_a_step_in_its_parts(self) -> None:
        model: Any = tiny("llama")
        found = steps.decode_steps(model, 3, 40, steps.Timers())
        assert len(found) == steps.STEPS
        # Of queries, keys and values together, of gate and up together, and two more; and the logits.
        products = 4 * model.config.num_hidden_layers + 1
        for step in found:
            assert set(step.parts) == set(steps.PARTS)
            # Attention runs inside the layers.
            assert {part for part, seconds in step.parts.items() if seconds > 0} == {"layers", "linears", "sampler"}
            assert sum(step.parts.values()) < step.seconds
            assert sum(step.products.values()) == products
        config = model.config
        parameters = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        tokens = 3 * (40 - (steps.WARM_UP + steps.STEPS + 1) // 2)
        for number, step in enumerate(found, steps.WARM_UP + 1):
            assert total(step.products) == (4 * parameters, 2 * 3 * parameters)
            # Three rows, whose queries see the prompt, the tokens before and themselves.
            seen = (tokens + 3 * number) * config.num_hidden_layers * 2 * config.head_dim
            assert total(step.attention) == (
                4 * seen * config.num_key_value_heads,
                2 * seen * config.num_attention_heads,
            )

    def test_nothing_stays_behind(self) -> None:
        before, originals = steps.rollout.engine.loop.sample, (nn.Linear.forward, PagedAttention.attend_tokens)
        with steps.Timers().installed():
            assert steps.rollout.engine.loop.sample is not before
        assert steps.rollout.engine.loop.sample is before
        assert (nn.Linear.forward, PagedAttention.attend_tokens) == originals

    def test_a_whole_run_and_its_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "BANDWIDTH_BYTES", 1 << 16)
        monkeypatch.setattr(steps, "LARGE", 64)
        model: Any = tiny("llama")
        requests = [Request((1, 2, 3), 6, 0), Request((4, 5), 9, 1)]
        timers = steps.Timers()
        whole, count = steps.whole_run(model, requests, timers)
        assert count >= 9
        # Prompts of 3 and 2 tokens and all answers but their last tokens: each query sees what is before it and itself.
        seen = sum(range(1, 3 + 6)) + sum(range(1, 2 + 9))
        config = model.config
        dims = 2 * config.head_dim * config.num_attention_heads
        assert total(whole.attention)[1] == 2 * seen * config.num_hidden_layers * dims
        cells = steps.line("w", whole, count, steps.Machine.measured(torch.float32))
        assert len(cells) == len(steps.HEADER)
        assert sum(map(float, cells[2 : 3 + len(steps.PARTS)])) == pytest.approx(100, abs=0.3)

    def test_modules_called_one_by_one_count_as_the_stack_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stacked = steps.decode_steps(tiny("llama"), 2, 40, steps.Timers())
        monkeypatch.setattr(decoder_stack, "known_decoder", lambda *_: None)
        single = steps.decode_steps(tiny("llama"), 2, 40, steps.Timers())
        assert single[0].parts["attention"] > 0
        assert [(step.products, step.attention) for step in single] == [
            (step.products, step.attention) for step in stacked
        ]

    def test_the_bound_is_the_longer_of_reading_and_computing(self) -> None:
        machine = steps.Machine(bandwidth=10.0, rate=100.0)
        assert machine.bound(Counter({steps.Work(20, 100): 3, steps.Work(1, 700): 1})) == 3 * 2.0 + 7.0

    def test_rate_and_bandwidth_are_those_of_a_computer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "BANDWIDTH_BYTES", 1 << 20)
        monkeypatch.setattr(steps, "LARGE", 256)
        machine = steps.Machine.measured(torch.bfloat16)
        assert 1e8 < machine.bandwidth < 1e13
        assert 1e8 < machine.rate < 1e14

    def test_steps_together(self) -> None:
        one = steps.Step(1.0, {"linears": 0.5}, Counter({steps.Work(4, 2): 2}), Counter({steps.Work(1, 3): 1}), 5)
        both = steps.together([one, one], 3.0)
        assert (both.seconds, both.parts, both.calls) == (3.0, {"linears": 1.0}, 10)
        assert (total(both.products), total(both.attention)) == ((16, 8), (2, 6))


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

    def test_rows_whose_prompts_are_long_decode_together(self) -> None:
        """With the engine's own limit of tokens prefilled per step, the first would end before the last join."""
        run_ = decode_bandwidth.Decoding(tiny("llama", max_position_embeddings=512), 48, 500, 3)
        assert len(run_.times) == 4

    def test_what_is_around_a_step_is_called_once_for_each(self) -> None:
        seen: list[int] = []
        run_ = decode_bandwidth.Decoding(tiny("llama"), 2, 40, 5, seen.append)
        assert seen == [0, 1, 2, 3, 4, 5]
        assert len(run_.times) == 6
        assert len(run_.tokens) == 5

    def test_kernels_that_overlap_count_once(self) -> None:
        spans = [("b", 2.0, 5.0), ("a", 0.0, 1.0), ("a", 4.0, 6.0), ("Memcpy HtoD", 4.5, 5.0)]
        found = decode_bandwidth.busy(spans, 2)
        assert found.busy == 2.5
        assert found.kernels == (("a", 1.5), ("b", 1.5), ("Memcpy HtoD", 0.25))
        assert found.launches == 1.5
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
