"""The Triton top-p search against its definition; sampling on a GPU never synchronizes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.models.sampling import sampler, top_p, top_p_triton
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
        monkeypatch.setattr(top_p_triton, "BLOCK", 256)
    return found


def scores_of(vocabulary: int, spread: float, seed: int, rows: int, device: torch.device) -> torch.Tensor:
    print("seed", seed)
    drawn = np.random.default_rng(seed).standard_normal((rows, vocabulary), np.float32) * spread
    return torch.from_numpy(drawn).to(device)


@pytest.mark.parametrize("vocabulary", [1, 50, 257, 2000])
@pytest.mark.parametrize("spread", [0.01, 2.0, 30.0])
def test_search_finds_the_threshold(vocabulary: int, spread: float, device: torch.device) -> None:
    wanted = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], device=device)
    scores = scores_of(vocabulary, spread, vocabulary, len(wanted), device)
    for shift in (0.0, 100.0, -100.0):
        found = threshold(scores + shift, wanted)
        assert is_threshold(scores + shift, wanted, found).all()


def test_the_search_finds_what_sorting_finds(device: torch.device) -> None:
    """But where rounding decides: here nothing is near enough to a border."""
    scores = scores_of(1500, 3.0, 1, 8, device)
    wanted = torch.full((8,), 0.8, device=device)
    assert torch.equal(threshold(scores, wanted), threshold_by_sorting(scores, wanted))


def test_scores_that_are_equal_zero_or_infinite(device: torch.device) -> None:
    low = -torch.inf
    rows = [[0.0, -0.0, 0.0, low], [1.0, 1.0, 1.0, 1.0], [low, 2.0, low, -3.0], [-5.0, -6.0, low, low]]
    scores = torch.tensor(rows, device=device)
    wanted = torch.tensor([0.5, 0.3, 0.5, 0.999], device=device)
    assert threshold(scores, wanted)[:, 0].tolist() == [0.0, 1.0, 2.0, -6.0]


def test_threshold_bits_do_not_depend_on_batch_or_strides(device: torch.device) -> None:
    scores = scores_of(700, 2.0, 2, 5, device)
    wanted = torch.tensor([0.5, 0.9, 1.0, 0.95, 0.2], device=device)
    batched = threshold(scores.T.contiguous().T, wanted)
    for row in range(5):
        assert torch.equal(threshold(scores[row : row + 1], wanted[row : row + 1]), batched[row : row + 1])


def test_row_of_nan_terminates_and_leaves_other_rows(device: torch.device) -> None:
    scores = scores_of(300, 2.0, 3, 2, device)
    wanted = torch.full((2,), 0.7, device=device)
    alone = threshold(scores[1:], wanted[1:])
    scores[0, 7] = torch.nan
    assert torch.equal(threshold(scores, wanted)[1:], alone)


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

    def launch(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return threshold(scores, wanted)

    monkeypatch.setattr(sampler, "top_p_threshold", launch)
    logits = scores_of(2000, 0.5, 4, len(rows), torch.device("cpu"))
    parameters, positions = rows_of(rows), torch.arange(len(rows))
    with NoSynchronization():
        found = sampler.sample_with(TensorGumbelMax(), logits, parameters, positions)
    monkeypatch.setattr(sampler, "top_p_threshold", threshold_by_sorting)
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
