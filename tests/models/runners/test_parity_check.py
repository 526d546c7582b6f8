"""The check at start: a model whose pages do not give its own numbers does not pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rollout.models.attention.interface import NAME
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.base import Runner
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.parity_check import check_parity
from rollout.models.runners.recurrent import RecurrentStrategy
from rollout.models.runners.select import select_strategy
from tests.support.tiny_models import INTERFACE, tiny


class Mistaken(PackedStrategy):
    """Whose probe finds another site 1 than there is."""

    changes: dict[str, Any] = {}

    def kv_layout(self) -> KVLayout:
        layout = super().kv_layout()
        sites = list(layout.layers)
        sites[1] = replace(sites[1], **self.changes)
        return KVLayout(tuple(sites), layout.dtype, layout.page_size)


def check(model: PreTrainedModel) -> None:
    check_parity(PackedStrategy(model))


def check_with(model: PreTrainedModel, **changes: Any) -> None:
    tier = Mistaken(model)
    tier.changes = changes
    check_parity(tier)


@pytest.mark.parametrize("family", INTERFACE)
def test_served_families_pass(family: str) -> None:
    check(tiny(family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_rounding_in_half_precision_passes(family: str) -> None:
    select_strategy(tiny(family, torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "span"),
    [
        ("llama", MaskKind("window", 12)),
        ("llama", MaskKind("window", 20)),
        ("llama", MaskKind("chunk", 12)),
        ("mistral", MaskKind()),
        ("mistral", MaskKind("window", 11)),
        ("mistral", MaskKind("chunk", 12)),
        ("llama4_text", MaskKind()),
        ("llama4_text", MaskKind("window", 12)),
    ],
)
def test_one_layer_that_sees_something_else_is_refused(family: str, span: MaskKind) -> None:
    model = tiny(family)
    check_with(model, mask_kind=PackedStrategy(model).kv_layout().layers[1].mask_kind)
    with pytest.raises(UnsupportedModel, match="other logits over pages than in its own forward"):
        check_with(model, mask_kind=span)


def test_a_model_that_keeps_state_in_secret_is_refused() -> None:
    """It mixes in what it computed last: a cache of its own, as a convolution or a recurrence has."""
    model = tiny("llama")
    last: list[torch.Tensor] = []

    def remember(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        before = last.pop() if last else torch.zeros_like(output[:, -1:])
        last.append(output[:, -1:].clone())
        return output + torch.cat([before, output[:, :-1]], 1)

    model.model.layers[1].mlp.register_forward_hook(remember)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*'llama'.*relative distance"):
        check(model)


def test_a_model_that_mixes_neighbours_outside_of_attention_is_refused() -> None:
    """The state of a causal convolution is not in pages; packed prefills and decodes do not have it."""
    model = tiny("llama")

    def shift(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    model.model.layers[2].mlp.register_forward_hook(shift)
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_a_tier_that_gives_one_sequence_the_pages_of_another_is_refused() -> None:
    class Swapped(PackedStrategy):
        def runner(self, pool: PagePool) -> Any:
            own = super().runner(pool)

            class Changed(Runner):
                def forward(self, packed: ForwardBatch) -> torch.Tensor:
                    tables = packed.page_tables[:, ::-1].copy() if packed.prefix_lens.all() else packed.page_tables
                    return own.forward(replace(packed, page_tables=tables))

            return Changed()

    with pytest.raises(UnsupportedModel, match="other logits"):
        check_parity(Swapped(tiny("llama")))


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("mistake", ["swapped", "not kept"])
def test_a_tier_that_loses_or_mixes_states_is_refused(family: str, mistake: str) -> None:
    class Careless(RecurrentStrategy):
        def runner(self, pool: PagePool) -> Any:
            own = super().runner(pool)

            class Changed(Runner):
                def forward(self, packed: ForwardBatch) -> torch.Tensor:
                    decodes = packed.prefix_lens.all()
                    before = [tensor.clone() for tensor in pool.states.slab(0).tensors]
                    mixed = decodes and mistake == "swapped"
                    logits = own.forward(replace(packed, states=packed.states[::-1].copy()) if mixed else packed)
                    if decodes and mistake == "not kept":
                        for tensor, old in zip(pool.states.slab(0).tensors, before, strict=True):
                            tensor.copy_(old)
                    return logits

            return Changed()

    check_parity(RecurrentStrategy(tiny(family)))
    with pytest.raises(UnsupportedModel, match="other logits"):
        check_parity(Careless(tiny(family)))


def test_a_model_that_behaves_otherwise_on_loan_is_refused() -> None:
    model = tiny("llama")

    def scale(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return 1.1 * output if model.config._attn_implementation == NAME else output

    model.model.layers[0].self_attn.v_proj.register_forward_hook(scale)
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_a_model_whose_numbers_are_not_finite_is_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 5] = torch.nan
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_nothing_is_left_behind() -> None:
    model = tiny("llama").train()
    state, before = torch.get_rng_state(), model.config._attn_implementation
    check(model)
    with pytest.raises(UnsupportedModel):
        check_with(model, mask_kind=MaskKind("window", 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == before
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
