"""Products whose rows do not depend on their batch: the kernel, its gradients, and the engine's option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedDevice, UnsupportedModel
from rollout.models.patches import batch_invariant, products_triton
from rollout.models.patches.batch_invariant import GroupedProducts, invariant_products
from rollout.models.patches.products_triton import ProductTile, grouped_product, linear, product
from tests.support.devices import GPU
from tests.support.linear_groups import groups_in_probe
from tests.support.tiny_models import tiny
from tests.support.triton_interpreter import kernels_run_here

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or the CPU with kernels in the interpreter and small tiles."""
    found = kernels_run_here(monkeypatch)
    if found.type == "cpu":
        monkeypatch.setattr(batch_invariant, "_runs_on", lambda device: True)
        monkeypatch.setattr(products_triton, "tile_of", lambda columns, dtype: ProductTile(64, 32, 16))
    return found


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    print("seed", seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_at_every_row_count(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = (numbers(count, 20, dtype=dtype, device=device, seed=count) for count in (256, 17))
    bias = numbers(17, dtype=dtype, device=device, seed=3)
    whole = product(x, weight.T, bias)
    expected = F.linear(x.float(), weight.float(), bias.float())
    assert float((whole.float() - expected).abs().max() / expected.abs().max()) < ROUNDING[dtype]
    for count in range(1, 257):
        # Another first row moves every row to another place of its tile.
        first = (7 * count) % (257 - count)
        assert torch.equal(product(x[first : first + count], weight.T, bias), whole[first : first + count]), count


def test_the_kernel_passes_its_self_test(device: torch.device) -> None:
    assert batch_invariant._self_test(device) is None


def test_biases_have_any_stride(device: torch.device) -> None:
    x, weight = (numbers(count, 20, dtype=torch.float32, device=device, seed=count) for count in (3, 17))
    strided = weight[:, 3]
    expected = product(x, weight.T, strided.clone())
    assert torch.equal(product(x, weight.T, strided), expected)
    grouped = grouped_product(x, [weight, weight], [strided, strided])
    assert grouped is not None
    assert all(torch.equal(ours, expected) for ours in grouped)


def test_shapes_that_torch_broadcasts_are_left_to_it(device: torch.device) -> None:
    x, weight = (numbers(count, 8, dtype=torch.float32, device=device, seed=count) for count in (3, 5))
    for given in ((weight, weight[0, :1]), (weight[0], None)):
        expected = F.linear(x, *given)
        with invariant_products():
            assert torch.equal(F.linear(x, *given), expected)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    x, weight = (numbers(3, 8, dtype=torch.float32, device=device, seed=seed).requires_grad_() for seed in (1, 2))
    (gradient,) = torch.autograd.grad(linear(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_one_launch_have_the_bits_of_their_own(count: int, biased: bool, device: torch.device) -> None:
    x = numbers(70, 20, dtype=torch.bfloat16, device=device, seed=1)
    sizes = (40, 8, 33)[:count]
    weights = [numbers(size, 20, dtype=torch.bfloat16, device=device, seed=size) for size in sizes]
    biases = [numbers(size, dtype=torch.bfloat16, device=device, seed=2) if biased else None for size in sizes]
    found = grouped_product(x, weights, biases)
    assert found is not None
    for ours, weight, bias in zip(found, weights, biases, strict=True):
        assert torch.equal(ours, product(x, weight.T, bias))


def test_layers_that_differ_in_kind_are_not_computed_together(device: torch.device) -> None:
    x, weight = (numbers(*shape, dtype=torch.float32, device=device, seed=1) for shape in ((3, 8), (4, 8)))
    assert grouped_product(x, [weight, weight], [None, weight[:, 0]]) is None
    assert grouped_product(x, [weight, weight.bfloat16()], [None, None]) is None
    assert grouped_product(x, [weight] * 4, [None] * 4) is None
    assert grouped_product(x[:0], [weight] * 2, [None] * 2) is None


def test_gradients_are_those_of_torch(device: torch.device) -> None:
    x, weight = (numbers(*shape, dtype=torch.float32, device=device, seed=5) for shape in ((2, 9, 20), (12, 20)))
    bias, into = (numbers(*shape, dtype=torch.float32, device=device, seed=6) for shape in ((12,), (2, 9, 12)))
    found, expected = [], []
    for function, gradients in ((linear, found), (F.linear, expected)):
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = function(given[0], given[1], given[2])
        gradients += [out.detach(), *torch.autograd.grad(out, given, into)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    alone = x[1:].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(linear(alone, weight, bias), alone, into[1:])[0], found[1][1:])


def test_only_needed_gradients_are_computed(device: torch.device) -> None:
    x, weight = (numbers(3, 8, dtype=torch.float32, device=device, seed=seed) for seed in (1, 2))
    weight.requires_grad_()
    linear(x, weight, None).sum().backward()
    assert weight.grad is not None
    assert not linear(x, weight.detach(), None).requires_grad
    with torch.no_grad():
        assert not linear(x, weight, None).requires_grad


def test_block_replaces_the_products_of_modules_and_restores_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []
    own, kernel = F.linear, products_triton.product

    def counted(left: torch.Tensor, *given: torch.Tensor | None) -> torch.Tensor:
        dtypes.append(left.dtype)
        return kernel(left, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(products_triton, "product", counted)
    layer = nn.Linear(8, 4).to(device)
    x = numbers(3, 8, dtype=torch.float32, device=device, seed=1)
    with invariant_products():
        layer(x).sum().backward()
        assert dtypes == [torch.float32] * 2, "forward, and the gradient of the weight"
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert dtypes[2:] == [torch.bfloat16]
        layer.double()(x.double())
        assert len(dtypes) == 3, "torch computes other dtypes"
    assert F.linear is own


def test_model_computes_layers_of_one_input_in_one_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen2", torch.bfloat16, num_hidden_layers=1)
    ids = torch.arange(5, device=device)[None] + 3
    groups = groups_in_probe(model, on_gpu=True)
    names = {layer: name.rpartition(".")[2] for name, layer in model.named_modules()}
    assert [[names[layer] for layer in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ]
    launches: list[int] = []
    grouped = products_triton.grouped_product

    def counted(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> list[torch.Tensor] | None:
        launches.append(len(weights))
        return grouped(x, weights, biases)

    monkeypatch.setattr(products_triton, "grouped_product", counted)
    with torch.no_grad(), invariant_products():
        alone = model(input_ids=ids, use_cache=False).logits
        assert not launches
        with GroupedProducts(groups).applied():
            together = model(input_ids=ids, use_cache=False).logits
    assert launches == [3, 2]
    assert torch.equal(alone, together)


def test_public_block_refuses_a_cpu() -> None:
    if GPU is not None:
        pytest.skip("there is a GPU")
    with (
        pytest.raises(UnsupportedDevice, match=r"^batch_invariant\(\) needs a GPU: "),
        batch_invariant.batch_invariant(),
    ):
        pass


def test_self_test_finds_a_kernel_whose_rows_depend_on_their_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products_triton, "product", lambda x, weight, bias: x @ weight + bias * (1 + 1e-3 / len(x)))
    assert "other bits in torch.float32" in str(batch_invariant._self_test(torch.device("cpu")))
    monkeypatch.setattr(products_triton, "product", lambda x, weight, bias: x @ weight)
    assert "differs from torch in torch.float32" in str(batch_invariant._self_test(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_serves_a_batch_invariant_cpu(dtype: torch.dtype) -> None:
    engine = Engine(tiny("llama").to(dtype), None, batch_invariant=True)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9], [3] * 20]
    together = engine.generate(prompts, params, seed=1)
    for row, prompt in enumerate(prompts):
        alone = engine.generate([prompt], params, seed=1, row_ids=[str(row)])
        assert alone[0].completion_ids == together[row].completion_ids
        assert alone[0].logprobs == together[row].logprobs


def test_engine_refuses_a_model_whose_rows_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forward = type(model.lm_head).forward

    def dependent(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(layer, x) * (1 + 1e-6 * x.shape[-2])

    monkeypatch.setattr(model.lm_head, "forward", dependent.__get__(model.lm_head))
    Engine(model, None)
    with pytest.raises(UnsupportedModel, match=r"^batch_invariant=true was requested, but logits of .* depend on the"):
        Engine(model, None, batch_invariant=True)
