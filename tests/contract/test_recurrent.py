"""Promises 1, 2, 3 and 6 for recurrent and hybrid families: states are as private, and as accounted for, as pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rollout import Engine, Record, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds, Decision, Observation
from rollout.headroom.fake import FakeHeadroom
from rollout.models.runners.select import select_strategy
from rollout.requests import Request, StepReport
from tests.support.parity import greedy_logprobs, random_prompts, rounding, worst_logprob
from tests.support.tiny_models import RECURRENT, shallow, tiny

_NEW_TOKENS = 20
#: Families whose random states amplify what the kernels of matrix products round: in Qwen3-Next, the norm behind the
#: delta rule does.
_AMPLIFYING = ("mamba", "mamba2", "qwen3_next")
#: A convolution alone, a scan, chunks with attention in the same layer, a delta rule, attention in one module.
_KINDS = ("lfm2", "mamba", "falcon_h1", "qwen3_next", "zamba2")


def _rounding(model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """What rounding may do to log-probabilities: where states amplify it, what it does to the model's own."""
    return rounding(model, prompts) if model.config.model_type in _AMPLIFYING else 1e-5


@pytest.mark.parametrize("family", RECURRENT)
def test_own_numbers_with_rows_joining_late(family: str) -> None:
    model = tiny(family)
    engine = Engine(model, None, max_rows=3)
    assert engine._module.strategy.name == "recurrent"
    prompts = random_prompts(11, 5, longest=32)[::-1]  # one of a single token, beside others that decode
    params = [SamplingParams(n=1 + (i == 1), max_new_tokens=_NEW_TOKENS - 3 * i, temperature=0) for i in range(5)]
    batch = engine.generate(prompts, params)
    assert batch.stats.preempted_rows == 0
    assert batch.stats.live_rows_max == 3
    assert [(record.row_id, record.sample) for record in batch] == [
        ("0", 0), ("1", 0), ("1", 1), ("2", 0), ("3", 0), ("4", 0)
    ]  # fmt: skip
    own = [greedy_logprobs(model, prompt, one.max_new_tokens) for prompt, one in zip(prompts, params, strict=True)]
    atol = _rounding(model, prompts)
    for record in batch:
        tokens, logprobs = own[int(record.row_id)]
        assert record.completion_ids == tokens
        assert record.logprobs == pytest.approx(logprobs.tolist(), abs=atol)
    assert worst_logprob(model, list(batch)) < max(3e-5, atol)


# -- promise 1 -------------------------------------------------------------------------------------------


def _assert_same(expected: Sequence[Record], found: Sequence[Record], atol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert (other.row_id, other.sample) == (one.row_id, one.sample)
        assert (other.completion_ids, other.finish_reason) == (one.completion_ids, one.finish_reason)
        assert other.logprobs == pytest.approx(one.logprobs, abs=atol)


@pytest.mark.parametrize("family", _KINDS)
def test_caps_order_company_and_small_prefills(family: str) -> None:
    model = shallow(family)
    prompts = random_prompts(3, 5, longest=30)
    prompts[3] = prompts[2]  # equal neighbours are prefilled together
    params = SamplingParams(n=2, max_new_tokens=10, ignore_eos=True)
    ids = [f"row-{i}" for i in range(len(prompts))]
    expected = Engine(model, None).generate(prompts, params, seed=4, row_ids=ids)
    assert len({tuple(record.completion_ids) for record in expected}) == 10

    alone = Engine(model, None, max_rows=1).generate(prompts, params, seed=4, row_ids=ids)
    back = Engine(model, None, max_rows=3).generate(prompts[::-1], params, seed=4, row_ids=ids[::-1])
    policy = StaticPolicy(Bounds(max_rows=4, prefill_tokens=13))  # fewer than most prompts have
    small = Engine(model, None, policy=policy).generate(prompts, params, seed=4, row_ids=ids)
    atol = _rounding(model, prompts)
    for found, rows in ((alone, 1), (back, 3), (small, 4)):
        assert found.stats.live_rows_max == rows
        assert found.stats.preempted_rows == 0
        records = sorted(found, key=lambda record: (record.row_id, record.sample))
        _assert_same(expected.records, records, atol)


def test_a_prompt_is_computed_once_for_the_samples_admitted_with_it() -> None:
    prompts = random_prompts(5, 4, longest=40)
    params = SamplingParams(n=4, max_new_tokens=5, ignore_eos=True)
    for cap, times in ((16, 1), (1, 4)):
        batch = Engine(shallow("falcon_h1"), None, max_rows=cap).generate(prompts, params)
        assert batch.stats.prefilled_tokens == times * sum(map(len, prompts))


# -- promise 3 -------------------------------------------------------------------------------------------


def _bytes(model: PreTrainedModel, rows: int, pages: int) -> int:
    layout = select_strategy(model).kv_layout()
    return rows * layout.bytes_per_row + pages * layout.bytes_per_page


@pytest.mark.parametrize("family", _KINDS)
def test_too_little_memory_for_the_rows_let_in(family: str) -> None:
    """Rows that are preempted are recomputed from their tokens, which rounds otherwise; none is lost or cut short."""
    model = shallow(family)
    cap = _bytes(model, rows=5, pages=26)
    prompts = random_prompts(6, 9, longest=40)
    params = SamplingParams(n=2, max_new_tokens=24, ignore_eos=True)
    batch = Engine(model, None, policy="static", max_rows=32, max_kv_bytes=cap).generate(prompts, params)
    assert [(record.row_id, record.sample) for record in batch] == [(str(i), s) for i in range(9) for s in range(2)]
    assert {(record.finish_reason, len(record.completion_ids)) for record in batch} == {("length", 24)}
    assert worst_logprob(model, list(batch)) < max(3e-5, _rounding(model, prompts))
    stats = batch.stats
    assert cap // 2 < stats.peak_kv_bytes <= cap
    assert stats.kv_bytes_held == 0
    if model.config.model_type == "mamba":
        assert (stats.live_rows_max, stats.preempted_rows) == (cap // _bytes(model, 1, 0), 0), "a state never grows"
    else:
        assert stats.preempted_rows > 0


def test_a_row_whose_state_does_not_fit_is_one_error_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.engine.loop.time.sleep", lambda _: pytest.fail("it waits for what can never be"))
    model = shallow("mamba")
    engine = Engine(model, None, max_kv_bytes=_bytes(model, 1, 0) - 1)
    (record,) = engine.generate(random_prompts(1, 1), SamplingParams(max_new_tokens=3))
    assert (record.finish_reason, record.error_class) == ("error", "too_large")


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_squeezed_and_released_while_rows_live(family: str) -> None:
    model = shallow(family)
    prompts, params = random_prompts(9, 8, longest=30), SamplingParams(n=2, max_new_tokens=24, ignore_eos=True)
    engine = Engine(model, None, policy="static", reserve_fraction=0.0)
    held = [0]
    fake = FakeHeadroom(_bytes(model, rows=16, pages=96), held=lambda: held[0])
    engine._generation.headroom = fake
    seen: list[tuple[int, int]] = []

    def on_step(report: StepReport) -> None:
        held[0] = report.kv_bytes
        fake.taken_bytes = fake.total_bytes * 3 // 4 if report.step % 20 >= 10 else 0
        seen.append((report.step % 20, held[0]))

    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    records = list(engine.run(requests, on_step=on_step))
    assert {(record.row_id, record.sample) for record in records} == {(str(i), s) for i in range(8) for s in range(2)}
    assert {(record.finish_reason, len(record.completion_ids)) for record in records} == {("length", 24)}
    assert worst_logprob(model, records) < max(3e-5, _rounding(model, prompts))
    assert engine.stats is not None
    assert engine.stats.preempted_rows > 0
    assert engine.stats.kv_bytes_held == 0
    squeezed = [kv_bytes for phase, kv_bytes in seen if phase >= 12]
    roomy = [kv_bytes for phase, kv_bytes in seen if phase in (8, 9)]
    assert max(squeezed) <= fake.total_bytes // 4 < max(roomy)


@pytest.mark.usefixtures("at_once_and_late")
@pytest.mark.parametrize("place", ["forward", "sample"])
def test_an_allocator_failure_costs_recomputation_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that went on by a token must not go on by the same token again."""
    model = shallow("falcon_h1")
    prompts, params = random_prompts(12, 4, longest=30), SamplingParams(max_new_tokens=12, ignore_eos=True)
    expected = Engine(model, None).generate(prompts, params)
    calls = [-1_000_000]  # none fails while the engine checks the module

    def sometimes(*_: object) -> None:
        calls[0] += 1
        if calls[0] in (5, 9):
            raise torch.OutOfMemoryError("none left")

    if place == "forward":
        model.model.layers[1].register_forward_pre_hook(sometimes)
    engine = Engine(model, None)
    if place == "sample":
        from rollout.engine import loop

        sample = loop.sample

        def failing(*arguments: Any) -> Any:
            sometimes()
            return sample(*arguments)

        monkeypatch.setattr(loop, "sample", failing)
    calls[0] = 0
    found = engine.generate(prompts, params)
    assert found.stats.out_of_memory_events == 2
    assert found.stats.preempted_rows > 0
    _assert_same(expected.records, found.records)


def test_policies_see_what_a_row_takes() -> None:
    model = shallow("mamba")
    state = select_strategy(model).kv_layout().bytes_per_row
    seen: list[Observation] = []

    class Watching:
        def decide(self, observation: Observation) -> Decision:
            seen.append(observation)
            return Decision(4, 2048, "test")

    cap = 6 * state
    engine = Engine(model, None, policy=Watching(), max_kv_bytes=cap)
    batch = engine.generate(random_prompts(2, 5), SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert batch.stats.live_rows_max == 4
    assert {o.kv_tokens_total for o in seen} == {cap}
    assert {o.tokens_per_row for o in seen} == {state}
    assert [o.kv_tokens_held // state for o in seen][:2] == [0, 4]


def test_the_paper_s_policy_lets_in_as_many_rows_as_states_fit() -> None:
    model = shallow("mamba")
    engine = Engine(model, None, policy="paper", max_kv_bytes=_bytes(model, rows=4, pages=0))
    batch = engine.generate(random_prompts(2, 12), SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert batch.stats.live_rows_max == 4
    assert batch.stats.preempted_rows == 0


# -- rows that are not finite ----------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once_and_late")
def test_a_broken_row_spoils_no_other() -> None:
    """Its state is left as it is: the next row with that page begins with none."""
    model = tiny("falcon_h1")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    prompts = [[i for i in prompt if i != 7] or [3] for prompt in random_prompts(8, 6, longest=30)]
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    expected = Engine(model, None).generate(prompts, params)
    mixed = [prompt for prompt in prompts for prompt in ([5, 7, 6], prompt)]
    found = Engine(model, None, max_rows=2).generate(mixed, params)
    assert [record.error_class for record in found][::2] == ["not_finite"] * len(prompts)
    for one, other in zip(expected, list(found)[1::2], strict=True):
        assert other.completion_ids == one.completion_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)


# -- promise 6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_a_module_in_training_with_checkpointing_is_served_and_left_alone(family: str) -> None:
    model = shallow(family)
    prompts, params = random_prompts(4, 3), SamplingParams(max_new_tokens=8, temperature=0)
    expected = Engine(model, None).generate(prompts, params)
    model.gradient_checkpointing_enable()
    model.train()
    implementation = model.config._attn_implementation
    attributes = [set(vars(module)) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = Engine(model, None).generate(prompts, params)
    _assert_same(expected.records, found.records, _rounding(model, prompts))
    assert all(module.training for module in model.modules())
    assert model.is_gradient_checkpointing
    assert model.config._attn_implementation == implementation
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    ids = torch.tensor([prompts[1]], device=model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_refused_module_is_left_alone_too() -> None:
    """This family keeps its state on its modules as soon as it is run with a cache."""
    model = tiny("recurrent_gemma")
    with pytest.raises(ValueError, match="keeps no recurrent state, or not in a cache"):
        select_strategy(model)
    assert all(getattr(module, "conv1d_state", None) is None for module in model.modules())
