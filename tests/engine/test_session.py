"""Sessions: what the next turn reuses, and what drops it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout import Engine, SamplingParams, Session
from rollout.batcher.types import Decision, Observation
from rollout.stop_conditions import CallProgress
from tests.support.parity import random_prompts, worst_logprob
from tests.support.tiny_models import VOCABULARY, tiny
from tests.support.turns import PARAMS, ids_of, next_turn, text_of


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny("llama"), None)


# -- what is reused --------------------------------------------------------------------------------------


def test_the_next_turn_prefills_only_what_is_new(engine: Engine) -> None:
    prompts = random_prompts(1, 5)
    with engine.session() as session:
        first = session.generate(prompts, PARAMS)
        second = session.generate(next_turn(first, tool=7), PARAMS)
        third = session.generate(next_turn(second, tool=1), PARAMS)
    assert (first.stats.reused_tokens, first.stats.prefilled_tokens) == (0, sum(map(len, prompts)))
    # The last token of a completion has never been computed.
    assert (second.stats.prefilled_tokens, third.stats.prefilled_tokens) == (5 * (7 + 1), 5 * (1 + 1))
    assert second.stats.reused_tokens == sum(map(len, prompts)) + 5 * 19
    assert ids_of(third) == ids_of(engine.generate(next_turn(second, tool=1), PARAMS))


def test_samples_of_one_prompt_are_continued_each(engine: Engine) -> None:
    (prompt,) = random_prompts(2, 1)
    prompt = prompt * 37
    with engine.session() as session:
        first = session.generate([prompt], SamplingParams(n=8, max_new_tokens=20, ignore_eos=True))
        second = session.generate(next_turn(first), PARAMS)
        again = session.generate(next_turn(first), PARAMS, seed=1)
    assert second.stats.reused_tokens == 8 * (37 + 19)
    assert again.stats.prefilled_tokens == 8  # of a prompt that comes again, the last token
    assert ids_of(again) == ids_of(engine.generate(next_turn(first), PARAMS, seed=1))


def test_aborted_rows_are_resumed_without_prefill(engine: Engine) -> None:
    def after_ten_steps(progress: CallProgress) -> bool:
        return progress.steps == 10

    prompts = random_prompts(3, 4)
    whole = engine.generate(prompts, PARAMS)
    with engine.session() as session:
        part = session.generate(prompts, PARAMS, stop_when=after_ten_steps)
        assert {record.finish_reason for record in part} == {"abort"}
        rest = session.generate(params=PARAMS, resume=part)
    assert rest.stats.prefilled_tokens == 4
    assert ids_of(rest) == ids_of(whole)


def test_a_session_is_its_engine(engine: Engine) -> None:
    session = engine.session()
    assert isinstance(session, Session)
    session.weight_version = 7
    assert engine.weight_version == session.weight_version == 7
    records = list(session.stream([[3, 4]], PARAMS))
    assert [version for record in records for version in record.weight_versions] == [7] * 20
    assert session.stats is engine.stats
    assert session.context_limit == engine.context_limit


# -- what drops it ---------------------------------------------------------------------------------------


def test_changed_weights_drop_what_is_kept(engine: Engine) -> None:
    """Before a call, and while a stream is paused; what is computed afterwards is kept again."""
    model = engine.model
    params = [SamplingParams(max_new_tokens=5 + 10 * i, ignore_eos=True) for i in range(4)]
    with engine.session() as session:
        first = session.generate(random_prompts(6, 4), PARAMS)
        stream = session.stream(next_turn(first), params)
        next(stream)
        _change(engine)
        later = list(stream)
        assert session.stats is not None
        assert session.stats.reused_tokens > 0
        again = session.generate([text_of(record) for record in later], PARAMS)
        assert again.stats.reused_tokens == sum(len(record.prompt_ids) - 1 for record in again)
        assert worst_logprob(model, list(again)) < 1e-5  # type: ignore[arg-type]
        _change(engine)
        last = session.generate(next_turn(first), PARAMS)
        assert last.stats.reused_tokens == 0
        assert worst_logprob(model, list(last)) < 1e-5  # type: ignore[arg-type]


def _change(engine: Engine) -> None:
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.02)


def test_another_layout_drops_what_is_kept(engine: Engine) -> None:
    with engine.session() as session:
        first = session.generate(random_prompts(7, 3), PARAMS)
        with torch.autocast("cpu", torch.bfloat16):
            assert session.generate(next_turn(first), PARAMS).stats.reused_tokens == 0
        last = session.generate(next_turn(first), PARAMS)
    assert last.stats.reused_tokens == 0
    assert ids_of(last) == ids_of(engine.generate(next_turn(first), PARAMS))


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
        first = session.generate(random_prompts(8, 4), PARAMS)
        assert session.kv_bytes_held > 0
        failing.fail(kind())  # type: ignore[arg-type]
        with pytest.raises(kind):
            session.generate(next_turn(first), PARAMS)
        assert session.kv_bytes_held == 0
        second = session.generate(next_turn(first), PARAMS)
        assert second.stats.reused_tokens == 0
        assert session.kv_bytes_held > 0
    assert ids_of(second) == ids_of(engine.generate(next_turn(first), PARAMS))


def test_a_stream_closed_early_leaves_the_rows_that_finished(engine: Engine) -> None:
    prompts = random_prompts(9, 6)
    params = [SamplingParams(max_new_tokens=5 + 10 * i, ignore_eos=True) for i in range(6)]
    with engine.session() as session:
        stream = session.stream(prompts, params)
        done = [next(stream), next(stream)]
        stream.close()
        turns = [[*text_of(record), 5] for record in done]
        second = session.generate(turns, PARAMS)
    assert second.stats.prefilled_tokens == 2 * 2
    assert ids_of(second) == ids_of(engine.generate(turns, PARAMS))


def test_an_allocator_failure_drops_what_is_kept() -> None:
    """What the failed call itself leaves, it keeps again; of another session nothing is left either."""
    model = tiny("llama")
    failing = FailingLayer(model)
    engine = Engine(model, None)
    prompts = random_prompts(10, 4)
    with engine.session() as session, engine.session() as other:
        first = session.generate(prompts, PARAMS)
        other.generate(prompts, PARAMS)
        failing.fail(torch.OutOfMemoryError("no memory"))
        second = session.generate([[9, *prompts[0]]], PARAMS)
        assert second.stats.out_of_memory_events == 1
        assert other.kv_bytes_held == 0
        third = session.generate(next_turn(first), PARAMS)
        assert third.stats.reused_tokens == 0
        fourth = session.generate(next_turn(second), PARAMS)
        assert fourth.stats.reused_tokens == len(prompts[0]) + 1 + 19
    assert ids_of(third) == ids_of(engine.generate(next_turn(first), PARAMS))


def test_prompts_outside_of_the_vocabulary_are_error_records_as_ever(engine: Engine) -> None:
    with engine.session() as session:
        first = session.generate([[3, 4, 5]], PARAMS)
        bad, good = session.generate([[*text_of(first[0]), VOCABULARY], text_of(first[0])], PARAMS)
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
