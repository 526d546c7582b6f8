"""What cannot be served is refused in one sentence that says what to do, when the engine is made or a call begins."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from rollout import Engine, SamplingParams
from rollout.errors import InputError
from rollout.models.errors import UnsupportedModel
from tests.support.parity import greedy
from tests.support.tiny_models import tiny, tiny_config

_PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize(
    ("model", "tokenizer", "sentence"),
    [
        (lambda: None, lambda: None, "model is of type NoneType, but must be a loaded transformers causal LM"),
        (lambda: "gpt2", lambda: None, r"model is the name 'gpt2', .* AutoModelForCausalLM.from_pretrained\('gpt2'\)"),
        (lambda: tiny("llama"), lambda: "gpt2", r"tokenizer is the name 'gpt2', .*AutoTokenizer"),
        (lambda: tiny("llama"), lambda: 5, "tokenizer is of type int, but must be a transformers tokenizer, or None"),
        (_tokenizer, lambda: tiny("llama"), "model and tokenizer are swapped"),
        (_tokenizer, lambda: None, "model and tokenizer are swapped"),
    ],
)
def test_argument_of_another_kind_is_named(model: Any, tokenizer: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        Engine(model(), tokenizer())
    assert str(error.value).endswith(".")


def _on_meta() -> nn.Module:
    return nn.Module.to(tiny("llama"), "meta")


def _empty() -> nn.Module:
    model = tiny("llama")
    model.model.norm.weight.data = torch.empty(0)
    return model


def _zero3() -> nn.Module:
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.ds_id = 1  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
        (lambda: AutoModel.from_config(tiny_config("llama")), "no language-modelling head.* AutoModelForCausalLM"),
        (lambda: AutoModelForSequenceClassification.from_config(tiny_config("llama")), "no language-modelling head"),
        (
            lambda: T5(T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
            "is an encoder-decoder",
        ),
        (_on_meta, r"Weight model.embed_tokens.weight is on the meta device .* load"),
        (_empty, r"Weight model.norm.weight is empty: gather or load"),
        (_zero3, "DeepSpeed ZeRO-3 has sharded it: .*unwrap_model_for_generation"),
    ],
)
def test_module_that_cannot_be_served_is_refused_at_start(make: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence) as error:
        Engine(make(), None)
    assert str(error.value).endswith(".")
    assert str(error.value).count(". ") == 0


def test_weights_that_are_taken_away_later_are_named_when_a_call_begins() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    model.model.norm.weight.data = torch.empty(0)
    with pytest.raises(UnsupportedModel, match=r"Weight model.norm.weight is empty"):
        engine.generate([[5, 6]], _PARAMS)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_module_that_accelerate_offloads_is_served(family: str) -> None:
    wanted = [greedy(tiny(family), [5, 6, 7], 6)]
    model = accelerate.cpu_offload(tiny(family), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert [r.completion_ids for r in Engine(model, None).generate([[5, 6, 7]], _PARAMS)] == wanted
    assert all(parameter.is_meta for parameter in model.parameters())


class _Int8Linear(nn.Linear):
    """Holds its weight in int8, as bitsandbytes does, and computes in the input's dtype."""

    @classmethod
    def of(cls, layer: nn.Linear) -> _Int8Linear:
        quantised = cls(layer.in_features, layer.out_features, bias=False)
        quantised.scale = layer.weight.detach().abs().amax(1) / 127
        whole = (layer.weight.detach() / quantised.scale[:, None]).round().to(torch.int8)
        quantised.weight = nn.Parameter(whole, requires_grad=False)
        return quantised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype))


def test_module_with_quantised_layers_runs_their_own_forward() -> None:
    """Their weights cannot be packed."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = _Int8Linear.of(layer.mlp.down_proj)
        layer.self_attn.q_proj = _Int8Linear.of(layer.self_attn.q_proj)
    engine = Engine(model, None)
    assert [r.completion_ids for r in engine.generate([[5, 6, 7]], _PARAMS)] == [greedy(model, [5, 6, 7], 6)]


def test_module_with_layers_quantised_by_the_batch_is_refused() -> None:
    """Their scale is that of all rows together, so results would depend on the batch."""
    model = torch.ao.quantization.quantize_dynamic(tiny("llama").model, {nn.Linear}, dtype=torch.qint8)
    whole = tiny("llama")
    whole.model = model
    with pytest.raises(UnsupportedModel, match="gives other logits"):
        Engine(whole, None)


def test_module_inside_data_parallel_is_served_from_inside() -> None:
    model = tiny("llama")
    wanted = [greedy(model, [5, 6, 7], 6)]
    wrapped = nn.DataParallel(model)
    assert [r.completion_ids for r in Engine(wrapped, None).generate([[5, 6, 7]], _PARAMS)] == wanted
