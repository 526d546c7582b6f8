"""Sessions: what the next turn reuses, the memory it takes, and what drops it."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import nn

from rollout import Engine, SamplingParams, Session
from rollout.batcher.types import Decision, Observation
from rollout.engine import exact, parity
from rollout.errors import InputError
from rollout.headroom.fake import FakeHeadroom
from rollout.records import Batch, Record
from rollout.requests import Request, StepReport
from rollout.stop_conditions import CallProgress
from tests.support.parity import page_bytes, random_prompts, worst_logprob
from tests.support.tiny_models import VOCABULARY, tiny

_PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)


def text_of(record: Record) -> list[int]:
    return record.prompt_ids + record.completion_ids


def next_turn(batch: Batch, tool: int = 7) -> list[list[int]]:
    return [text_of(record) + [5 + i for i in range(tool)] for record in batch]


def ids_of(batch: Batch) -> list[list[int]]:
    return [record.completion_ids for record in batch]


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny("llama"), None)


# -- what is reused --------------------------------------------------------------------------------------


def test_the_next_turn_prefills_only_what_is_new(engine: Engine) -> None:
    prompts = random_prompts(1, 5)
    with engine.session() as session:
        first = session.generate(prompts, _PARAMS)
        second = session.generate(next_turn(first, tool=7), _PARAMS)
        third = session.generate(next_turn(second, tool=1), _PARAMS)
    assert (first.stats.reused_tokens, first.stats.prefilled_tokens) == (0, sum(map(len, prompts)))
    # The last token of a completion has never been computed.
    assert (second.stats.prefilled_tokens, third.stats.prefilled_tokens) == (5 * (7 + 1), 5 * (1 + 1))
    assert second.stats.reused_tokens == sum(map(len, prompts)) + 5 * 19
    assert ids_of(third) == ids_of(engine.generate(next_turn(second, tool=1), _PARAMS))


def test_samples_of_one_prompt_are_continued_each(engine: Engine) -> None:
    (prompt,) = random_prompts(2, 1)
    prompt = prompt * 37
    with engine.session() as session:
        first = session.generate([prompt], SamplingParams(n=8, max_new_tokens=20, ignore_eos=True))
        second = session.generate(next_turn(first), _PARAMS)
        again = session.generate(next_turn(first), _PARAMS, seed=1)
    assert second.stats.reused_tokens == 8 * (37 + 19)
    assert again.stats.prefilled_tokens == 8  # of a prompt that comes again, the last token
    assert ids_of(again) == ids_of(engine.generate(next_turn(first), _PARAMS, seed=1))


def test_aborted_rows_are_resumed_without_prefill(engine: Engine) -> None:
    def after_ten_steps(progress: CallProgress) -> bool:
        return progress.steps == 10

    prompts = random_prompts(3, 4)
    whole = engine.generate(prompts, _PARAMS)
    with engine.session() as session:
        part = session.generate(prompts, _PARAMS, stop_when=after_ten_steps)
        assert {record.finish_reason for record in part} == {"abort"}
        rest = session.generate(params=_PARAMS, resume=part)
    assert rest.stats.prefilled_tokens == 4
    assert ids_of(rest) == ids_of(whole)


def test_a_session_is_its_engine(engine: Engine) -> None:
    session = engine.session()
    assert isinstance(session, Session)
    session.weight_version = 7
    assert engine.weight_version == session.weight_version == 7
    records = list(session.stream([[3, 4]], _PARAMS))
    assert [version for record in records for version in record.weight_versions] == [7] * 20
    assert session.stats is engine.stats
    assert session.context_limit == engine.context_limit


# -- memory ----------------------------------------------------------------------------------------------


def test_memory_is_held_until_the_session_is_closed_or_released(engine: Engine) -> None:
    session = engine.session()
    batch = session.generate(random_prompts(4, 4), _PARAMS)
    assert session.kv_bytes_held == batch.stats.kv_bytes_held > 0
    session.release()
    assert session.kv_bytes_held == 0
    again = session.generate(next_turn(batch), _PARAMS)
    assert again.stats.reused_tokens == 0
    assert session.kv_bytes_held > 0
    session.close()
    assert session.kv_bytes_held == 0
    with pytest.raises(InputError, match="session is closed"):
        session.generate([[3]], _PARAMS)


def test_a_session_that_is_forgotten_holds_nothing(engine: Engine) -> None:
    session = engine.session()
    session.generate(random_prompts(4, 4), _PARAMS)
    assert engine._generation.sessions.bytes_held > 0
    del session
    gc.collect()
    assert engine._generation.sessions.bytes_held == 0


def test_a_session_closed_within_a_stream_keeps_nothing_of_it(engine: Engine) -> None:
    session = engine.session()
    stream = session.stream(random_prompts(4, 4), _PARAMS)
    next(stream)
    session.close()
    assert len(list(stream)) == 3
    assert session.kv_bytes_held == 0


def test_plain_calls_hold_nothing_and_take_what_idle_sessions_keep() -> None:
    model = tiny("llama")
    cap = 40 * page_bytes(model)
    engine = Engine(model, None, max_kv_bytes=cap)
    wanted = Engine(model, None).generate(random_prompts(5, 6), _PARAMS)
    with engine.session() as session:
        session.generate([[3] * 400], _PARAMS)
        assert session.kv_bytes_held > cap // 2
        small = engine.generate([[3] * 10], _PARAMS)
        assert small.stats.kv_bytes_held == 0
        assert session.kv_bytes_held > cap // 2
        large = engine.generate(random_prompts(5, 6), _PARAMS)
        assert ids_of(large) == ids_of(wanted)
        assert large.stats.kv_bytes_held == session.kv_bytes_held == 0
        assert large.stats.peak_kv_bytes <= cap


def test_scores_take_what_idle_sessions_keep() -> None:
    model = tiny("llama")
    cap = 40 * page_bytes(model)
    engine = Engine(model, None, max_kv_bytes=cap)
    prompts, completions = [[3] * 20, [4] * 200], [[5] * 4, [6] * 300]
    wanted = Engine(model, None).score(prompts, completions)
    with engine.session() as session:
        session.generate([[3] * 400], _PARAMS)
        kept = session.kv_bytes_held
        small = engine.score(prompts[:1], completions[:1])
        assert session.kv_bytes_held == kept > cap // 2
        assert small.stats.peak_kv_bytes + kept <= cap
        large = engine.score(prompts, completions)
        assert session.kv_bytes_held == 0
        assert large.stats.peak_kv_bytes <= cap
        assert [score.error for score in large] == ["", ""]
    for one, other in zip(large, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_policies_are_told_of_the_memory_that_idle_sessions_keep() -> None:
    model = tiny("llama")
    cap = 60 * page_bytes(model)
    told: list[int] = []

    class Listening:
        def decide(self, observation: Observation) -> Decision:
            told.append(observation.kv_tokens_free)
            return Decision(rows=8, prefill_tokens=10**6, reason="all")

    engine = Engine(model, None, policy=Listening(), max_kv_bytes=cap)
    with engine.session() as session:
        session.generate([[3] * 700], _PARAMS)
        assert session.kv_bytes_held > cap // 2
        told.clear()
        engine.generate([[3] * 40], _PARAMS)
        assert session.kv_bytes_held > cap // 2
    beside = told.copy()
    told.clear()
    engine.generate([[3] * 40], _PARAMS)
    assert beside == told


def test_what_others_take_is_made_good_by_idle_sessions_before_rows_are_preempted() -> None:
    model = tiny("llama")
    engine = Engine(model, None, policy="static", reserve_fraction=0.0)
    with engine.session() as session:
        session.generate([[3] * 700], _PARAMS)
        running = [0]
        fake = FakeHeadroom(1024 * page_bytes(model), held=lambda: running[0] + session.kv_bytes_held)
        engine._generation.headroom = fake

        def on_step(report: StepReport) -> None:
            running[0] = report.kv_bytes
            if report.step == 3:
                assert session.kv_bytes_held > 0
                fake.taken_bytes = fake.total_bytes - report.kv_bytes - 40 * page_bytes(model)

        requests = [Request(str(i), [3 + i] * 20, _PARAMS) for i in range(4)]
        records = list(engine.run(requests, on_step=on_step))
        assert engine.stats is not None
        assert (len(records), engine.stats.preempted_rows, session.kv_bytes_held) == (4, 0, 0)


def test_calls_within_a_stream_of_one_session_stay_within_the_limit_together() -> None:
    """The calls within leave their rows; those of the stream replace them when it ends."""
    model = tiny("llama")
    cap = 40 * page_bytes(model)
    engine = Engine(model, None, max_kv_bytes=cap)
    prompts = [[3 + i] * 60 for i in range(6)]
    with engine.session() as session:
        stream = session.stream(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True))
        found = [next(stream)]
        inner = session.generate([[9] * 300], _PARAMS)
        assert session.kv_bytes_held > 0
        found += stream
        stats = session.stats
        assert stats is not None
        assert stats.peak_kv_bytes <= cap
        again = session.generate([text_of(record) for record in found], _PARAMS)
        assert again.stats.reused_tokens > 0
    assert inner.stats.reused_tokens == 0
    assert ids_of(again) == ids_of(engine.generate([text_of(record) for record in found], _PARAMS))


def test_log_probabilities_of_the_module_take_what_sessions_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """``exact`` runs after the call, while the session keeps its memory."""
    engine = Engine(tiny("llama"), None)
    forward = exact.teacher_forced_logprobs

    with engine.session() as session:

        def full(*args: object, **options: object) -> torch.Tensor:
            if session.kv_bytes_held:
                raise torch.OutOfMemoryError("no memory")
            return forward(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(exact, "teacher_forced_logprobs", full)
        batch = session.generate(random_prompts(4, 3), _PARAMS, exact=True)
        assert batch.stats.kv_bytes_held > session.kv_bytes_held == 0
    assert worst_logprob(engine.model, list(batch)) < 1e-5  # type: ignore[arg-type]


def test_a_comparison_that_fails_leaves_the_session_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    engine = Engine(tiny("llama"), None)
    monkeypatch.setattr(parity, "teacher_forced_logprobs", fail)
    with engine.session() as session:
        first = session.generate(random_prompts(4, 3), _PARAMS)
        second = session.generate(next_turn(first), _PARAMS)
    assert second.stats.parity is None
    assert second.stats.prefilled_tokens == 3 * 8
    assert "no parity figures" in caplog.text


def test_kept_pages_make_way_before_any_row_is_preempted() -> None:
    model = tiny("llama")
    cap = 32 * page_bytes(model)
    engine = Engine(model, None, policy="static", max_kv_bytes=cap)
    with engine.session() as session:
        for turn in range(4):
            prompts = [[3 + turn] * 40 for _ in range(8)]
            batch = session.generate(prompts, _PARAMS, seed=turn)
            assert batch.stats.preempted_rows == 0
            assert batch.stats.peak_kv_bytes <= cap
            assert session.kv_bytes_held > 0


@pytest.mark.parametrize("seed", range(2))
def test_kept_pages_move_and_go_as_the_headroom_shrinks(seed: int) -> None:
    """Slabs are dropped while rows live: pages that are kept move, and are evicted before a row is preempted."""
    model = tiny("llama")
    engine = Engine(model, None, policy="static", reserve_fraction=0.0)
    held = [0]
    fake = FakeHeadroom(128 * page_bytes(model), held=lambda: held[0])
    engine._generation.headroom = fake
    rng = random.Random(seed)
    with engine.session() as session:
        first = session.generate(random_prompts(seed, 12), _PARAMS)
        kept = held[0] = session.kv_bytes_held
        prompts = next_turn(first)
        chosen = rng.sample([i for i in range(12) if i != 2], 4)  # the third is long
        fake.taken_bytes = fake.total_bytes - kept // 2

        def on_step(report: StepReport) -> None:
            held[0] = report.kv_bytes
            assert report.step < 2 or report.kv_bytes <= kept // 2

        requests = [Request(str(i), prompts[i], _PARAMS) for i in chosen]
        found = {record.row_id: record.completion_ids for record in session.run(requests, on_step=on_step)}
        assert session.stats is not None
        assert session.stats.preempted_rows == 0
        assert session.stats.reused_tokens > 0
    plain = Engine(model, None).generate([prompts[i] for i in chosen], _PARAMS, row_ids=chosen)
    assert found == {record.row_id: record.completion_ids for record in plain}


# -- what drops it ---------------------------------------------------------------------------------------


def test_changed_weights_drop_what_is_kept(engine: Engine) -> None:
    """Before a call, and while a stream is paused; what is computed afterwards is kept again."""
    model = engine.model
    params = [SamplingParams(max_new_tokens=5 + 10 * i, ignore_eos=True) for i in range(4)]
    with engine.session() as session:
        first = session.generate(random_prompts(6, 4), _PARAMS)
        stream = session.stream(next_turn(first), params)
        next(stream)
        _change(engine)
        later = list(stream)
        assert session.stats is not None
        assert session.stats.reused_tokens > 0
        again = session.generate([text_of(record) for record in later], _PARAMS)
        assert again.stats.reused_tokens == sum(len(record.prompt_ids) - 1 for record in again)
        assert worst_logprob(model, list(again)) < 1e-5  # type: ignore[arg-type]
        _change(engine)
        last = session.generate(next_turn(first), _PARAMS)
        assert last.stats.reused_tokens == 0
        assert worst_logprob(model, list(last)) < 1e-5  # type: ignore[arg-type]


def _change(engine: Engine) -> None:
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.02)


def test_another_layout_drops_what_is_kept(engine: Engine) -> None:
    with engine.session() as session:
        first = session.generate(random_prompts(7, 3), _PARAMS)
        with torch.autocast("cpu", torch.bfloat16):
            assert session.generate(next_turn(first), _PARAMS).stats.reused_tokens == 0
        last = session.generate(next_turn(first), _PARAMS)
    assert last.stats.reused_tokens == 0
    assert ids_of(last) == ids_of(engine.generate(next_turn(first), _PARAMS))


class FailingLayer:
    """Raises in a forward of a model's middle layer, once; it hooks in before the engine looks at the model."""

    def __init__(self, model: nn.Module) -> None:
        self.left, self.error = -1, BaseException()
        model.get_submodule("model.layers.2").register_forward_pre_hook(self)

    def fail(self, error: BaseException, forwards: int = 6) -> None:
        self.left, self.error = forwards, error

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class FailingPolicy:
    """Decides for all rows, and raises once."""

    def __init__(self) -> None:
        self.left, self.error = -1, BaseException()

    fail = FailingLayer.fail

    def decide(self, observation: Observation) -> Decision:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return Decision(rows=observation.live_rows + observation.waiting_rows, prefill_tokens=10**6, reason="all")


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "policy"])
def test_a_call_that_fails_leaves_nothing(where: str, kind: type[BaseException]) -> None:
    model, policy = tiny("llama"), FailingPolicy()
    failing = FailingLayer(model) if where == "forward" else policy
    engine = Engine(model, None, policy=policy)
    with engine.session() as session:
        first = session.generate(random_prompts(8, 4), _PARAMS)
        assert session.kv_bytes_held > 0
        failing.fail(kind())  # type: ignore[arg-type]
        with pytest.raises(kind):
            session.generate(next_turn(first), _PARAMS)
        assert session.kv_bytes_held == 0
        second = session.generate(next_turn(first), _PARAMS)
        assert second.stats.reused_tokens == 0
        assert session.kv_bytes_held > 0
    assert ids_of(second) == ids_of(engine.generate(next_turn(first), _PARAMS))


def test_a_stream_closed_early_leaves_the_rows_that_finished(engine: Engine) -> None:
    prompts = random_prompts(9, 6)
    params = [SamplingParams(max_new_tokens=5 + 10 * i, ignore_eos=True) for i in range(6)]
    with engine.session() as session:
        stream = session.stream(prompts, params)
        done = [next(stream), next(stream)]
        stream.close()
        turns = [[*text_of(record), 5] for record in done]
        second = session.generate(turns, _PARAMS)
    assert second.stats.prefilled_tokens == 2 * 2
    assert ids_of(second) == ids_of(engine.generate(turns, _PARAMS))


def test_an_allocator_failure_drops_what_is_kept() -> None:
    """What the failed call itself leaves, it keeps again; of another session nothing is left either."""
    model = tiny("llama")
    failing = FailingLayer(model)
    engine = Engine(model, None)
    prompts = random_prompts(10, 4)
    with engine.session() as session, engine.session() as other:
        first = session.generate(prompts, _PARAMS)
        other.generate(prompts, _PARAMS)
        failing.fail(torch.OutOfMemoryError("no memory"))
        second = session.generate([[9, *prompts[0]]], _PARAMS)
        assert second.stats.out_of_memory_events == 1
        assert other.kv_bytes_held == 0
        third = session.generate(next_turn(first), _PARAMS)
        assert third.stats.reused_tokens == 0
        fourth = session.generate(next_turn(second), _PARAMS)
        assert fourth.stats.reused_tokens == len(prompts[0]) + 1 + 19
    assert ids_of(third) == ids_of(engine.generate(next_turn(first), _PARAMS))


def test_prompts_outside_of_the_vocabulary_are_error_records_as_ever(engine: Engine) -> None:
    with engine.session() as session:
        first = session.generate([[3, 4, 5]], _PARAMS)
        bad, good = session.generate([[*text_of(first[0]), VOCABULARY], text_of(first[0])], _PARAMS)
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
