"""Products with packed weights: as exact as their dtype, and with a row's bits whatever else is computed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from rollout.models.csrc import build
from rollout.models.csrc.build import FLAGS, KernelUnavailable
from rollout.models.patches import compiled_products as module
from rollout.models.patches.compiled_products import CompiledProducts, PackedWeight, compiled_products

DTYPES = (torch.float32, torch.bfloat16)
#: Parts of a vector, of two, of a block of the packed weight; whole ones; and some of each with a remainder.
OUTPUTS = (1, 7, 15, 16, 17, 31, 32, 33, 63, 100)
INPUTS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 161)
#: Flags that leave out the instructions of a kernel, so that the next one is used.
VARIANTS = {
    "native": ("-march=native",),
    "no tiles": ("-march=native", "-mno-amx-bf16", "-mno-amx-tile"),
    "no bfloat16": ("-march=native", "-mno-amx-bf16", "-mno-amx-tile", "-mno-avx512bf16"),
    "haswell": ("-march=haswell",),
    "no vectors": (),
}


def command() -> list[str]:
    try:
        return build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=VARIANTS, scope="session")
def kernel(request: pytest.FixtureRequest) -> CompiledProducts:
    """The kernel as it is compiled for other CPUs, and the one of this CPU."""
    if request.param == "native":
        command()
        found = compiled_products()
        assert found is not None
        return found
    if platform.machine() != "x86_64" and request.param != "no vectors":
        pytest.skip("flags of x86-64")
    command()
    # Less optimized, since that is compiled in half of the time.
    flags = [flag if flag != "-O3" else "-O1" for flag in (*FLAGS, *VARIANTS[request.param])]
    return build.build_with(flags, module.SOURCE, CompiledProducts)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Fill new memory with NaN, so that numbers that the kernel does not write fail the test; restore the threads."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(
    kernel: CompiledProducts, outputs: int, inputs: int, dtype: torch.dtype, biased: bool = False
) -> PackedWeight:
    return kernel.pack(numbers(outputs, inputs, dtype=dtype, seed=1), numbers(outputs, seed=2) if biased else None)


def largest_error(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Return the largest error, in units of what rounding the sums and the result may cause."""
    x, weight = x.double(), weight.double()
    added = torch.zeros(len(weight)).double() if bias is None else bias.double()
    exact = x @ weight.T + added
    unit = 2.0**-24 * (x.shape[1] ** 0.5 + 2) * (x.abs() @ weight.T.abs() + added.abs())
    if out.dtype == torch.bfloat16:
        unit += 2.0**-8 * exact.abs() + 1e-37
    return float(((out.double() - exact).abs() / unit).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_match_double_precision(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    for (outputs, inputs), biased in product(product(OUTPUTS, INPUTS), (False, True)):
        weight, x = numbers(outputs, inputs, dtype=dtype, seed=1), numbers(37, inputs, dtype=dtype)
        bias = numbers(outputs, seed=2) if biased else None
        out = kernel.multiply(kernel.pack(weight, bias), x)
        assert out.dtype == dtype
        assert out.shape == (37, outputs)
        assert largest_error(out, x, weight, bias) <= 1, (outputs, inputs, biased)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_for_any_number_of_rows(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    """At the beginning, at the end and in the middle of a batch."""
    for outputs, inputs in ((49, 75), (96, 128)):
        weight, x = packed(kernel, outputs, inputs, dtype, biased=True), numbers(200, inputs, dtype=dtype)
        whole = kernel.multiply(weight, x)
        for rows in (*range(71), *range(126, 131)):
            for start in {0, 5, 200 - rows if rows else 0}:
                part = slice(start, min(start + rows, 200))
                assert torch.equal(kernel.multiply(weight, x[part]), whole[part]), (outputs, rows, start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_large_batches_and_any_number_of_threads(
    kernel: CompiledProducts, dtype: torch.dtype
) -> None:
    weight, x = packed(kernel, 320, 192, dtype), numbers(4099, 192, dtype=dtype)
    torch.set_num_threads(1)
    whole = kernel.multiply(weight, x)
    assert largest_error(whole, x, numbers(320, 192, dtype=dtype, seed=1), None) <= 1
    for threads, rows in product((2, 3, 7), (1, 17, 127, 511, 512, 513, 544, 1025, 4095, 4096, 4099)):
        torch.set_num_threads(threads)
        assert torch.equal(kernel.multiply(weight, x[-rows:]), whole[-rows:]), (threads, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_of_many_inputs_or_outputs_gives_a_row_the_same_bits(dtype: torch.dtype) -> None:
    """Also where a part of it exceeds the caches."""
    command()
    kernel = compiled_products()
    assert kernel is not None
    for outputs, inputs in ((152_001, 64), (70, 4864), (33, 20_000)):
        weight, x = packed(kernel, outputs, inputs, dtype), numbers(150, inputs, dtype=dtype)
        whole = kernel.multiply(weight, x)
        assert largest_error(whole, x, numbers(outputs, inputs, dtype=dtype, seed=1), None) <= 1
        for rows in (1, 2, 16, 65):
            assert torch.equal(kernel.multiply(weight, x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_affect_each_other(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    for inputs, rows in product((33, 64), (2, 15, 40, 90)):
        weight, x = packed(kernel, 70, inputs, dtype), numbers(rows, inputs, dtype=dtype)
        clean = kernel.multiply(weight, x)
        for bad in (0, rows // 2, rows - 1):
            spoilt = x.clone()
            spoilt[bad, ::2], spoilt[bad, 1::2] = torch.nan, torch.inf
            out = kernel.multiply(weight, spoilt)
            assert out[bad].isnan().all()
            others = torch.arange(rows) != bad
            assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_a_row_is_not_read_into_it(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    """Rows may be parts of larger ones, any number of bytes apart."""
    for inputs, gap in product((1, 31, 33, 64), (1, 5, 64, 1024 - 33)):
        weight, rows = packed(kernel, 40, inputs, dtype), 35
        apart = torch.full((rows, inputs + gap), torch.nan, dtype=dtype)
        apart[:, :inputs] = numbers(rows, inputs, dtype=dtype)
        together = apart[:, :inputs].contiguous()
        assert torch.equal(kernel.multiply(weight, apart[:, :inputs]), kernel.multiply(weight, together))
        assert torch.equal(kernel.multiply(weight, together.T.contiguous().T), kernel.multiply(weight, together))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_a_power_of_two_apart(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    weight, x = packed(kernel, 40, 512, dtype), numbers(50, 512, dtype=dtype)
    out = kernel.multiply(weight, x)
    assert largest_error(out, x, numbers(40, 512, dtype=dtype, seed=1), None) <= 1
    for rows in (1, 4, 5, 20):
        assert torch.equal(kernel.multiply(weight, x[:rows]), out[:rows])


def test_products_of_nothing() -> None:
    command()
    kernel = compiled_products()
    assert kernel is not None
    weight = packed(kernel, 5, 8, torch.float32, biased=True)
    assert kernel.multiply(weight, torch.ones(0, 8)).shape == (0, 5)
    assert kernel.multiply(weight, torch.ones(3, 0, 8)).shape == (3, 0, 5)
    assert kernel.multiply(weight, torch.ones(8)).shape == (5,)
    empty = packed(kernel, 5, 0, torch.float32, biased=True)
    assert torch.equal(kernel.multiply(empty, torch.ones(3, 0)), numbers(5, seed=2).expand(3, 5))
    assert kernel.multiply(packed(kernel, 0, 8, torch.float32), torch.ones(3, 8)).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_values_are_packed_in_the_same_memory(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    weight, other, bias = (numbers(*shape, dtype=dtype, seed=3) for shape in ((70, 33), (33, 70), (70,)))
    weight_held, address = kernel.pack(weight, bias), 0
    address = weight_held.address
    kernel.pack_again(weight_held, other.T, -bias)  # of any strides
    assert weight_held.address == address
    x = numbers(9, 33, dtype=dtype)
    again = kernel.multiply(kernel.pack(other.T.contiguous(), -bias), x)
    assert torch.equal(kernel.multiply(weight_held, x), again)
    for wrong in ((weight[:5], bias), (weight, None), (weight.double(), bias)):
        with pytest.raises(ValueError, match="Expected a weight"):
            kernel.pack_again(weight_held, *wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_has_the_same_result_in_any_number_of_threads(kernel: CompiledProducts, dtype: torch.dtype) -> None:
    held = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        held.append(packed(kernel, 700, 210, dtype).values)
        assert len(held[-1]) == kernel.packed_bytes(dtype, 700, 210) >= 700 * 210 * dtype.itemsize
    assert torch.equal(*held)


def test_packing_counts_its_padding() -> None:
    command()
    kernel = compiled_products()
    assert kernel is not None
    for dtype in DTYPES:
        assert kernel.packed_bytes(dtype, 640, 320) == 640 * 320 * dtype.itemsize
    assert kernel.packed_bytes(torch.bfloat16, 1, 1) % 64 == 0


def test_inputs_that_do_not_match_are_refused() -> None:
    command()
    kernel = compiled_products()
    assert kernel is not None
    weight = packed(kernel, 5, 8, torch.float32)
    for x in (torch.ones(3, 7), torch.ones(3, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="Expected"):
            kernel.multiply(weight, x)


def test_a_wrong_kernel_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    for file in module.SOURCE.parent.glob("*.[ch]"):
        shutil.copy(file, tmp_path / file.name)
    header = tmp_path / "products_part.h"
    right = "a += outputs->bias[0]"
    assert right in header.read_text()
    header.write_text(header.read_text().replace(right, "a -= outputs->bias[0]"))
    monkeypatch.setattr(module, "SOURCE", tmp_path / "products.c")
    monkeypatch.setattr(build, "FLAGS", tuple(flag if flag != "-O3" else "-O1" for flag in FLAGS))
    assert compiled_products.__wrapped__() is None
    assert "differs from torch" in caplog.text


def test_bfloat16_flushes_no_normal_number(kernel: CompiledProducts) -> None:
    """Instructions for bfloat16 may take subnormal numbers for zero, but no others."""
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    weight = kernel.pack(torch.eye(40, dtype=torch.bfloat16), None)
    x = torch.full((20, 40), smallest, dtype=torch.bfloat16)
    assert torch.equal(kernel.multiply(weight, x), x)
