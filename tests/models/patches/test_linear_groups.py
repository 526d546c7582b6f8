"""Linear layers with the same input computed as one product."""

from __future__ import annotations

import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rollout.models.patches import linear_products
from rollout.models.patches.linears import PackedLinears
from tests.support.linear_layers import DTYPES, PLENTY, as_group, each, one_input

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.mark.parametrize(
    "biases", [(True, False, True), (False, False, False), (True, True, True), (False, False, True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_matches_the_forwards_of_its_layers(
    dtype: torch.dtype, biases: tuple[bool, ...], products: list[torch.Size]
) -> None:
    model, x = one_input(dtype, biases), torch.randn(3, 7, 48).to(dtype)
    own = each(model, x)
    held = as_group(model)
    assert held.bytes_held == PackedLinears(model, PLENTY).bytes_held
    with held.applied():
        products.clear()
        together = each(model, x)
        assert products == [(3, 7, 64 + 32 + 7)]
    for ours, theirs in zip(together, own, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_has_the_bits_of_its_layers_packed_one_by_one(dtype: torch.dtype) -> None:
    """So layers that do not fit as a group, or are called alone, compute the same."""
    model, x = one_input(dtype), torch.randn(300, 48).to(dtype)
    for rows in (0, 1, 2, 3, 16, 17, 64, 300):
        with PackedLinears(model, PLENTY).applied():
            single = each(model, x[:rows])
        with as_group(model).applied():
            together = each(model, x[:rows])
        for ours, theirs in zip(together, single, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_group_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """Also alone and in any shape: without padding, a product of one row would use another kernel."""
    model, x = one_input(dtype, sizes=(192, 64, 64)), torch.randn(300, 48).to(dtype)
    with as_group(model).applied():
        together = each(model, x)
        for rows in (1, 2, 3, 5, 8, 16, 31, 64, 129):
            for part in (slice(0, rows), slice(300 - rows, 300)):
                for given in (x[part], x[part][None], x[part][:, None]):
                    for ours, theirs in zip(each(model, given), together, strict=True):
                        assert torch.equal(ours.reshape(rows, -1), theirs[part])
        for ours, theirs in zip(each(model, x[5]), together, strict=True):
            assert torch.equal(ours, theirs[5])


def test_one_row_is_padded_to_two_for_onednn(monkeypatch: pytest.MonkeyPatch, onednn: None) -> None:
    """oneDNN may use a kernel for one row that rounds differently; this test does not depend on the CPU."""
    given: list[torch.Size] = []
    mkldnn: Any = torch.ops.mkldnn
    own = mkldnn._linear_pointwise.default

    def multiply(x: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(x.shape)
        out: torch.Tensor = own(x, *others)
        return out

    model = one_input()
    monkeypatch.setattr(mkldnn, "_linear_pointwise", SimpleNamespace(default=multiply))
    with as_group(model).applied():
        given.clear()  # drop the calls of the self-test
        for shape in ((48,), (1, 48), (1, 1, 48), (2, 48), (1, 2, 48), (0, 48)):
            assert [out.shape for out in each(model, torch.ones(shape))] == [(*shape[:-1], n) for n in (64, 32, 7)]
    assert given == [(2, 48), (2, 48), (2, 48), (2, 48), (1, 2, 48), (0, 48)]


@torch.no_grad()
def test_layers_of_a_group_may_be_called_alone_or_in_another_order(products: list[torch.Size]) -> None:
    model, (x, y) = one_input(), torch.randn(2, 5, 48)
    first, second, third = model
    calls = [
        *((third, x), (first, x), (second, x)),  # another order
        *((second, x), (second, x)),  # one of them alone, twice
        *((first, x), (first, y), (second, x), (second, y)),  # alternating inputs
        *((third, y), (third, y.clone()), (first, y)),
    ]
    own = [layer(given) for layer, given in calls]
    with as_group(model).applied():
        products.clear()
        for (layer, given), wanted in zip(calls, own, strict=True):
            assert torch.allclose(layer(given), wanted, atol=1e-6)
    assert len(products) == 1 + 2 + 3 + 2  # each part of a product serves one call


@torch.no_grad()
def test_input_changed_in_place_between_calls_is_multiplied_again() -> None:
    model, x = one_input(), torch.randn(5, 48)
    with as_group(model).applied():
        before = model[0](x)
        x.mul_(2.0)
        after = model[1](x)
        x[0] = 0.0
        last = model[2](x)
    assert torch.allclose(before[1:], model[0](x / 2)[1:], atol=1e-6)
    assert torch.allclose(after[1:], model[1](x)[1:], atol=1e-6)
    assert torch.allclose(last, model[2](x), atol=1e-6)


@torch.no_grad()
def test_caller_may_change_results_in_place() -> None:
    model, x = one_input(), torch.randn(5, 48)
    first, second, third = each(model, x)
    with as_group(model).applied():
        model[0](x).fill_(torch.nan)
        assert torch.allclose(model[1](x), second, atol=1e-6)
        assert torch.allclose(model[0](x), first, atol=1e-6)  # not the changed result
        assert torch.allclose(model[2](x), third, atol=1e-6)


def test_groups_work_in_inference_mode(products: list[torch.Size]) -> None:
    """Tensors of inference mode do not count in-place changes."""
    model, x = one_input(), torch.randn(5, 48)
    own = each(model, x)
    with torch.inference_mode(), as_group(model).applied():
        products.clear()
        for given in (x, x.clone()):
            for ours, theirs in zip(each(model, given), own, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-6)
        assert len(products) == 2


@torch.no_grad()
def test_groups_follow_autocast() -> None:
    model, x = one_input(), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = each(model, x)
        with as_group(model).applied():
            got = each(model, x)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-2)


@torch.no_grad()
def test_groups_hold_no_tensors_of_a_step() -> None:
    model = one_input()

    with as_group(model).applied():
        x = torch.randn(5, 48)
        inner = weakref.ref(x)
        each(model, x)
        del x
        assert inner() is None  # once all layers of the group were called
    held, x, y = as_group(model), torch.randn(5, 48), torch.randn(5, 48)
    with held.applied():
        model[0](x)
    with pytest.raises(AttributeError), held.applied():
        model[2](model[1](y).no_such_name)
    outer = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [reference() for reference in outer] == [None, None]
    assert not any(merged._parts for merged in held._merged)


def test_layers_of_a_group_are_restored() -> None:
    model = one_input()
    before = [dict(vars(module)) for module in model.modules()]
    with as_group(model).applied():
        assert all("forward" in vars(layer) for layer in model)
    assert [dict(vars(module)) for module in model.modules()] == before


@torch.no_grad()
def test_new_instance_uses_changed_weights_of_a_group() -> None:
    model, x = one_input(), torch.randn(5, 48)
    held = as_group(model)
    with held.applied():
        before = each(model, x)
    model[1].weight.mul_(2.0)
    model[2].bias.add_(1.0)
    with held.applied():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(each(model, x), before, strict=True))
    own = each(model, x)
    with as_group(model).applied():
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(each(model, x), own, strict=True))


@torch.no_grad()
def test_layers_of_a_group_that_does_not_fit_are_packed_one_by_one(
    caplog: pytest.LogCaptureFixture, products: list[torch.Size]
) -> None:
    """As many of its layers are packed as fit; a later group may still fit."""
    model, x = one_input(sizes=(64, 32, 16)), torch.randn(5, 48)
    own = each(model, x)
    room = 4 * 48 * (64 + 16)
    held = PackedLinears(model, room, [tuple(model)])
    assert held.bytes_held == room
    assert "1 linear layers are not packed" in caplog.text
    with held.applied():
        products.clear()
        got = each(model, x)
    assert products == [(5, 64), (5, 16)]
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(got, own, strict=True))
    held = PackedLinears(model, 4 * 48 * (32 + 16), [(model[0],), tuple(model)[1:]])
    with held.applied():
        products.clear()
        each(model, x)
    assert products == [(5, 48)]


@torch.no_grad()
def test_layers_with_shared_weights_are_not_merged(products: list[torch.Size]) -> None:
    """Merging them would copy the same weight twice."""
    model, x = one_input(biases=(False,) * 4, sizes=(32, 32, 32, 32)), torch.randn(5, 48)
    elsewhere = nn.Linear(48, 32, bias=False)
    elsewhere.weight = model[1].weight
    whole = nn.ModuleList([model, elsewhere])
    own = each(model, x)
    held = PackedLinears(whole, PLENTY, [tuple(model)])
    assert held.bytes_held == 4 * 4 * 48 * 32
    with held.applied():
        products.clear()
        together = each(model, x)
    assert Counter(products) == Counter({(5, 96): 1, (5, 32): 1})
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(together, own, strict=True))
    model[0].weight = model[2].weight
    with PackedLinears(whole, PLENTY, [tuple(model)[:3]]).applied():
        products.clear()
        each(model, x)
    assert products == [(5, 32)] * 4


@torch.no_grad()
def test_a_step_of_trained_layers_copies_no_frozen_layer_of_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(32, 64, bias=False) for _ in range(4)]
    for layer in layers[::2]:
        layer.requires_grad_(False)
    packed = as_group(nn.ModuleList(layers))
    copied: list[tuple[int, ...]] = []
    load = linear_products.LinearProduct.load

    def recorded(product: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        copied.append(tuple(weight.shape))
        load(product, weight, bias)

    monkeypatch.setattr(linear_products.LinearProduct, "load", recorded)
    with torch.no_grad():
        for layer in layers[1::2]:
            layer.weight += 1.0
    assert packed.refresh({(id(layer), "weight") for layer in layers[1::2]}, moved=False)
    assert copied == [(128, 32)]


def test_subclasses_of_linear_leave_their_group(products: list[torch.Size]) -> None:
    class Own(nn.Linear):
        """A subclass with its own forward."""

    model, x = one_input(), torch.randn(5, 48)
    model[1].__class__ = Own
    own = each(model, x)
    with as_group(model).applied():
        assert "forward" not in vars(model[1])
        products.clear()
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(each(model, x), own, strict=True))
    assert products == [(5, 64 + 7)]


@torch.no_grad()
def test_groups_get_float32_copies_without_packing(monkeypatch: pytest.MonkeyPatch, onednn: None) -> None:
    monkeypatch.setattr(linear_products, "_can_pack", lambda dtype: False)
    monkeypatch.setattr(linear_products, "cpu_multiplies", lambda dtype: dtype == torch.float32)
    assert as_group(one_input()).bytes_held == 0
    model, x = one_input(torch.bfloat16), torch.randn(5, 48).bfloat16()
    own, held = each(model, x), as_group(model)
    assert held.bytes_held == 4 * 48 * (64 + 32 + 7)
    with held.applied():
        for ours, theirs in zip(each(model, x), own, strict=True):
            assert torch.allclose(ours.float(), theirs.float(), atol=1e-2)
