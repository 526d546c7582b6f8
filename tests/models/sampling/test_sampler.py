"""Sampling: exact draws, the filters of transformers, correct log-probabilities, independent rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rollout.models.sampling.base import scores_above
from rollout.models.sampling.sampler import RowSampling, Sampled, filter_thresholds, sample
from tests.support.sampling import One, rows_of


def filtered(logits: NDArray[np.float32], row: One) -> NDArray[np.float64]:
    """Return one row's scores in float64 after transformers' warpers: temperature, top-k, top-p, min-p.

    Unlike transformers', top-p keeps or drops equal scores together.
    """
    scores = logits.astype(np.float64) / (row.temperature or 1.0)
    if row.top_k:
        scores = np.where(scores < np.sort(scores)[::-1][min(row.top_k, len(scores)) - 1], -np.inf, scores)
    if row.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        mass = np.cumsum(softmax(scores)[order])
        above = np.concatenate([[0.0], mass[:-1]])  # mass of the more probable tokens
        scores = np.where(scores < scores[order[above < row.top_p]].min(), -np.inf, scores)
    if row.min_p:
        probabilities = softmax(scores)
        scores = np.where(probabilities < row.min_p * probabilities.max(), -np.inf, scores)
    return scores


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


MIXED = [
    One(),
    One(temperature=0.0),
    One(temperature=0.7),
    One(temperature=2.5),
    One(top_k=1),
    One(top_k=7),
    One(top_k=10_000),
    One(top_p=0.3),
    One(top_p=0.95, temperature=1.7),
    One(top_p=1e-6),
    One(min_p=0.05),
    One(min_p=1.0),
    One(temperature=0.6, top_k=40, top_p=0.8, min_p=0.1),
    One(temperature=1.5, top_k=300, top_p=0.99),
    One(temperature=0.0, top_k=5, top_p=0.5, min_p=0.2),
]


def mixed_rows(count: int, seed: int) -> list[One]:
    """Return rows that cycle through `MIXED`, each with its own key and sample."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 32, (count, 2)).tolist()
    return [replace(MIXED[i % len(MIXED)], key=tuple(keys[i]), sample=int(rng.integers(9))) for i in range(count)]


def random_logits(count: int, vocabulary: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.from_numpy(np.random.default_rng(seed).standard_normal((count, vocabulary), np.float32))


# -- draws -----------------------------------------------------------------------------------------------


def chi_square_limit(freedom: int) -> float:
    """Return the value that chi-square exceeds with probability 1e-6 (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 4.7534 * math.sqrt(part)) ** 3


def chi_square(tokens: torch.Tensor, probabilities: NDArray[np.float64]) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; tokens expected less than five times share one bin."""
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))
    expected = probabilities * len(tokens)
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def draws(logits: torch.Tensor, row: One, count: int, first: int = 0) -> torch.Tensor:
    """Sample one row's tokens at ``count`` positions from the same logits."""
    positions = torch.arange(first, first + count)
    return sample(logits.expand(count, -1), rows_of([row] * count), positions).tokens


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 600, 1024])
def test_draws_follow_the_softmax(vocabulary: int) -> None:
    print("seed", vocabulary)
    logits = random_logits(1, vocabulary, seed=vocabulary, spread=1.5)
    tokens = draws(logits, One(key=(vocabulary, 7)), 8000)
    statistic, freedom = chi_square(tokens, softmax(logits[0].double().numpy()))
    assert statistic < chi_square_limit(freedom), (statistic, freedom)


def test_draws_within_a_block_do_not_depend_on_which_block_won() -> None:
    """Blocks and tokens must not share noise."""
    logits = torch.full((1, 1000), -torch.inf)
    # Four blocks of equal mass; in each, the tokens at offsets equal to a block number, and one more.
    live = [256 * block + place for block in range(4) for place in (0, 1, 2, 3, 100)]
    logits[0, live] = 0.0
    statistic, freedom = chi_square(draws(logits, One(key=(5, 5)), 8000), softmax(logits[0].double().numpy()))
    assert freedom == len(live) - 1
    assert statistic < chi_square_limit(freedom), (statistic, freedom)


def test_draws_over_samples_and_over_keys_follow_the_softmax() -> None:
    count, logits = 6000, random_logits(1, 40, seed=8, spread=1.0)
    zero = torch.zeros(count, dtype=torch.int64)
    rng = np.random.default_rng(9)
    over_samples = [One(sample=i) for i in range(count)]
    over_keys = [One(key=tuple(rng.integers(0, 1 << 32, 2).tolist())) for _ in range(count)]
    for rows in (over_samples, over_keys):
        tokens = sample(logits.expand(count, -1), rows_of(rows), zero).tokens
        statistic, freedom = chi_square(tokens, softmax(logits[0].double().numpy()))
        assert statistic < chi_square_limit(freedom), (statistic, freedom)


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    row = One(temperature=1.3, top_k=200, top_p=0.9, min_p=0.02, key=(4, 4))
    logits = random_logits(1, 700, seed=2, spread=1.5)
    probabilities = softmax(filtered(logits[0].numpy(), row))
    assert 5 < (probabilities > 0).sum() < 200
    statistic, freedom = chi_square(draws(logits, row, 6000), probabilities)
    assert statistic < chi_square_limit(freedom), (statistic, freedom)


@pytest.mark.parametrize("vocabulary", [300, 512])
def test_masked_tokens_are_never_drawn(vocabulary: int) -> None:
    logits = torch.full((1, vocabulary), -torch.inf)
    live = [1, 255, 257, vocabulary - 1]
    logits[0, live] = torch.tensor([0.0, -2.0, -4.0, -8.0])
    drawn = sample(logits.expand(3000, -1), rows_of([One(key=(8, i)) for i in range(3000)]), torch.arange(3000))
    assert set(drawn.tokens.tolist()) <= set(live)
    assert drawn.logprobs.isfinite().all()
    only = torch.full((20, vocabulary), -torch.inf)
    only[:, vocabulary - 1] = -50.0
    drawn = sample(only, rows_of([One(key=(9, i)) for i in range(20)]), torch.zeros(20, dtype=torch.int64))
    assert (drawn.tokens == vocabulary - 1).all()
    assert (drawn.logprobs == 0).all()


def test_greedy_takes_the_largest_logit_with_any_filters() -> None:
    logits = random_logits(60, 777, seed=3)
    rows = [replace(row, temperature=0.0) for row in mixed_rows(60, seed=3)]
    drawn = sample(logits, rows_of(rows), torch.arange(60))
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    assert torch.allclose(drawn.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5)


# -- filters ---------------------------------------------------------------------------------------------


def kept_scores(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Return the scores [B, V], -inf where a filter drops a token."""
    thresholds = filter_thresholds(logits, rows)
    return scores_above(logits, rows.temperature, rows.min_p - torch.inf if thresholds is None else thresholds)


@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 2.0), (999, 4.0), (2500, 0.5)])
def test_filters_keep_what_transformers_keeps(vocabulary: int, spread: float) -> None:
    """In the widest case, top-p needs more than its first candidates."""
    seed = 17
    print("seed", seed)
    rows = mixed_rows(2 * len(MIXED), seed)
    logits = random_logits(len(rows), vocabulary, seed, spread)
    batch = rows_of(rows)
    scores = logits / torch.where(batch.temperature > 0, batch.temperature, 1.0)[:, None]
    kept = kept_scores(logits, batch)
    assert torch.equal(kept[kept > -torch.inf], scores[kept > -torch.inf]), "a kept score changed"
    sizes = set()
    for i, row in enumerate(rows):
        ids, theirs = torch.zeros(1, 1, dtype=torch.int64), scores[i : i + 1]
        if row.top_k:
            theirs = TopKLogitsWarper(row.top_k)(ids, theirs)  # type: ignore[arg-type]
        if row.top_p < 1:
            theirs = TopPLogitsWarper(row.top_p)(ids, theirs)  # type: ignore[arg-type]
        if row.min_p:
            theirs = MinPLogitsWarper(row.min_p)(ids, theirs)  # type: ignore[arg-type]
        assert torch.equal(kept[i] > -torch.inf, theirs[0] > -torch.inf), row
        assert torch.equal(kept[i] > -torch.inf, torch.from_numpy(filtered(logits[i].numpy(), row)) > -torch.inf), row
        sizes.add(int((kept[i] > -torch.inf).sum()))
    assert len(sizes) > 5, "the filters keep sets of many sizes"


def test_filters_apply_in_order() -> None:
    """Probabilities 0.4, 0.3, 0.2, 0.1: each pair of filters keeps a different set in a different order."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def kept(row: One) -> list[int]:
        batch = rows_of([row])
        return (kept_scores(scores, batch)[0] > -torch.inf).nonzero()[:, 0].tolist()

    assert kept(One(top_p=0.5)) == [0, 1]
    assert kept(One(top_p=0.71)) == [0, 1, 2]
    # After top-k the first has 0.57 of the mass.
    assert kept(One(top_k=2, top_p=0.5)) == [0]
    # After top-p, min-p compares with the largest, which is the same in any order.
    assert kept(One(top_p=0.8, min_p=0.6)) == [0, 1]
    # At temperature 4 the largest has 0.31, so that 0.5 takes two, and 0.55 three.
    assert kept(One(top_p=0.55, temperature=1.0)) == [0, 1]
    assert kept(One(top_p=0.6, temperature=4.0)) == [0, 1, 2]


def test_equal_scores_are_kept_or_dropped_together() -> None:
    scores = torch.tensor([[2.0, 2.0, 1.0, 1.0, 0.0]])
    for row, count in ((One(top_k=1), 2), (One(top_k=3), 4), (One(top_p=0.1), 2), (One(min_p=1.0), 2)):
        assert int((kept_scores(scores, rows_of([row])) > -torch.inf).sum()) == count, row


# -- log-probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_plain_softmax(dtype: torch.dtype) -> None:
    seed = 23
    print("seed", seed)
    rows = mixed_rows(70, seed)
    logits = random_logits(70, 901, seed).to(dtype)
    drawn = sample(logits, rows_of(rows), torch.arange(70))
    assert (drawn.tokens.dtype, drawn.logprobs.dtype, drawn.sampler_logprobs.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )
    for i, row in enumerate(rows):
        plain, token = logits[i].float().numpy(), int(drawn.tokens[i])
        full = log_softmax(plain.astype(np.float64) / (row.temperature or 1.0))
        assert float(drawn.logprobs[i]) == pytest.approx(full[token], abs=1e-5), row
        assert float(drawn.sampler_logprobs[i]) == pytest.approx(log_softmax(filtered(plain, row))[token], abs=1e-5), (
            row
        )


def test_both_logprobs_are_equal_without_filters() -> None:
    logits = random_logits(20, 300, seed=4)
    drawn = sample(logits, rows_of([One(key=(i, i)) for i in range(20)]), torch.arange(20))
    assert torch.equal(drawn.logprobs, drawn.sampler_logprobs)


# -- independent rows ------------------------------------------------------------------------------------


def assert_same(one: Sampled, other: Sampled) -> None:
    assert torch.equal(one.tokens, other.tokens)
    for ours, theirs in ((one.logprobs, other.logprobs), (one.sampler_logprobs, other.sampler_logprobs)):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)


def test_row_draws_the_same_alone_and_in_any_batch() -> None:
    """Tensor operations sample the 45 rows in three chunks on a CPU."""
    seed, count = 29, 45
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows, logits = mixed_rows(count, seed), random_logits(count, 1300, seed)
    positions = torch.from_numpy(rng.integers(0, 3000, count))

    def drawn(which: NDArray[np.int64]) -> Sampled:
        return sample(logits[which], rows_of([rows[i] for i in which]), positions[which])

    def part(whole: Sampled, which: NDArray[np.int64]) -> Sampled:
        return Sampled(whole.tokens[which], whole.logprobs[which], whole.sampler_logprobs[which])

    batched = drawn(np.arange(count))
    for i in range(count):
        assert_same(drawn(np.array([i])), part(batched, np.array([i])))
    for size in (2, 16, 17, 32, 33, 45):
        which = rng.permutation(count)[:size]
        assert_same(drawn(which), part(batched, which))


def test_non_finite_logits_affect_only_their_row() -> None:
    """The row's log-probability is not finite, which is how the engine detects it."""
    rows, logits = mixed_rows(30, seed=31), random_logits(30, 520, seed=31)
    positions = torch.arange(30)
    sound = sample(logits, rows_of(rows), positions)
    broken = logits.clone()
    broken[3] = torch.nan
    broken[7, 400] = torch.nan
    broken[11] = -torch.inf
    broken[19, 5] = torch.inf
    wrong = [3, 7, 11, 19]
    drawn = sample(broken, rows_of(rows), positions)
    assert not drawn.logprobs[wrong].isfinite().any()
    assert ((drawn.tokens >= 0) & (drawn.tokens < 520)).all()
    others = [i for i in range(30) if i not in wrong]
    assert torch.equal(drawn.tokens[others], sound.tokens[others])
    assert torch.equal(drawn.logprobs[others], sound.logprobs[others])


@pytest.mark.parametrize("row", MIXED)
def test_one_nan_makes_the_logprob_of_any_row_non_finite(row: One) -> None:
    logits = random_logits(3, 520, seed=37)
    logits[0, 0] = logits[1, 300] = logits[2, 519] = torch.nan
    assert not sample(logits, rows_of([row] * 3), torch.arange(3)).logprobs.isfinite().any()


def test_sampling_neither_reads_nor_writes_global_generators() -> None:
    logits, rows = random_logits(40, 500, seed=5), rows_of(mixed_rows(40, seed=5))
    torch.manual_seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    one = sample(logits, rows, torch.arange(40))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == before_numpy  # type: ignore[index, union-attr]
    torch.manual_seed(2)
    assert_same(one, sample(logits, rows, torch.arange(40)))
