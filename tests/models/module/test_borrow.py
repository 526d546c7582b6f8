"""A borrowed module is switched while it is used and restored exactly."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.models.attention import interface
from rollout.models.errors import UnsupportedModel
from rollout.models.module.borrow import BorrowedModule, _modules
from rollout.models.module.inspect import unwrap_model
from tests.support.tiny_models import tiny


class Parallel(nn.Module):
    """Wraps a model as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def with_adapter(model: PreTrainedModel) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed(model: nn.Module) -> list[bool]:
    """Set the training flag of every third module, so that flags differ; return all flags."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    return flags(model)


# -- wrappers --------------------------------------------------------------------------------------------


def test_unwrap_model_finds_the_model_in_every_wrapper() -> None:
    model = tiny("llama")
    assert unwrap_model(model) is model
    assert unwrap_model(Parallel(model)) is model
    assert unwrap_model(torch.compile(model)) is model  # type: ignore[arg-type]
    assert unwrap_model(Parallel(torch.compile(model))) is model  # type: ignore[arg-type]
    adapted = with_adapter(model)
    assert unwrap_model(adapted) is model
    assert unwrap_model(Parallel(adapted)) is model


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Parallel(nn.Linear(2, 2))])
def test_unwrap_model_refuses_other_modules(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="is not a transformers model"):
        unwrap_model(module)


@pytest.mark.parametrize("wrap", [with_adapter, Parallel])
def test_wrapped_model_is_switched_through_its_wrapper(wrap: type[nn.Module]) -> None:
    inner = tiny("llama")
    model = wrap(inner)
    before = mixed(model)
    own = inner.config._attn_implementation
    with BorrowedModule(model).borrow(interface.NAME):
        assert inner.config._attn_implementation == interface.NAME
        assert not any(flags(model))
    assert inner.config._attn_implementation == own
    assert flags(model) == before


# -- switched state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_restored_one_by_one(fails: bool) -> None:
    model = tiny("llama")
    before = mixed(model)
    assert len(set(before)) == 2
    borrowed = BorrowedModule(model)
    for _ in range(2):
        if fails:
            with pytest.raises(ZeroDivisionError), borrowed.borrow(interface.NAME):
                raise ZeroDivisionError
        else:
            with borrowed.borrow(interface.NAME):
                assert not any(flags(model))
        assert flags(model) == before


def test_training_flags_that_are_no_plain_attributes_are_switched_too() -> None:
    class Own(nn.Module):
        """Keeps its flag elsewhere, as TorchScript does."""

        flag = True
        training = property(lambda self: self.flag, lambda self, value: vars(self).update(flag=value))  # type: ignore[assignment]

    model = tiny("llama").train()
    model.model.own, model.model.nothing = Own(), None
    model.model.again = model.model.layers[0]  # a module that two modules hold
    assert set(_modules(model)) == set(model.modules())
    with BorrowedModule(model).borrow():
        assert not any(flags(model))
    assert all(flags(model))


@pytest.mark.parametrize("fails", [False, True])
def test_attention_implementation_of_every_configuration_is_restored(fails: bool) -> None:
    """Parts of composite models have their own configurations."""
    model = tiny("llama")
    parts = [layer.self_attn for layer in model.model.layers[:2]]
    for part, implementation in zip(parts, ("eager", "flex_attention"), strict=True):
        part.config = copy.deepcopy(part.config)
        part.config._attn_implementation_internal = implementation
    configs = [model.config, *(part.config for part in parts)]
    before = [config._attn_implementation_internal for config in configs]
    assert len(set(before)) == 3
    try:
        with BorrowedModule(model).borrow(interface.NAME):
            assert [config._attn_implementation for config in configs] == [interface.NAME] * 3
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [config._attn_implementation_internal for config in configs] == before


def test_attention_implementation_at_the_time_of_borrowing_is_restored() -> None:
    """A trainer may change it between two times that the module is borrowed."""
    model = tiny("llama")
    borrowed = BorrowedModule(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with borrowed.borrow(interface.NAME):
            assert model.config._attn_implementation == interface.NAME
        assert model.config._attn_implementation == implementation


def test_borrowing_can_keep_the_attention_implementation() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    before = mixed(model)
    with BorrowedModule(model).borrow():
        assert model.config._attn_implementation == "eager"
        assert not any(flags(model))
    assert flags(model) == before


# -- unchanged state -----------------------------------------------------------------------------------------


def test_gradients_are_off_while_borrowed_and_on_again_after() -> None:
    model = tiny("llama")
    ids = torch.arange(5)[None]
    with BorrowedModule(model).borrow(interface.NAME):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not model.get_input_embeddings()(ids).requires_grad
    assert torch.is_grad_enabled()
    model(input_ids=ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        with BorrowedModule(model).borrow(interface.NAME):
            pass
        assert not torch.is_grad_enabled(), "a caller's own no_grad stays in force"


def test_random_state_parameters_and_settings_do_not_change() -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    config = copy.deepcopy(model.config.to_dict())
    wants = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), BorrowedModule(model).borrow(interface.NAME):
        assert torch.is_autocast_enabled("cpu"), "the caller's autocast stays in force"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert model.is_gradient_checkpointing
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert len(model.model.layers[1].mlp._forward_hooks) == 1
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_logits_are_the_same_before_and_after_borrowing() -> None:
    model = tiny("gemma2")
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    with BorrowedModule(model).borrow(interface.NAME):
        pass
    assert torch.equal(model(input_ids=ids).logits, before)
