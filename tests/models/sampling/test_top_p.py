"""The Triton top-p kernel against its definition; sampling on a GPU never synchronizes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.models.sampling import sampler, top_p, top_p_triton
from rollout.models.sampling.base import scores_above
from rollout.models.sampling.gumbel_tensor import TensorGumbelMax
from rollout.models.sampling.top_p import is_threshold, threshold_by_sorting
from rollout.models.sampling.top_p_triton import threshold
from tests.support.devices import GPU
from tests.support.sampling import One, rows_of
from tests.support.triton_interpreter import kernels_run_here


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    found = kernels_run_here(monkeypatch)
    if found.type == "cpu":
        # So that small vocabularies have several blocks and parts.
        monkeypatch.setattr(top_p_triton, "BLOCK", 256)
        monkeypatch.setattr(top_p_triton, "PART_BLOCKS", 4)
    return found


def scores_of(vocabulary: int, spread: float, seed: int, rows: int, device: torch.device) -> torch.Tensor:
    print("seed", seed)
    drawn = np.random.default_rng(seed).standard_normal((rows, vocabulary), np.float32) * spread
    return torch.from_numpy(drawn).to(device)


def found_in(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the thresholds [B] of logits [B, V] at temperature 1, without earlier filters."""
    ones = torch.ones_like(top_p)
    return threshold(logits, ones, top_p, ones - torch.inf)


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "spread", "shift"),
    [
        (torch.float32, 1, 2.0, 0.0),
        (torch.float32, 50, 0.01, -100.0),
        (torch.float32, 257, 30.0, 100.0),
        (torch.float32, 1300, 2.0, 0.0),
        (torch.bfloat16, 257, 2.0, -100.0),
        (torch.bfloat16, 1300, 2.0, 0.0),
        (torch.float16, 1300, 30.0, 100.0),
    ],
)
def test_kernel_finds_the_threshold(
    dtype: torch.dtype, vocabulary: int, spread: float, shift: float, device: torch.device
) -> None:
    wanted = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], device=device)
    temperatures = torch.tensor([0.5, 1.0, 1.7, 0.0, 1.0, 0.3], device=device)
    floors = torch.full((6,), -torch.inf, device=device)
    logits = (scores_of(vocabulary, spread, vocabulary, len(wanted), device) + shift).to(dtype)
    found = threshold(logits, temperatures, wanted, floors)
    assert is_threshold(scores_above(logits, temperatures, floors), wanted, found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_finds_what_sorting_finds_above_a_floor(dtype: torch.dtype, device: torch.device) -> None:
    """But where rounding decides: here nothing is near enough to a border."""
    logits = scores_of(1300, 3.0, 1, 4, device).to(dtype)
    wanted = torch.full((4,), 0.8, device=device)
    temperatures = torch.tensor([1.0, 0.7, 0.0, 2.3], device=device)
    scores = scores_above(logits, temperatures, torch.full((4,), -torch.inf, device=device))
    floors = torch.cat((scores[:3].topk(40, dim=-1).values[:, -1], torch.full((1,), -torch.inf, device=device)))
    found = threshold(logits, temperatures, wanted, floors)
    assert torch.equal(found, threshold_by_sorting(scores_above(logits, temperatures, floors), wanted))
    assert not torch.equal(found, threshold_by_sorting(scores, wanted)), "the floors matter"


def test_half_precision_takes_four_passes(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    passes: list[int] = []

    class Counting:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*args: Any, **named: Any) -> None:
                passes.append(args[0].element_size())
                kernel[grid](*args, **named)

            return launch

    kernel = top_p_triton.sum_masses
    monkeypatch.setattr(top_p_triton, "sum_masses", Counting())
    logits, wanted = scores_of(300, 2.0, 5, 2, device), torch.full((2,), 0.7, device=device)
    found_in(logits.bfloat16(), wanted)
    assert passes == [2] * 4, "the logits are read in their own dtype"
    found_in(logits, wanted)
    assert passes[4:] == [4] * 8


def test_scores_that_are_equal_zero_or_infinite(device: torch.device) -> None:
    low = -torch.inf
    rows = [[0.0, -0.0, 0.0, low], [1.0, 1.0, 1.0, 1.0], [low, 2.0, low, -3.0], [-5.0, -6.0, low, low]]
    wanted = torch.tensor([0.5, 0.3, 0.5, 0.999], device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert found_in(torch.tensor(rows, device=device, dtype=dtype), wanted).tolist() == [0.0, 1.0, 2.0, -6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_bits_do_not_depend_on_batch_or_strides(dtype: torch.dtype, device: torch.device) -> None:
    logits = scores_of(1100, 2.0, 2, 3, device).to(dtype)
    wanted = torch.tensor([0.5, 0.9, 1.0], device=device)
    batched = found_in(logits.T.contiguous().T, wanted)
    for row in range(3):
        assert torch.equal(found_in(logits[row : row + 1], wanted[row : row + 1]), batched[row : row + 1])


def test_row_of_nan_terminates_and_leaves_other_rows(device: torch.device) -> None:
    logits = scores_of(300, 2.0, 3, 2, device)
    wanted = torch.full((2,), 0.7, device=device)
    alone = found_in(logits[1:], wanted[1:])
    logits[0, 7] = torch.nan
    assert torch.equal(found_in(logits, wanted)[1:], alone)


class NoSynchronization(TorchDispatchMode):
    """Refuse operations that synchronize with a GPU: reads by the host and data-dependent shapes."""

    _SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith(("index", "_index")) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in _flat(args[1:])
        )
        if name in self._SYNCHRONIZING or masked:
            raise AssertionError(f"{func} synchronizes with the device")
        return func(*args, **(kwargs or {}))


def _flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [x for value in values for x in _flat(value)]
    return [values]


@pytest.mark.parametrize(
    "rows",
    [
        [One()],
        [One(temperature=0.0), One(temperature=0.7)],
        [One(top_k=5), One(top_p=0.9), One(min_p=0.1), One(temperature=0.0)],
        [One(top_p=0.999), One(top_p=0.5, top_k=40, min_p=0.01)],
    ],
)
def test_tensor_operations_of_sampling_never_synchronize(rows: list[One], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of a GPU step, run on a CPU. The kernel runs unwatched: on a GPU it only launches."""
    if GPU is not None:
        pytest.skip("tests/gpu checks this with torch's sync debug mode")

    def launch(*given: torch.Tensor) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return threshold(*given)

    def sort(logits: torch.Tensor, temperatures: torch.Tensor, wanted: torch.Tensor, floors: torch.Tensor) -> Any:
        return threshold_by_sorting(scores_above(logits, temperatures, floors), wanted)

    monkeypatch.setattr(sampler, "top_p_threshold", launch)
    logits = scores_of(1300, 0.5, 4, len(rows), torch.device("cpu"))
    parameters, positions = rows_of(rows), torch.arange(len(rows))
    with NoSynchronization():
        found = sampler.sample_with(TensorGumbelMax(), logits, parameters, positions)
    monkeypatch.setattr(sampler, "top_p_threshold", sort)
    by_sorting = sampler.sample_with(TensorGumbelMax(), logits, parameters, positions)
    assert torch.equal(found.tokens, by_sorting.tokens)
    if any(row.top_p < 1 for row in rows):
        with pytest.raises(AssertionError, match=r"_local_scalar_dense.* synchronizes"), NoSynchronization():
            sampler.sample_with(TensorGumbelMax(), logits, parameters, positions)


def test_failing_top_p_kernel_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*about: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(top_p_triton, "threshold", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    top_p._kernel_works.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not any(top_p._kernel_works(torch.device("cpu")) for _ in range(2))
    finally:
        top_p._kernel_works.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "The Triton top-p kernel is not used on some GPU, so steps with top-p wait for the device: "
        "RuntimeError: Failed to find C compiler."
    ]
