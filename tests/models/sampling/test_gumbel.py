"""The sampling kernels against tensor operations and against the definition.

Triton runs on the GPU if there is one, else in its interpreter.
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
from rollout.models.sampling.base import Draws, GumbelKernel
from rollout.models.sampling.gumbel_cpu import gumbel_max
from rollout.models.sampling.gumbel_tensor import TensorGumbelMax
from rollout.models.sampling.gumbel_triton import TritonGumbelMax
from rollout.models.sampling.sampler import RowSampling, Sampled, sample
from tests.support.devices import GPU
from tests.support.triton_interpreter import kernels_run_here


class OnDevice:
    """The Triton kernel with its arguments copied to a device, and its draws copied back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def draw(self, *given: torch.Tensor | None) -> Draws:
        tokens, logprobs, log_sums = TritonGumbelMax().draw(*(x if x is None else x.to(self._device) for x in given))  # type: ignore[arg-type]
        return Draws(tokens.cpu(), logprobs.cpu(), log_sums.cpu())


@pytest.fixture(params=["compiled", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GumbelKernel:
    """Each kernel, as `sample` uses it."""
    if request.param == "triton":
        on_device = OnDevice(kernels_run_here(monkeypatch))
        monkeypatch.setattr(sampler, "gumbel_max", lambda: on_device)
        return on_device
    compiled = gumbel_max()
    if compiled is None:
        pytest.skip("there is no compiler on this machine")
    return compiled


@pytest.fixture(autouse=True)
def clear_cache() -> Iterator[None]:
    """Load the kernel again after a test that hides the compiler."""
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
    )


def case(
    count: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, RowSampling, torch.Tensor]:
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator).mul(3).to(dtype)
    return logits, rows_of(count, generator), torch.randint(0, 500, (count,), generator=generator)


def interpreted(kernel: GumbelKernel) -> bool:
    """Whether Triton's interpreter draws, which computes row by row and takes milliseconds for each."""
    return isinstance(kernel, OnDevice) and GPU is None


def by_tensors(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    return sampler.sample_with(TensorGumbelMax(), logits, rows, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 1000, 5000])
def test_kernel_draws_match_tensor_operations(kernel: GumbelKernel, vocabulary: int, dtype: torch.dtype) -> None:
    logits, rows, positions = case(8 if interpreted(kernel) else 64, vocabulary, vocabulary, dtype)
    got, wanted = sample(logits, rows, positions), by_tensors(logits, rows, positions)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.allclose(got.logprobs, wanted.logprobs, atol=3e-6)
    assert torch.equal(got.sampler_logprobs, got.logprobs)


def test_filtered_kernel_draws_match_tensor_operations(kernel: GumbelKernel) -> None:
    # Filters repeat after six rows.
    row = torch.arange(18 if interpreted(kernel) else 64)
    logits, rows, positions = case(len(row), 1500, 3)
    rows = replace(rows, top_k=row % 3 * 4, most_top_k=8, top_p=1 - 0.1 * (row % 2), any_top_p=True)
    got, wanted = sample(logits, rows, positions), by_tensors(logits, rows, positions)
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.allclose(got.logprobs, wanted.logprobs, atol=3e-6)
    assert torch.allclose(got.sampler_logprobs, wanted.sampler_logprobs, atol=3e-6)


def test_row_bits_do_not_depend_on_batch_composition(kernel: GumbelKernel) -> None:
    """Batched or alone, beside filtered rows or not, in one thread or two."""
    count = 14 if interpreted(kernel) else 40
    logits, rows, positions = case(count, 3000, 4)
    batched = sample(logits, rows, positions)
    for part in (slice(0, 1), slice(7, count // 2 + 3), slice(count - 1, count)):
        alone = sample(logits[part], rows.rows(part), positions[part])
        for name in ("tokens", "logprobs", "sampler_logprobs"):
            assert torch.equal(getattr(alone, name), getattr(batched, name)[part])
    beside = replace(rows, top_k=torch.tensor([5, *[0] * (count - 1)]), most_top_k=5)
    mixed = sample(logits, beside, positions)
    for name in ("tokens", "logprobs", "sampler_logprobs"):
        assert torch.equal(getattr(mixed, name)[1:], getattr(batched, name)[1:])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = sample(logits, rows, positions)
    torch.set_num_threads(before)
    assert torch.equal(threaded.tokens, batched.tokens)
    assert torch.equal(threaded.logprobs, batched.logprobs)


def test_draws_follow_the_distribution(kernel: GumbelKernel) -> None:
    vocabulary, draws = 300, 150 if interpreted(kernel) else 20_000
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


def test_non_finite_logits_do_not_affect_other_rows(kernel: GumbelKernel) -> None:
    logits, rows, positions = case(8, 600, 9)
    clean = sample(logits, rows, positions)
    logits[2, 5], logits[4, 300], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[6, :599] = -torch.inf
    broken = sample(logits, rows, positions)
    assert not torch.isfinite(broken.logprobs[[2, 4, 5]]).any()
    assert broken.tokens[6] == 599
    assert broken.logprobs[6] == 0
    assert ((broken.tokens >= 0) & (broken.tokens < 600)).all()
    rest = [0, 1, 3, 7]
    assert torch.equal(broken.tokens[rest], clean.tokens[rest])
    assert torch.equal(broken.logprobs[rest], clean.logprobs[rest])


def test_non_contiguous_logits_draw_the_same_tokens(kernel: GumbelKernel) -> None:
    logits, rows, positions = case(6, 500, 10)
    strided = torch.stack([logits, logits + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(sample(strided, rows, positions).tokens, sample(logits, rows, positions).tokens)


def test_tensor_operations_sample_without_a_compiler(
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


def test_kernel_with_wrong_log_sums_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "gumbel_max.c"
    source = module._SOURCE.read_text()
    assert source.count("b->totals[row] = top +") == 1
    wrong.write_text(source.replace("b->totals[row] = top +", "b->totals[row] = 0.01 + top +"))
    for header in module._SOURCE.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_SOURCE", wrong)
    gumbel_max.cache_clear()
    assert gumbel_max() is None
    assert "log-probabilities of the compiled kernel differ by 0.01 " in caplog.text


def test_triton_kernel_is_used_if_it_passes_its_self_test(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = kernels_run_here(monkeypatch)
    assert sampler._self_test(TritonGumbelMax(), device) is None
    draw = TritonGumbelMax.draw
    changes = ((1, 0.0, "different tokens"), (0, 1e-3, "its log-probabilities differ by 0.001 "))
    for token_shift, logprob_shift, reason in changes:

        def wrong(self: TritonGumbelMax, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tokens, logprobs, totals = draw(self, *given)
            return tokens + token_shift, logprobs + logprob_shift, totals  # noqa: B023 - called in this iteration

        monkeypatch.setattr(TritonGumbelMax, "draw", wrong)
        assert reason in (sampler._self_test(TritonGumbelMax(), device) or "")

    def fails(self: TritonGumbelMax, *given: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(TritonGumbelMax, "draw", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(sampler, "_self_test", lambda kernel, _: kernel.draw())
    sampler._triton_kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [sampler._triton_kernel(torch.device("cuda", 9)) for _ in range(2)] == [None, None]
    finally:
        sampler._triton_kernel.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "The Triton sampling kernel is not used on some GPU, so sampling is slower: "
        "RuntimeError: Failed to find C compiler."
    ]
