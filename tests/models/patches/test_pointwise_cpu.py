"""The compiled norms and rotary embeddings match torch, transformers, and themselves bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from rollout.models.csrc import build
from rollout.models.csrc.build import KernelUnavailable
from rollout.models.patches import pointwise_cpu as module
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise

DTYPES = (torch.float32, torch.bfloat16)
#: Less than a vector, whole vectors, pairs of them, and remainders of each, for vectors of 4 to 16 numbers.
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 75, 96, 131, 576)
DIMS = (2, 4, 6, 14, 16, 18, 30, 32, 34, 62, 64, 66, 80, 96, 126, 128)
#: This many rows of `WIDE` are split over threads, with a remainder.
MANY, WIDE = 157, 200


def needs_compiler() -> None:
    try:
        build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def kernel() -> Pointwise:
    needs_compiler()
    found = pointwise()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def one_cache() -> Iterator[None]:
    """Drop wrong kernels that a test has built."""
    yield
    pointwise.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that numbers which a kernel does not write fail the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    print("seed", seed)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.5).to(dtype)


def angles(seed: int, tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return cosines and sines that differ between the halves, as in models that scale them."""
    phases = numbers(seed, tokens, dim)
    return [phases.cos().to(dtype), phases.sin().to(dtype)]


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, late: bool) -> torch.Tensor:
    """Norm in double precision, except for the intended roundings to the dtype."""
    normal = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return ((normal if late else normal.to(x.dtype).double()) * weight.double()).to(x.dtype)


def assert_norms_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare up to the rounding of sums, which moves few numbers in bfloat16."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    half = ours.dtype == torch.bfloat16
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7 if half else 1e-6, atol=0.0)
    if half:
        assert (ours == theirs).float().mean() > 0.995


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare bit for bit, with NaN equal to NaN."""
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True)


def rotated_by_transformers(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> list[torch.Tensor]:
    """Rotate heads [T, heads, dim], in the shape of `Pointwise.rotate`."""
    rotated = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cosines[None], sines[None])
    return [x[0].transpose(0, 1) for x in rotated]


# -- norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_match_the_definition(kernel: Pointwise, dtype: torch.dtype, late: bool) -> None:
    for width in WIDTHS:
        x, weight = numbers(width, 40, width, dtype=dtype), numbers(1, width)
        for eps in (1e-6, 0.3):
            got = kernel.rms_norm(x, kernel.norm_factors(weight, dtype), eps, late)
            assert_norms_agree(got, exact_norm(x, weight, eps, late))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "plus", "late"), [(LlamaRMSNorm, 0, False), (GemmaRMSNorm, 1, True), (Olmo2RMSNorm, 0, True)]
)
def test_norms_match_transformers(
    kernel: Pointwise, family: type[nn.Module], plus: float, late: bool, dtype: torch.dtype
) -> None:
    for width in (40, 576):
        norm = family(width, eps=1e-5).to(dtype)
        norm.weight.data.copy_(numbers(2, width))
        x = numbers(3, MANY, width, dtype=dtype)
        factors = kernel.norm_factors(norm.weight.detach().float() + plus, dtype)
        assert_norms_agree(kernel.rms_norm(x, factors, 1e-5, late), norm(x).detach())
        if dtype == torch.bfloat16:  # rounding at the other place makes a difference
            other = kernel.rms_norm(x, factors, 1e-5, not late)
            assert (other == norm(x)).float().mean() < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_take_rows_of_any_shape_and_strides(kernel: Pointwise, dtype: torch.dtype) -> None:
    width = 75
    factors = kernel.norm_factors(numbers(4, width), dtype)
    x = numbers(5, 6, width, dtype=dtype)
    wanted = kernel.rms_norm(x, factors, 1e-6, late=False)
    odd = torch.empty(1 + x.numel(), dtype=dtype)[1:].view_as(x)  # not aligned to vectors
    wide, columns = torch.empty(6, width + 9, dtype=dtype)[:, 4:-5], torch.empty(width, 6, dtype=dtype).t()
    for place in (odd, wide, columns):
        place.copy_(x)
        assert_same(kernel.rms_norm(place, factors, 1e-6, late=False), wanted)
    assert_same(kernel.rms_norm(x.view(2, 3, width), factors, 1e-6, late=False), wanted.view(2, 3, width))
    assert_same(kernel.rms_norm(x[2], factors, 1e-6, late=False), wanted[2])
    assert kernel.rms_norm(x[:0], factors, 1e-6, late=False).shape == (0, width)


def test_factors_take_weights_of_any_dtype_and_strides(kernel: Pointwise) -> None:
    weight = numbers(6, 75, dtype=torch.bfloat16)
    x = numbers(7, 4, 75, dtype=torch.bfloat16)
    wanted = kernel.rms_norm(x, kernel.norm_factors(weight, x.dtype), 1e-6, late=True)
    every_second = torch.stack([weight, -weight], -1).float()[:, 0]
    for same in (weight.double(), nn.Parameter(weight.float()), every_second):
        assert_same(kernel.rms_norm(x, kernel.norm_factors(same, x.dtype), 1e-6, late=True), wanted)


def test_factors_are_copies_of_the_weight(kernel: Pointwise) -> None:
    weight, x = torch.ones(40), numbers(8, 3, 40)
    factors = kernel.norm_factors(weight, x.dtype)
    wanted = kernel.rms_norm(x, factors, 1e-6, late=False)
    weight.mul_(2.0)
    assert_same(kernel.rms_norm(x, factors, 1e-6, late=False), wanted)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_normed_row_has_the_same_bits_in_any_batch(kernel: Pointwise, dtype: torch.dtype, late: bool) -> None:
    x, factors = numbers(9, MANY, WIDE, dtype=dtype), kernel.norm_factors(numbers(10, WIDE), dtype)
    together = kernel.rms_norm(x, factors, 1e-6, late)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(kernel.rms_norm(x, factors, 1e-6, late), together)
        assert_same(kernel.rms_norm(x[1:-1], factors, 1e-6, late), together[1:-1])
    for row in (0, 1, 77, MANY - 1):
        assert_same(kernel.rms_norm(x[row : row + 1], factors, 1e-6, late), together[row : row + 1])
    assert_same(kernel.rms_norm(x.flip(0), factors, 1e-6, late).flip(0), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_numbers_change_only_the_norms_of_their_rows(kernel: Pointwise, dtype: torch.dtype) -> None:
    """NaN fills its row; infinity becomes NaN and zeroes the rest of its row; other rows do not change."""
    width = 75
    norm = LlamaRMSNorm(width).to(dtype)
    norm.weight.data.copy_(numbers(11, width))
    factors = kernel.norm_factors(norm.weight, dtype)
    clean = numbers(12, 8, width, dtype=dtype)
    for at in (0, 1, 40, 41, 64, 73, 74):
        x = clean.clone()
        x[1, at], x[3, at], x[5, at], x[6] = torch.nan, torch.inf, -torch.inf, 3e38
        got = kernel.rms_norm(x, factors, norm.variance_epsilon, late=False)
        assert_same(got[[1, 3, 5, 6]], norm(x[[1, 3, 5, 6]]).detach())
        assert got[1].isnan().all()
        for row in (3, 5):
            assert got[row].isnan().sum() == 1
            assert got[row, at].isnan()
        rest = [0, 2, 4, 7]
        assert_same(got[rest], kernel.rms_norm(clean, factors, norm.variance_epsilon, late=False)[rest])


# -- rotary embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_match_transformers_bit_for_bit(kernel: Pointwise, dtype: torch.dtype) -> None:
    for dim in DIMS:
        for heads, kv_heads in ((4, 2), (3, 1), (1, 3)):
            query, key = numbers(dim, 5, heads, dim, dtype=dtype), numbers(dim + 1, 5, kv_heads, dim, dtype=dtype)
            given = (query, key, *angles(dim + 2, 5, dim, dtype))
            for ours, theirs in zip(kernel.rotate(*given), rotated_by_transformers(*given), strict=True):
                assert ours.is_contiguous()
                assert_same(ours, theirs)


def test_rotations_match_the_definition(kernel: Pointwise) -> None:
    """A pair of numbers, one of each half, rotates like a complex number times ``exp(i * angle)``."""
    x, phases = numbers(13, 7, 3, 80), numbers(14, 7, 40)
    doubled = torch.cat([phases, phases], -1)
    turned = torch.complex(x[..., :40], x[..., 40:]) * torch.polar(torch.ones(7, 1, 40), phases[:, None])
    for part in kernel.rotate(x, x, doubled.cos(), doubled.sin()):
        assert torch.allclose(part, torch.cat([turned.real, turned.imag], -1), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_take_heads_of_any_strides(kernel: Pointwise, dtype: torch.dtype) -> None:
    tokens, dim = 5, 34
    query, key = numbers(15, tokens, 4, dim, dtype=dtype), numbers(16, tokens, 2, dim, dtype=dtype)
    turns = angles(17, tokens, dim, dtype)
    wanted = kernel.rotate(query, key, *turns)

    def placed(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        place.copy_(x)
        assert place.stride(2) == 1
        return place

    side_by_side = torch.cat([query, key], 1)  # views of one product
    across = [placed(x, torch.empty(x.shape[1], tokens, dim, dtype=dtype).transpose(0, 1)) for x in (query, key)]
    apart = [placed(x, torch.empty(tokens, 2 * x.shape[1], dim + 3, dtype=dtype)[:, 1::2, 2:-1]) for x in (query, key)]
    odd = [placed(x, torch.empty(1 + x.numel(), dtype=dtype)[1:].view_as(x)) for x in (query, key)]
    for given in (side_by_side.split([4, 2], 1), across, apart, odd, (query, apart[1])):
        for ours, theirs in zip(kernel.rotate(*given, *turns), wanted, strict=True):
            assert_same(ours, theirs)
    shared = kernel.rotate(query[:1].expand(tokens, -1, -1), key[:, :1].expand(-1, 2, -1), *turns)
    repeated = kernel.rotate(query[:1].repeat(tokens, 1, 1), key[:, :1].repeat(1, 2, 1), *turns)
    for ours, theirs in zip(shared, repeated, strict=True):
        assert_same(ours, theirs)
    empty = kernel.rotate(query[:0], key[:0], *(x[:0] for x in turns))
    assert [x.shape for x in empty] == [(0, 4, dim), (0, 2, dim)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_token_has_the_same_bits_in_any_batch(kernel: Pointwise, dtype: torch.dtype) -> None:
    query, key = numbers(18, MANY, 4, 50, dtype=dtype), numbers(19, MANY, 2, 50, dtype=dtype)
    turns = angles(20, MANY, 50, dtype)
    together = kernel.rotate(query, key, *turns)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for part in (slice(None), slice(0, 1), slice(77, 78), slice(1, MANY - 1)):
            alone = kernel.rotate(query[part], key[part], *(x[part] for x in turns))
            for ours, theirs in zip(alone, together, strict=True):
                assert_same(ours, theirs[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_numbers_change_only_their_own_pair_in_rotations(kernel: Pointwise, dtype: torch.dtype) -> None:
    query, key = numbers(21, 3, 2, 74, dtype=dtype), numbers(22, 3, 1, 74, dtype=dtype)
    turns = angles(23, 3, 74, dtype)
    for at in (0, 1, 31, 36, 37, 38, 73):
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = query.clone()
            spoilt[1, 1, at] = bad
            ours = kernel.rotate(spoilt, key, *turns)
            for one, other in zip(ours, rotated_by_transformers(spoilt, key, *turns), strict=True):
                assert_same(one, other)
            assert (~ours[0].isfinite()).sum() == 2
            assert ours[1].isfinite().all()


# -- threads and building --------------------------------------------------------------------------------


def test_large_inputs_are_split_over_the_threads_of_torch(kernel: Pointwise) -> None:
    """The kernel starts threads by the same OpenMP function as torch; small inputs use one thread."""
    if kernel._parallel is None:
        pytest.skip("torch has no OpenMP here")
    torch.set_num_threads(2)
    asked = []

    @module.ctypes.CFUNCTYPE(None, module.c_void_p, module.c_void_p, module.ctypes.c_uint, module.ctypes.c_uint)
    def parallel(work: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        module.ctypes.CFUNCTYPE(None, module.c_void_p)(work)(data)

    kernel._parallel = module.ctypes.cast(parallel, module.c_void_p).value
    factors = kernel.norm_factors(torch.ones(WIDE), torch.float32)
    few, many = numbers(24, 3, WIDE), numbers(25, MANY, WIDE)
    assert_same(
        kernel.rms_norm(many, factors, 1e-6, late=False)[:3], kernel.rms_norm(many[:3], factors, 1e-6, late=False)
    )
    assert asked == [2]
    for x in (few, many):
        heads = x.view(len(x), 2, 100)
        kernel.rotate(heads, heads, x[:, :100].contiguous(), x[:, :100].contiguous())
    assert asked == [2, 2]
    torch.set_num_threads(1)
    kernel.rms_norm(many, factors, 1e-6, late=False)
    assert asked == [2, 2]


def test_kernel_compiles_without_warnings(tmp_path: Path) -> None:
    needs_compiler()
    native = "-mcpu=native" if os.uname().machine == "aarch64" else "-march=native"
    warnings = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Wno-unused-command-line-argument"]
    for flags in ([native], []):
        subprocess.run([*build.compiler(), *build.FLAGS, *flags, *warnings, str(module._SOURCE)], check=True)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("even + odd", "even"),
        ("squares += v * v", "squares += v"),
        ("rounded_pair(dtype, p)", "minus(p, p)"),
        ("v * n->factors[i]", "v"),
        ("minus(a, b)", "plus(a, b)"),
        ("products[2] + products[3]", "products[2]"),
        ("factors[i + W + j] = weight[i + 2 * j + 1]", "factors[i + W + j] = weight[i + 2 * j]"),
    ],
)
def test_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, right: str, wrong: str
) -> None:
    needs_compiler()
    sources = [module._SOURCE, module._SOURCE.with_name("pointwise_rows.h")]
    assert sum(source.read_text().count(right) for source in sources) == 1
    for header in module._SOURCE.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    for source in sources:
        (tmp_path / source.name).write_text(source.read_text().replace(right, wrong))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
    monkeypatch.setattr(module, "_SOURCE", tmp_path / "pointwise.c")
    pointwise.cache_clear()
    assert pointwise() is None
    assert "the compiled kernel is wrong: it differs from torch in torch." in caplog.text
    assert not list(tmp_path.rglob("pointwise*.so"))
