"""Linear layers computed from packed copies: same results for any number of rows, and the module is restored."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.patches import linear_products
from rollout.models.patches.linears import PackedLinears
from tests.support.linear_layers import DTYPES, PLENTY, computed, layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=("compiled", "onednn"), autouse=True)
def multiplier(request: pytest.FixtureRequest) -> None:
    """Run every test with both."""
    if request.param == "onednn":
        request.getfixturevalue("onednn")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_packed_layers_match_their_own_forward(dtype: torch.dtype) -> None:
    model, x = layers(dtype), torch.randn(3, 7, 48).to(dtype)
    out = computed(model, x)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), model(x).float(), atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert (out != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    model, x = layers(dtype), torch.randn(1, 300, 48).to(dtype)
    together = computed(model, x)
    for rows in (1, 2, 3, 5, 8, 16, 31, 64, 129):
        assert torch.equal(computed(model, x[:, :rows]), together[:, :rows])
        assert torch.equal(computed(model, x[0, -rows:]), together[0, -rows:])


def test_rows_are_padded_to_few_sizes_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN builds a kernel for each size."""
    given: list[int] = []
    mkldnn: Any = torch.ops.mkldnn
    own = mkldnn._linear_pointwise.default

    def multiply(x: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(x.shape[0])
        out: torch.Tensor = own(x, *others)
        return out

    monkeypatch.setattr(mkldnn, "_linear_pointwise", SimpleNamespace(default=multiply))
    multiply_rows = linear_products._packed(torch.randn(32, 16), None)
    counts = [*range(2, 130), *range(130, 2049, 37), 2048]
    with torch.no_grad():
        for count in counts:
            assert multiply_rows(torch.randn(count, 16)).shape == (count, 32)
    assert given[:15] == counts[:15]
    assert all(count <= size <= 1.125 * count for count, size in zip(counts, given, strict=True))
    assert len(set(given)) <= 15 + 8 * 7


@torch.no_grad()
def test_half_precision_is_rounded_once_per_product() -> None:
    """Hardware with half-precision instructions rounds the same way."""
    layer, x = nn.Linear(400, 30).to(torch.bfloat16), torch.randn(5, 400).to(torch.bfloat16)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert (computed(layer, x) == exact.bfloat16()).float().mean() > 0.99


@torch.no_grad()
def test_packed_layers_follow_autocast() -> None:
    model, x = layers(), torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = model[0](x), computed(model[0], x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert torch.allclose(got.float(), wanted.float(), atol=1e-2)
    assert not torch.equal(got.float(), model[0](x))


@torch.no_grad()
def test_new_instance_uses_changed_weights() -> None:
    model, x = layers(), torch.randn(4, 48)
    before = computed(model, x)
    model[0].weight.data.mul_(2.0)
    assert torch.allclose(computed(model, x), model(x), atol=1e-6)
    assert not torch.allclose(computed(model, x), before, atol=1e-3)


def test_module_is_restored_after_applied() -> None:
    model = layers()
    before = [dict(vars(module)) for module in model.modules()]
    with PackedLinears(model, PLENTY).applied():
        assert "forward" in vars(model[0])
    with pytest.raises(AttributeError), PackedLinears(model, PLENTY).applied():
        model(None)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_shared_weight_is_copied_once() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    one = PackedLinears(model, PLENTY).bytes_held
    assert one == 2 * 4 * 32 * 32
    model[1].weight = model[0].weight
    assert PackedLinears(model, PLENTY).bytes_held == one // 2


@torch.no_grad()
def test_layers_with_a_shared_weight_keep_their_own_bias() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(3, 32)
    model[1].weight = model[0].weight
    assert torch.allclose(computed(model, x), model(x), atol=1e-6)


@torch.no_grad()
def test_layers_that_do_not_fit_keep_their_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    model, x = layers(), torch.randn(3, 48)
    first = 4 * 48 * 160  # no padding in a packed copy either
    held = PackedLinears(model, first)
    assert held.bytes_held == first
    assert "1 linear layers are not packed" in caplog.text
    with held.applied():
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[2])
        assert torch.allclose(model(x), computed(model, x), atol=1e-6)


@torch.no_grad()
def test_patched_layers_and_subclasses_are_not_packed(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    model[0].forward = lambda x: x + 1  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.WARNING):
        held = [PackedLinears(model, PLENTY) for _ in range(2)][-1]
    message = "1 linear layers are not packed, since their forward is patched"
    assert caplog.text.count(message) == 1
    assert held.bytes_held == 0
    with held.applied():
        assert torch.equal(model[0](torch.zeros(8)), torch.ones(8))
    assert torch.equal(model[0](torch.zeros(8)), torch.ones(8))


@torch.no_grad()
def test_half_precision_gets_float32_copies_without_packing(monkeypatch: pytest.MonkeyPatch, onednn: None) -> None:
    monkeypatch.setattr(linear_products, "_can_pack", lambda dtype: False)
    monkeypatch.setattr(linear_products, "cpu_multiplies", lambda dtype: dtype == torch.float32)
    assert PackedLinears(layers(), PLENTY).bytes_held == 0
    model, x = layers(torch.bfloat16), torch.randn(3, 48).bfloat16()
    assert PackedLinears(model, PLENTY).bytes_held == 4 * (48 * 160 + 160 * 50)
    assert torch.allclose(computed(model, x).float(), model(x).float(), atol=1e-2)
