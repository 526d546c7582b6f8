"""The samplers by kernels against the one of tensor operations, and against the definition.

Triton's runs on a GPU where there is one, else in its interpreter.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.models.sampling import gumbel_cpu as module
from rollout.models.sampling import sampler
from rollout.models.sampling.gumbel_cpu import GumbelMax, gumbel_max
from rollout.models.sampling.gumbel_triton import TritonGumbelMax
from rollout.models.sampling.sampler import Kernel, RowSampling, Sampled, sample
from tests.support.devices import GPU
from tests.support.triton_interpreter import kernels_run_here


class Placed:
    """Triton's, with the tensors of a test on their way to where it runs and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def draw(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, logprobs, totals = TritonGumbelMax().draw(*(x.to(self._device) for x in given))
        return tokens.cpu(), logprobs.cpu(), totals.cpu()


@pytest.fixture(params=["compiled", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """What `sample` takes."""
    if request.param == "triton":
        placed = Placed(kernels_run_here(monkeypatch))
        monkeypatch.setattr(sampler, "gumbel_max", lambda: placed)
        return placed
    found = gumbel_max()
    if found is None:
        pytest.skip("there is no compiler on this machine")
    return found


@pytest.fixture(autouse=True)
def one_cache() -> Iterator[None]:
    """A test that hides the compiler must not leave the others without a kernel."""
    yield
    gumbel_max.cache_clear()


def rows_of(
    count: int, generator: torch.Generator, temperatures: tuple[float, ...] = (0.0, 0.6, 1.0, 1.7)
) -> RowSampling:
    choice = torch.randint(0, len(temperatures), (count,), generator=generator)
    return RowSampling(
        temperature=torch.tensor(temperatures)[choice],
        top_k=torch.zeros(count, dtype=torch.int64),
        top_p=torch.ones(count),
        min_p=torch.zeros(count),
        keys=torch.randint(0, 1 << 32, (count, 2), generator=generator),
        samples=torch.randint(0, 9, (count,), generator=generator),
        most_top_k=0,
        any_top_p=False,
        any_min_p=False,
        any_greedy=0.0 in temperatures,
    )


def case(
    count: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, RowSampling, torch.Tensor]:
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator).mul(3).to(dtype)
    return logits, rows_of(count, generator), torch.randint(0, 500, (count,), generator=generator)


def by_tensors(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    return sampler._sample(logits, rows, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 1000, 5000])
def test_the_same_draws_as_tensor_operations(kernel: Kernel, vocabulary: int, dtype: torch.dtype) -> None:
    logits, rows, positions = case(64, vocabulary, vocabulary, dtype)
    got, wanted = sample(logits, rows, positions), by_tensors(logits, rows, positions)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.allclose(got.logprobs, wanted.logprobs, atol=3e-6)
    assert torch.equal(got.sampler_logprobs, got.logprobs)


def test_filtered_rows_too(kernel: Kernel) -> None:
    logits, rows, positions = case(64, 1500, 3)
    rows = replace(
        rows, top_k=torch.arange(64) % 3 * 4, most_top_k=8, top_p=1 - 0.1 * (torch.arange(64) % 2), any_top_p=True
    )
    got, wanted = sample(logits, rows, positions), by_tensors(logits, rows, positions)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.allclose(got.logprobs, wanted.logprobs, atol=3e-6)
    assert torch.allclose(got.sampler_logprobs, wanted.sampler_logprobs, atol=3e-6)


def test_a_row_has_the_same_bits_in_any_company(kernel: Kernel) -> None:
    """With others or alone, with filters beside it or not, in one thread or two."""
    logits, rows, positions = case(40, 3000, 4)
    together = sample(logits, rows, positions)
    for part in (slice(0, 1), slice(7, 20), slice(39, 40)):
        alone = sample(logits[part], rows.rows(part), positions[part])
        for name in ("tokens", "logprobs", "sampler_logprobs"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[part])
    beside = replace(rows, top_k=torch.tensor([5, *[0] * 39]), most_top_k=5)
    mixed = sample(logits, beside, positions)
    for name in ("tokens", "logprobs", "sampler_logprobs"):
        assert torch.equal(getattr(mixed, name)[1:], getattr(together, name)[1:])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = sample(logits, rows, positions)
    torch.set_num_threads(before)
    assert torch.equal(threaded.tokens, together.tokens)
    assert torch.equal(threaded.logprobs, together.logprobs)


def test_draws_follow_the_distribution(kernel: Kernel) -> None:
    # In the interpreter a draw takes some milliseconds.
    vocabulary, draws = 300, 20_000 if isinstance(kernel, GumbelMax) or GPU is not None else 300
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(vocabulary, generator=generator).mul(2)
    rows = replace(
        rows_of(draws, generator, (0.8,)),
        keys=torch.tensor([[3, 4]]).repeat(draws, 1),
        samples=torch.zeros(draws, dtype=torch.int64),
    )
    tokens = sample(logits.repeat(draws, 1), rows, torch.arange(draws)).tokens
    expected = (logits / 0.8).softmax(-1) * draws
    often = expected >= 5
    counts = torch.bincount(tokens, minlength=vocabulary).float()
    chi_square = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    freedom = int(often.sum())
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_numbers_that_are_not_finite_stay_in_their_row(kernel: Kernel) -> None:
    logits, rows, positions = case(8, 600, 9)
    clean = sample(logits, rows, positions)
    logits[2, 5], logits[4, 300], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[6, :599] = -torch.inf
    spoilt = sample(logits, rows, positions)
    assert not torch.isfinite(spoilt.logprobs[[2, 4, 5]]).any()
    assert spoilt.tokens[6] == 599
    assert spoilt.logprobs[6] == 0
    assert ((spoilt.tokens >= 0) & (spoilt.tokens < 600)).all()
    rest = [0, 1, 3, 7]
    assert torch.equal(spoilt.tokens[rest], clean.tokens[rest])
    assert torch.equal(spoilt.logprobs[rest], clean.logprobs[rest])


def test_inputs_that_do_not_lie_in_a_row(kernel: Kernel) -> None:
    logits, rows, positions = case(6, 500, 10)
    spread = torch.stack([logits, logits + 1], -1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(sample(spread, rows, positions).tokens, sample(logits, rows, positions).tokens)


def test_without_a_compiler_tensor_operations_draw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gumbel_max.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    logits, rows, positions = case(20, 300, 11)
    with caplog.at_level(logging.WARNING):
        got = [sample(logits, rows, positions) for _ in range(2)]
    assert gumbel_max() is None
    assert sum("gumbel_max.c" in message for message in caplog.messages) == 1
    assert torch.equal(got[0].tokens, by_tensors(logits, rows, positions).tokens)


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "gumbel_max.c"
    source = module._SOURCE.read_text()
    assert source.count("b->totals[row] = top +") == 1
    wrong.write_text(source.replace("b->totals[row] = top +", "b->totals[row] = 0.01 + top +"))
    shutil.copy(module._SOURCE.with_name("vectors.h"), tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_SOURCE", wrong)
    gumbel_max.cache_clear()
    assert gumbel_max() is None
    assert "computes something else" in caplog.text


def test_triton_s_are_used_where_they_draw_what_tensor_operations_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = kernels_run_here(monkeypatch)
    assert sampler._disagreement(TritonGumbelMax(), device) is None
    draw = TritonGumbelMax.draw
    changes = ((1, 0.0, "other tokens"), (0, 1e-3, "its log-probabilities are others"))
    for more_tokens, more, said in changes:

        def wrong(self: TritonGumbelMax, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tokens, logprobs, totals = draw(self, *given)
            return tokens + more_tokens, logprobs + more, totals  # noqa: B023 - called in this turn

        monkeypatch.setattr(TritonGumbelMax, "draw", wrong)
        assert said in (sampler._disagreement(TritonGumbelMax(), device) or "")

    def fails(self: TritonGumbelMax, *given: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(TritonGumbelMax, "draw", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(sampler, "_disagreement", lambda kernel, _: kernel.draw())
    sampler._triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [sampler._triton(torch.device("cuda", 9)) for _ in range(2)] == [None, None]
    finally:
        sampler._triton.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Triton's sampling is not used on some GPU, which is slower: RuntimeError: Failed to find C compiler."
    ]
