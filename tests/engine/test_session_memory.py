"""Memory that sessions keep: until when, for whom it makes way, and how it goes as the headroom shrinks."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.engine import exact, parity
from rollout.errors import InputError
from rollout.headroom.fake import FakeHeadroom
from rollout.requests import Request, StepReport
from tests.support.parity import page_bytes, random_prompts, worst_logprob
from tests.support.tiny_models import tiny
from tests.support.turns import PARAMS, ids_of, next_turn, text_of


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny("llama"), None)


def test_memory_is_held_until_the_session_is_closed_or_released(engine: Engine) -> None:
    session = engine.session()
    batch = session.generate(random_prompts(4, 4), PARAMS)
    assert session.kv_bytes_held == batch.stats.kv_bytes_held > 0
    session.release()
    assert session.kv_bytes_held == 0
    again = session.generate(next_turn(batch), PARAMS)
    assert again.stats.reused_tokens == 0
    assert session.kv_bytes_held > 0
    session.close()
    assert session.kv_bytes_held == 0
    with pytest.raises(InputError, match="session is closed"):
        session.generate([[3]], PARAMS)


def test_a_session_that_is_forgotten_holds_nothing(engine: Engine) -> None:
    session = engine.session()
    session.generate(random_prompts(4, 4), PARAMS)
    assert engine._generation.sessions.bytes_held > 0
    del session
    gc.collect()
    assert engine._generation.sessions.bytes_held == 0


def test_a_session_closed_within_a_stream_keeps_nothing_of_it(engine: Engine) -> None:
    session = engine.session()
    stream = session.stream(random_prompts(4, 4), PARAMS)
    next(stream)
    session.close()
    assert len(list(stream)) == 3
    assert session.kv_bytes_held == 0


def test_plain_calls_hold_nothing_and_take_what_idle_sessions_keep() -> None:
    model = tiny("llama")
    cap = 40 * page_bytes(model)
    engine = Engine(model, None, max_kv_bytes=cap)
    wanted = Engine(model, None).generate(random_prompts(5, 6), PARAMS)
    with engine.session() as session:
        session.generate([[3] * 400], PARAMS)
        assert session.kv_bytes_held > cap // 2
        small = engine.generate([[3] * 10], PARAMS)
        assert small.stats.kv_bytes_held == 0
        assert session.kv_bytes_held > cap // 2
        large = engine.generate(random_prompts(5, 6), PARAMS)
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
        session.generate([[3] * 400], PARAMS)
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
        session.generate([[3] * 700], PARAMS)
        assert session.kv_bytes_held > cap // 2
        told.clear()
        engine.generate([[3] * 40], PARAMS)
        assert session.kv_bytes_held > cap // 2
    beside = told.copy()
    told.clear()
    engine.generate([[3] * 40], PARAMS)
    assert beside == told


def test_what_others_take_is_made_good_by_idle_sessions_before_rows_are_preempted() -> None:
    model = tiny("llama")
    engine = Engine(model, None, policy="static", reserve_fraction=0.0)
    with engine.session() as session:
        session.generate([[3] * 700], PARAMS)
        running = [0]
        fake = FakeHeadroom(1024 * page_bytes(model), held=lambda: running[0] + session.kv_bytes_held)
        engine._generation.headroom = fake

        def on_step(report: StepReport) -> None:
            running[0] = report.kv_bytes
            if report.step == 3:
                assert session.kv_bytes_held > 0
                fake.taken_bytes = fake.total_bytes - report.kv_bytes - 40 * page_bytes(model)

        requests = [Request(str(i), [3 + i] * 20, PARAMS) for i in range(4)]
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
        inner = session.generate([[9] * 300], PARAMS)
        assert session.kv_bytes_held > 0
        found += stream
        stats = session.stats
        assert stats is not None
        assert stats.peak_kv_bytes <= cap
        again = session.generate([text_of(record) for record in found], PARAMS)
        assert again.stats.reused_tokens > 0
    assert inner.stats.reused_tokens == 0
    assert ids_of(again) == ids_of(engine.generate([text_of(record) for record in found], PARAMS))


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
        batch = session.generate(random_prompts(4, 3), PARAMS, exact=True)
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
        first = session.generate(random_prompts(4, 3), PARAMS)
        second = session.generate(next_turn(first), PARAMS)
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
            batch = session.generate(prompts, PARAMS, seed=turn)
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
        first = session.generate(random_prompts(seed, 12), PARAMS)
        kept = held[0] = session.kv_bytes_held
        prompts = next_turn(first)
        chosen = rng.sample([i for i in range(12) if i != 2], 4)  # the third is long
        fake.taken_bytes = fake.total_bytes - kept // 2

        def on_step(report: StepReport) -> None:
            held[0] = report.kv_bytes
            assert report.step < 2 or report.kv_bytes <= kept // 2

        requests = [Request(str(i), prompts[i], PARAMS) for i in chosen]
        found = {record.row_id: record.completion_ids for record in session.run(requests, on_step=on_step)}
        assert session.stats is not None
        assert session.stats.preempted_rows == 0
        assert session.stats.reused_tokens > 0
    plain = Engine(model, None).generate([prompts[i] for i in chosen], PARAMS, row_ids=chosen)
    assert found == {record.row_id: record.completion_ids for record in plain}
