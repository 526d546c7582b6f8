"""The parity check refuses a model whose logits over pages differ from its own."""

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
from tests.support.tiny_models import PACKED, tiny


class Mistaken(PackedStrategy):
    """A strategy whose layout has a wrong layer 1."""

    changes: dict[str, Any] = {}

    def kv_layout(self) -> KVLayout:
        layout = super().kv_layout()
        layers = list(layout.layers)
        layers[1] = replace(layers[1], **self.changes)
        return KVLayout(layers=tuple(layers), dtype=layout.dtype, page_size=layout.page_size)


def check(model: PreTrainedModel) -> None:
    check_parity(PackedStrategy(model))


def check_with(model: PreTrainedModel, **changes: Any) -> None:
    strategy = Mistaken(model)
    strategy.changes = changes
    check_parity(strategy)


@pytest.mark.parametrize("family", PACKED)
def test_supported_families_pass(family: str) -> None:
    check(tiny(family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_rounding_in_half_precision_passes(family: str) -> None:
    select_strategy(tiny(family, torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "mask_kind"),
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
def test_one_layer_with_a_wrong_mask_kind_is_refused(family: str, mask_kind: MaskKind) -> None:
    model = tiny(family)
    check_with(model, mask_kind=PackedStrategy(model).kv_layout().layers[1].mask_kind)
    with pytest.raises(UnsupportedModel, match="other logits over pages than in its own forward"):
        check_with(model, mask_kind=mask_kind)


def test_model_with_hidden_state_is_refused() -> None:
    """The model mixes in its last output, as a convolution or recurrence with a cache of its own does."""
    model = tiny("llama")
    last: list[torch.Tensor] = []

    def remember(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        previous = last.pop() if last else torch.zeros_like(output[:, -1:])
        last.append(output[:, -1:].clone())
        return output + torch.cat([previous, output[:, :-1]], 1)

    model.model.layers[1].mlp.register_forward_hook(remember)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*'llama'.*relative distance"):
        check(model)


def test_model_that_mixes_neighbouring_tokens_outside_attention_is_refused() -> None:
    """The state of a causal convolution is not in pages, so packed prefills and decodes lose it."""
    model = tiny("llama")

    def shift(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    model.model.layers[2].mlp.register_forward_hook(shift)
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_strategy_that_swaps_the_pages_of_sequences_is_refused() -> None:
    class Swapped(PackedStrategy):
        def runner(self, pool: PagePool) -> Any:
            own = super().runner(pool)

            class Changed(Runner):
                def forward(self, batch: ForwardBatch) -> torch.Tensor:
                    tables = batch.page_tables[:, ::-1].copy() if batch.prefix_lens.all() else batch.page_tables
                    return own.forward(replace(batch, page_tables=tables))

            return Changed()

    with pytest.raises(UnsupportedModel, match="other logits"):
        check_parity(Swapped(tiny("llama")))


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("mistake", ["swapped", "lost"])
def test_strategy_that_loses_or_swaps_states_is_refused(family: str, mistake: str) -> None:
    class Careless(RecurrentStrategy):
        def runner(self, pool: PagePool) -> Any:
            own = super().runner(pool)

            class Changed(Runner):
                def forward(self, batch: ForwardBatch) -> torch.Tensor:
                    decodes = batch.prefix_lens.all()
                    old_states = [tensor.clone() for tensor in pool.states.slab(0).tensors]
                    mixed = decodes and mistake == "swapped"
                    logits = own.forward(replace(batch, states=batch.states[::-1].copy()) if mixed else batch)
                    if decodes and mistake == "lost":
                        for tensor, old in zip(pool.states.slab(0).tensors, old_states, strict=True):
                            tensor.copy_(old)
                    return logits

            return Changed()

    check_parity(RecurrentStrategy(tiny(family)))
    with pytest.raises(UnsupportedModel, match="other logits"):
        check_parity(Careless(tiny(family)))


def test_model_that_computes_differently_when_borrowed_is_refused() -> None:
    model = tiny("llama")

    def scale(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return 1.1 * output if model.config._attn_implementation == NAME else output

    model.model.layers[0].self_attn.v_proj.register_forward_hook(scale)
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_model_with_non_finite_logits_is_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 5] = torch.nan
    with pytest.raises(UnsupportedModel, match="other logits"):
        check(model)


def test_check_leaves_the_model_unchanged() -> None:
    model = tiny("llama").train()
    state, implementation = torch.get_rng_state(), model.config._attn_implementation
    check(model)
    with pytest.raises(UnsupportedModel):
        check_with(model, mask_kind=MaskKind("window", 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
