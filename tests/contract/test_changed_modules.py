"""Promise 2 on modules that something has changed: PEFT adapters of every type, hooks, parametrizations, patches.

Each is served with the numbers of its own forward, on the fastest path that it leaves, or refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from tests.support.parity import greedy, teacher_forced
from tests.support.tiny_models import tiny

PROMPTS = [[5], [7, 8, 9, 20], list(range(3, 90))]
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SQUARE = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}

#: A configuration of every type of PEFT that changes what a token's forward computes.
TUNERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, **LINEAR),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, **LINEAR),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "lora with bias": lambda: peft.LoraConfig(r=4, lora_bias=True, **LINEAR),
    "lora on embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "lora on parameters": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]
    ),
    "lora on repeated layers": lambda: peft.LoraConfig(r=4, layer_replication=[[0, 2], [0, 2]], **LINEAR),
    "saved modules": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "mlp", "norm", "input_layernorm"]
    ),
    "tokens with lora": lambda: peft.LoraConfig(r=4, trainable_token_indices={"embed_tokens": [5, 9]}, **LINEAR),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 9], target_modules=["embed_tokens"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, **LINEAR),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
    "beft": lambda: peft.BeftConfig(task_type="CAUSAL_LM"),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **LINEAR),
    "c3a": lambda: peft.C3AConfig(block_size=16, **SQUARE),
    "delora": lambda: peft.DeloraConfig(r=4, **LINEAR),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **LINEAR),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **SQUARE),
    "hra": lambda: peft.HRAConfig(r=4, **LINEAR),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "miss": lambda: peft.MissConfig(r=4, **LINEAR),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR),
    "osf": lambda: peft.OSFConfig(**LINEAR),
    "randlora": lambda: peft.RandLoraConfig(r=4, **LINEAR),
    "road": lambda: peft.RoadConfig(group_size=16, **SQUARE),
    "shira": lambda: peft.ShiraConfig(r=4, **LINEAR),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=32, topk=2, **SQUARE),
    "vera": lambda: peft.VeraConfig(r=4, **SQUARE),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, **LINEAR),
}

#: Types that need more than the tokens before a token, each with a word of the reason.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "before every prompt"),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
        "before every prompt",
    ),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "before every prompt"),
    "activated lora": (lambda: peft.LoraConfig(r=4, alora_invocation_tokens=[7, 8], **LINEAR), "its invocation"),
    "poly": (lambda: peft.PolyConfig(r=4, n_tasks=2, n_skills=2, n_splits=2, **LINEAR), "the id of a task"),
}


def adapted(config: Any, seed: int = 7) -> Any:
    """Return a tiny model with an adapter whose numbers are large enough to change its tokens."""
    return train(peft.get_peft_model(tiny("llama", num_hidden_layers=2), config), seed)


def train(model: Any, seed: int = 7) -> Any:
    """Change every trainable number of a model."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model.eval()


def check(model: Any, engine: Engine | None = None) -> list[list[int]]:
    """Compare the engine's tokens and log-probabilities with the module's own; return the tokens."""
    engine = engine or Engine(model, None)
    batch = engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=0))
    for record in batch:
        assert record.error == ""
        assert record.completion_ids == greedy(model, record.prompt_ids, 8)
        torch.testing.assert_close(torch.tensor(record.logprobs), teacher_forced(model, record), atol=1e-5, rtol=1e-5)
    return [record.completion_ids for record in batch]


@pytest.fixture(scope="module")
def unchanged() -> list[list[int]]:
    """The tokens of the model without an adapter."""
    return check(tiny("llama", num_hidden_layers=2))


@pytest.mark.parametrize("tuner", TUNERS)
def test_adapters_of_this_type_are_served_with_their_own_numbers(tuner: str) -> None:
    model = adapted(TUNERS[tuner]())
    ids = torch.tensor([[5, 9, 20]])
    with torch.no_grad():
        changed = (model(input_ids=ids).logits - tiny("llama", num_hidden_layers=2)(input_ids=ids).logits).abs().max()
    assert changed > 1e-4  # far above the tolerance of `check`
    check(model)


@pytest.mark.parametrize("tuner", REFUSED)
def test_adapters_that_need_more_than_the_tokens_before_are_refused(tuner: str, unchanged: list[list[int]]) -> None:
    make, reason = REFUSED[tuner]
    model = adapted(make())
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        Engine(model, None)
    assert str(caught.value).count(".") == str(caught.value).count("disable_adapter()") + 1
    with model.disable_adapter():
        batch = Engine(model, None).generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=0))
    assert [record.completion_ids for record in batch] == unchanged


def test_an_adapter_that_is_refused_may_not_become_active_between_calls() -> None:
    model = adapted(TUNERS["lora"]())
    engine = Engine(model, None)
    model.add_adapter("invoked", REFUSED["activated lora"][0]())
    check(model, engine)
    model.set_adapter("invoked")
    with pytest.raises(UnsupportedModel, match="'invoked'"):
        engine.generate(PROMPTS)


def test_every_state_of_adapters_between_calls_is_followed(unchanged: list[list[int]]) -> None:
    model = adapted(TUNERS["lora"]())
    engine = Engine(model, None)
    seen = [check(model, engine)]
    model.add_adapter("other", TUNERS["dora"]())
    model.set_adapter("other")
    train(model, 8)
    seen.append(check(model, engine))
    model.base_model.set_adapter(["default", "other"])
    seen.append(check(model, engine))
    model.set_adapter("default")
    assert check(model, engine) == seen[0]
    with model.disable_adapter():
        assert check(model, engine) == unchanged
    model.merge_adapter()
    assert check(model, engine) == seen[0]
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert check(model, engine) == seen[1]
    assert len({str(tokens) for tokens in (*seen, unchanged)}) == 4


def test_mixed_types_of_adapters_are_served(unchanged: list[list[int]]) -> None:
    model: Any = peft.get_peft_model(tiny("llama", num_hidden_layers=2), TUNERS["lora"](), mixed=True)
    model.add_adapter("other", TUNERS["loha"]())
    model.set_adapter(["default", "other"])
    assert check(train(model)) != unchanged


def test_experts_that_are_weighed_by_a_second_forward_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        adapted(TUNERS["lora"]()).save_pretrained(tmp_path / name)
    base = tiny("llama", num_hidden_layers=2, use_cache=False)
    experts = {name: str(tmp_path / name) for name in ("a", "b")}
    model = peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=experts))
    with pytest.raises(UnsupportedModel, match="is of type XLORA"):
        Engine(model, None)


def test_adapters_of_transformers_itself_are_served(unchanged: list[list[int]]) -> None:
    model: Any = tiny("llama", num_hidden_layers=2)
    engine = Engine(model, None)
    model.add_adapter(TUNERS["lora"]())
    train(model)
    assert check(model, engine) != unchanged
    model.disable_adapters()
    assert check(model, engine) == unchanged


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


class _Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.3


def _parametrize(model: Any) -> None:
    parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", _Doubled())
    parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", _Doubled())
    parametrize.register_parametrization(model.model.norm, "weight", _Doubled())


def _parametrize_only_in_calls(model: Any) -> None:
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_pre_hook(
        lambda *_: parametrize.register_parametrization(layer, "weight", _Doubled()) and None
    )
    layer.register_forward_hook(
        lambda *_: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False) and None
    )


def _norm_weights(model: Any) -> None:
    weight_norm(model.model.layers[0].self_attn.k_proj).weight_g.data.mul_(3)
    parametrizations.weight_norm(model.model.layers[1].mlp.down_proj).parametrizations.weight.original0.data.mul_(3)
    spectral_norm(model.model.layers[0].mlp.up_proj)


def _hook(model: Any) -> None:
    layer = model.model.layers[0]
    layer.mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 0.5,))
    layer.self_attn.register_forward_hook(lambda _module, _inputs, output: (output[0] * 2, *output[1:]))
    layer.input_layernorm.register_forward_hook(lambda _module, _inputs, output: output + 0.1)
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output + 0.1)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.roll(3, -1))


def _replace_forwards(model: Any) -> None:
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.mlp.gate_proj, layer.self_attn.v_proj, layer.post_attention_layernorm):
        module.forward = lambda x, own=module.forward: own(x) + 0.2


def _subclass(model: Any) -> None:
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.gate_proj, model.lm_head):
        layer.__class__ = _Shifted


def _replace_modules(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Linear(64, 64))
    model.model.layers[1].mlp.act_fn = nn.Tanh()


def _tie(model: Any) -> None:
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


CHANGES = (
    *(_parametrize, _parametrize_only_in_calls, _norm_weights, _hook, _replace_forwards, _subclass),
    *(_replace_modules, _tie),
)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.strip("_") for change in CHANGES])
def test_what_others_changed_in_a_module_is_computed(change: Callable[[Any], None], unchanged: list[list[int]]) -> None:
    model: Any = tiny("llama", num_hidden_layers=2)
    engine = Engine(model, None)
    assert check(model, engine) == unchanged
    torch.manual_seed(0)
    change(model)
    assert check(model, engine) != unchanged
    assert check(model) != unchanged


def test_hooks_of_all_modules_are_called(unchanged: list[list[int]]) -> None:
    model = tiny("llama", num_hidden_layers=2)

    def shift(module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output + 0.2 if isinstance(module, nn.Linear) else None

    with nn.modules.module.register_module_forward_hook(shift):
        assert check(model) != unchanged


def test_a_forward_replaced_for_all_linear_layers_is_called(
    monkeypatch: pytest.MonkeyPatch, unchanged: list[list[int]]
) -> None:
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: own(layer, x) + 0.2)
    assert check(tiny("llama", num_hidden_layers=2)) != unchanged


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


def _through_data(model: Any) -> None:
    for module in (model.model.layers[0].mlp.up_proj, model.model.norm):
        module.weight.data.mul_(2)


def _with_new_parameters(model: Any) -> None:
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def _with_a_state_dict(model: Any) -> None:
    model.load_state_dict({name: tensor * 1.2 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("change", [_in_place, _through_data, _with_new_parameters, _with_a_state_dict])
def test_weights_changed_between_calls_are_used(change: Callable[[Any], None], unchanged: list[list[int]]) -> None:
    model = tiny("llama", num_hidden_layers=2)
    engine = Engine(model, None)
    assert check(model, engine) == unchanged
    change(model)
    assert check(model, engine) != unchanged
