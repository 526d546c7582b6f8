"""Scores of given completions: the model's own numbers, whatever company, order and memory they are computed in."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.engine.scoring_loop import ForwardLimits, ScoringLoop
from rollout.engine.scoring_schedule import ScoringSchedule
from rollout.headroom.fake import FakeHeadroom
from rollout.scores import Scores
from tests.contract.test_long_sequences import long_model
from tests.contract.test_long_sequences import prompts as longrope_prompts
from tests.support.parity import page_bytes, random_prompts
from tests.support.tiny_models import PADDED, RECURRENT, VOCABULARY, shallow

Pairs = list[tuple[list[int], list[int]]]

#: (prompt, completion) lengths: a page and its neighbours, one token, and far more than one forward.
_LENGTHS = ((1, 1), (1, 40), (15, 2), (16, 1), (17, 15), (32, 16), (33, 17), (300, 5), (5, 300), (3000, 20), (20, 1000))


@pytest.fixture(autouse=True)
def integrity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page and state is accounted for at each admission."""
    admit = ScoringSchedule.admit

    def checked(self: ScoringSchedule, tokens: int) -> int | None:
        needed = admit(self, tokens)
        self.check_integrity()
        return needed

    monkeypatch.setattr(ScoringSchedule, "admit", checked)


def limit_forwards(monkeypatch: pytest.MonkeyPatch, tokens: int, logits: int) -> None:
    begin = ScoringLoop.__init__

    def limited(self: ScoringLoop, *args: Any, **options: Any) -> None:
        begin(self, *args, **options | {"limits": ForwardLimits(tokens, logits)})

    monkeypatch.setattr(ScoringLoop, "__init__", limited)


@pytest.fixture
def small_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of few tokens and fewer logits, so that most sequences are cut."""
    limit_forwards(monkeypatch, tokens=50, logits=7)


def some_pairs(lengths: tuple[tuple[int, int], ...] = _LENGTHS, seed: int = 0) -> Pairs:
    rng = random.Random(seed)
    return [([rng.randrange(3, VOCABULARY) for _ in range(n)], [rng.randrange(3, VOCABULARY) for _ in range(m)])
            for n, m in lengths]  # fmt: skip


def plain(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities under one forward of the model over the whole text, as a trainer computes them."""
    with torch.no_grad():
        ids = torch.tensor([prompt + completion], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
    return (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def worst(model: Any, pairs: Pairs, scores: Scores, temperature: float = 1.0) -> float:
    assert [len(score.logprobs) for score in scores] == [len(completion) for _, completion in pairs]
    assert not any(score.error_class for score in scores)
    return max(
        float((plain(model, *pair, temperature) - torch.tensor(score.logprobs)).abs().max())
        for pair, score in zip(pairs, scores, strict=True)
    )


def score(engine: Engine, pairs: Pairs, **options: Any) -> Scores:
    prompts, completions = zip(*pairs, strict=True)
    return engine.score(list(prompts), list(completions), **options)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_scores_are_those_of_the_model_s_own_forward(temperature: float) -> None:
    model = shallow("llama")
    pairs = some_pairs()
    assert worst(model, pairs, score(Engine(model, None), pairs, temperature=temperature), temperature) < 1e-5


@pytest.mark.usefixtures("small_forwards")
@pytest.mark.parametrize("attention", ["auto", "gather"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_sequences_may_be_cut_anywhere(family: str, attention: str) -> None:
    """Windows, softcap, sinks and attention in chunks; logits are wanted from the middle of a forward on."""
    model = shallow(family)
    pairs = some_pairs(_LENGTHS[:9])
    prompt = pairs[7][0]
    pairs += [(prompt, completion) for _, completion in pairs[:6]]  # one prompt of several pairs, cut itself
    scores = score(Engine(model, None, attention=attention), pairs)
    assert worst(model, pairs, scores) < 1e-5
    assert scores.stats.forwards >= scores.stats.computed_tokens / 50


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("family", ["bloom", "falcon/alibi", "gpt_neo", "mpt", "lfm2", "mamba2", "bamba"])
def test_families_of_other_strategies(family: str, small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_forwards")
    assert family in {**PADDED, **RECURRENT}
    model = shallow(family)
    pairs = some_pairs(_LENGTHS[:8])
    pairs += [(pairs[6][0], completion) for _, completion in pairs[:5]]
    assert worst(model, pairs, score(Engine(model, None), pairs)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "bloom", "lfm2"])
def test_scores_equal_the_logprobs_of_a_generation(family: str) -> None:
    model = shallow(family)
    engine = Engine(model, None)
    batch = engine.generate(random_prompts(1, 5), SamplingParams(n=3, temperature=0.7, top_p=0.9, max_new_tokens=30))
    scores = engine.score(batch, temperature=0.7)
    for record, found in zip(batch, scores, strict=True):
        assert found.logprobs == pytest.approx(record.logprobs, abs=1e-5)


def test_company_and_order_change_nothing() -> None:
    model = shallow("llama")
    engine = Engine(model, None)
    pairs = some_pairs(_LENGTHS[:9])
    pairs += [(pairs[7][0], pairs[5][1])] * 2
    together = score(engine, pairs).logprobs
    backwards = score(engine, pairs[::-1]).logprobs[::-1]
    for pair, found, other in zip(pairs, together, backwards, strict=True):
        assert found == pytest.approx(other, abs=1e-5)
        assert found == pytest.approx(score(engine, [pair])[0].logprobs, abs=1e-5)


def test_a_prompt_that_pairs_share_is_computed_once_wherever_they_stand() -> None:
    model = shallow("llama")
    prompt, other = [list(range(3, 3 + n)) for n in (161, 20)]
    pairs = [(prompt, [5 + i] * 10) for i in range(8)]
    pairs.insert(3, (other, [7]))
    scores = score(Engine(model, None), pairs)
    assert worst(model, pairs, scores) < 1e-5
    assert scores.stats.computed_tokens == 160 + 8 * (1 + 9) + 20
    assert scores.stats.forwards == 1


def test_longrope_follows_the_length_of_each_whole_text() -> None:
    """Pairs of one prompt on both sides of the length at which the embedding changes share nothing."""
    model = long_model("phi3", eos_token_id=None)
    completions = [[7] * n for n in (1, 2, 12, 24)]
    pairs = [(prompt, completion) for prompt in longrope_prompts() for completion in completions]
    assert worst(model, pairs, score(Engine(model, None), pairs)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "bloom", "lfm2"])
def test_memory_for_one_sequence_at_a_time_is_enough(family: str) -> None:
    model = shallow(family)
    pairs = some_pairs(((33, 17), (33, 17), (17, 3), (60, 5), (2, 2)))
    pairs += [(pairs[3][0], [9] * 5), (pairs[3][0], [8] * 2)]
    layout_bytes = page_bytes(model)
    states = Engine(model, None)._module.strategy.kv_layout().bytes_per_row
    engine = Engine(model, None, max_kv_bytes=5 * layout_bytes + states)
    scores = score(engine, pairs)
    assert worst(model, pairs, scores) < 1e-5
    assert scores.stats.peak_kv_bytes <= 5 * layout_bytes + states
    assert scores.stats.kv_bytes_held == 0


def test_a_sequence_that_never_fits_has_an_error_and_the_others_go_on() -> None:
    model = shallow("llama")
    pairs = some_pairs(((33, 17), (100, 17), (17, 3)))
    pairs += [(pairs[1][0], [9] * 5)]
    scores = score(Engine(model, None, max_kv_bytes=5 * page_bytes(model)), pairs)
    assert [found.error_class for found in scores] == ["", "too_large", "", "too_large"]
    bound = f"max_kv_bytes={5 * page_bytes(model):,}"
    assert scores[1].error == f"A sequence of 117 tokens does not fit into {bound}, even alone."
    assert worst(model, [pairs[0], pairs[2]], Scores((scores[0], scores[2]), scores.stats)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "bloom", "lfm2"])
@pytest.mark.parametrize("every", [2, 3])
def test_allocator_failures_change_no_score(family: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_forwards(monkeypatch, tokens=300, logits=60)
    model = shallow(family)
    engine = Engine(model, None)
    runner_of, calls = type(engine._module.strategy).runner, []

    def failing(self: Any, pool: Any) -> Any:
        runner = runner_of(self, pool)
        forward = runner.forward

        def sometimes(batch: Any) -> torch.Tensor:
            calls.append(len(batch.tokens))
            logits: torch.Tensor = forward(batch)
            if len(calls) % every == 0 and len(calls) < 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits

        runner.forward = sometimes
        return runner

    monkeypatch.setattr(type(engine._module.strategy), "runner", failing)
    pairs = some_pairs(_LENGTHS[:8])
    pairs += [(pairs[7][0], completion) for _, completion in pairs[:4]]
    scores = score(engine, pairs)
    assert worst(model, pairs, scores) < 1e-5
    assert scores.stats.out_of_memory_events == min(19, len(calls)) // every > 0
    if family == "llama":
        assert max(calls[1:]) < calls[0]


def test_not_finite_logits_are_an_error_of_their_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shallow("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.nan
    pairs: Pairs = [([5, 6], [7, 8]), ([5] * 40, [9, 8, 7]), ([5] * 40, [8, 9]), ([9], [5]), ([5] * 40, [7] * 30)]
    pairs *= 2  # the second half takes pages that the first half left
    engine = Engine(model, None, max_kv_bytes=6 * page_bytes(model))
    scores = score(engine, pairs)
    assert [found.error_class for found in scores] == ["", "not_finite", "", "not_finite", ""] * 2
    good = [0, 2, 4]
    assert worst(model, [pairs[i] for i in good], Scores(tuple(scores[i] for i in good), scores.stats)) < 1e-5


def test_logits_of_a_vocabulary_of_200_000_stay_within_a_share_of_the_free_memory() -> None:
    model: Any = shallow("llama", vocab_size=200_000, tie_word_embeddings=True, hidden_size=16, head_dim=8)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, logits: sizes.append(logits.nbytes))
    rng = random.Random(0)
    pairs: Pairs = [([rng.randrange(200_000) for _ in range(n)], [rng.randrange(200_000) for _ in range(m)])
                    for n, m in ((20, 60), (60, 1), (5, 40))]  # fmt: skip
    engine = Engine(model, None, headroom=FakeHeadroom(total_bytes=256 << 20))
    sizes.clear()
    scores = score(engine, pairs)
    assert 0 < max(sizes) <= 32 << 20
    assert sum(sizes) >= 101 * 200_000 * 4
    hook.remove()
    assert worst(model, pairs, scores) < 1e-5
