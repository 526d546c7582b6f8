"""Promise 1 for sessions: what is reused or evicted between turns changes no token and no log-probability."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from rollout import Batch, Engine, SamplingParams
from tests.contract.test_long_sequences import long_model
from tests.support.parity import page_bytes, worst_logprob
from tests.support.tiny_models import VOCABULARY, shallow


class Conversations:
    """Random prompts that continue, branch, edit and repeat what was generated before."""

    def __init__(self, seed: int) -> None:
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.texts: list[list[int]] = []

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, VOCABULARY) for _ in range(count)]

    def prompts(self, count: int) -> list[list[int]]:
        return [self.prompt() for _ in range(count)]

    def prompt(self) -> list[int]:
        if not self.texts or self.rng.random() < 0.2:
            return self.tokens(self.rng.choice([1, 5, 15, 16, 17, 33, 100]))
        text = self.rng.choice(self.texts)
        match self.rng.choice(["continue", "continue", "branch", "edit", "repeat"]):
            case "continue":
                return text + self.tokens(self.rng.randint(0, 20))
            case "branch":  # two prompts of one call often choose the same text
                return text[: self.rng.randint(1, len(text))] + self.tokens(self.rng.randint(1, 5))
            case "edit":
                changed = list(text)
                changed[self.rng.randrange(len(text))] = self.rng.randrange(3, VOCABULARY)
                return changed
            case _:
                return list(text)

    def learn(self, batch: Batch) -> None:
        self.texts += [record.prompt_ids + record.completion_ids for record in batch]


def assert_same(expected: Batch, found: Batch) -> None:
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert (other.row_id, other.sample) == (one.row_id, one.sample)
        assert (other.completion_ids, other.finish_reason) == (one.completion_ids, one.finish_reason)
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def assert_turns_same(plain: Engine, engine: Engine, seed: int, turns: int = 3, rows: int = 4) -> list[Batch]:
    """Compare a session of ``engine`` with calls of ``plain`` turn by turn."""
    talk, batches = Conversations(seed), list[Batch]()
    with engine.session() as session:
        for turn in range(turns):
            prompts = talk.prompts(rows)
            params = [SamplingParams(n=talk.rng.randint(1, 2), max_new_tokens=talk.rng.randint(1, 18)) for _ in prompts]
            ids = [f"{turn}-{i}" for i in range(rows)]
            expected = plain.generate(prompts, params, seed=turn, row_ids=ids)
            batches.append(session.generate(prompts, params, seed=turn, row_ids=ids))
            assert_same(expected, batches[-1])
            assert expected.stats.kv_bytes_held == 0
            talk.learn(expected)
    assert session.kv_bytes_held == 0
    return batches


def reused(batches: Sequence[Batch]) -> int:
    return sum(batch.stats.reused_tokens for batch in batches)


#: Windows, chunks, experts with sinks, and code of the model's own with ALiBi.
@pytest.mark.parametrize("family", ["mistral", "llama4_text", "gpt_oss", "bloom"])
def test_turns_are_those_of_an_engine_without_session(family: str) -> None:
    engine = Engine(shallow(family), None)
    batches = assert_turns_same(engine, engine, seed=random.randrange(10**6))
    assert reused(batches) > 0
    assert worst_logprob(engine.model, list(batches[-1])) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_longrope_below_across_and_beyond_its_boundary(family: str) -> None:
    """Keys of the short frequencies stand in no sequence of the long ones, and the other way round."""
    engine = Engine(long_model(family), None)
    batches = assert_turns_same(engine, engine, seed=random.randrange(10**6), turns=4)
    assert reused(batches) > 0


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_recurrent_families_run_without_reuse(family: str) -> None:
    engine = Engine(shallow(family), None)
    batches = assert_turns_same(engine, engine, seed=random.randrange(10**6), turns=2, rows=3)
    assert reused(batches) == 0
    assert {batch.stats.kv_bytes_held for batch in batches} == {0}


@pytest.mark.usefixtures("at_once_and_late")
@pytest.mark.parametrize(("cap", "pages"), [(1, 40), (3, 17), (8, 30)])
def test_any_cap_and_any_eviction(cap: int, pages: int) -> None:
    """The smallest pool holds little more than the longest row."""
    model = shallow("llama")
    engine = Engine(model, None, max_rows=cap, max_kv_bytes=pages * page_bytes(model))
    batches = assert_turns_same(Engine(model, None), engine, seed=random.randrange(10**6))
    assert max(batch.stats.peak_kv_bytes for batch in batches) <= pages * page_bytes(model)


def test_three_turns_of_hundreds_of_rows_after_long_prompts() -> None:
    """Prompts of 10 to 3,000 tokens, a tool's output between turns, samples that part."""
    engine, talk = Engine(shallow("llama"), None), Conversations(0)
    prompts = [talk.tokens(length) for length in (10, 15, 16, 17, 250, 3000)]
    params = SamplingParams(n=6, max_new_tokens=17, ignore_eos=True)
    with engine.session() as session:
        found = session.generate(prompts, params)
        for turn in (1, 2):
            texts = [record.prompt_ids + record.completion_ids for record in found]
            prompts = [text + talk.tokens(25) for text in texts if len(text) < 500] + [texts[-1] + talk.tokens(25)]
            params = SamplingParams(n=4 if turn == 1 else 1, max_new_tokens=3, ignore_eos=True)
            found = session.generate(prompts, params, seed=turn)
            assert found.stats.prefilled_tokens == len(prompts) * 26
            if turn == 2:
                assert_same(engine.generate(prompts, params, seed=turn), found)
