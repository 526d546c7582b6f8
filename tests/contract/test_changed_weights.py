"""Weights that change between two records of a stream, or between two calls, are those that the next token is of.

Each token is compared with a plain forward of a copy of the module as it was when the token was drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rollout import Engine, SamplingParams
from rollout.engine.patches import Patches
from rollout.records import Record
from tests.support.devices import DEVICE
from tests.support.parity import random_prompts, teacher_forced
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)
#: Records end one after the other, so that rows of every length are live when the weights change.
_LIMITS = (3, 11, 20, 36)
_TOLERANCE = 1e-5

Way = Callable[[Any], object]


def _gradients(model: nn.Module) -> list[nn.Parameter]:
    """Give each trained parameter a gradient of its own and return them."""
    generator = torch.Generator().manual_seed(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter) * 1e-2
    return trained


def _step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Way:
    def way(model: nn.Module) -> None:
        optimizer(_gradients(model), **options).step()

    return way


def _each(change: Callable[[nn.Parameter], object]) -> Way:
    @torch.no_grad()
    def way(model: nn.Module) -> None:
        for parameter in model.parameters():
            change(parameter)

    return way


def _assign_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.2


def _new_parameter(model: Any) -> None:
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.detach() * -1)


def _loaded(*, assign: bool) -> Way:
    def way(model: nn.Module) -> None:
        model.load_state_dict({name: value * 1.2 for name, value in model.state_dict().items()}, assign=assign)

    return way


def _one(path: str) -> Way:
    @torch.no_grad()
    def way(model: nn.Module) -> None:
        value = model.get_parameter(path) if path in dict(model.named_parameters()) else model.get_buffer(path)
        value.mul_(1.5).add_(0.1)

    return way


def _swap_with_average(model: nn.Module) -> None:
    weights = [p.data for p in model.parameters()]
    torch._foreach_lerp_(weights, [weight.flip(0) for weight in weights], 0.3)


_grow = _each(lambda parameter: parameter.mul_(1.2))


def _untie(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.3)


def _replace_module(model: Any) -> None:
    torch.manual_seed(3)
    model.model.layers[0].mlp = type(model.model.layers[0].mlp)(model.config).to(DEVICE)
    _one("model.layers.0.mlp.up_proj.weight")(model)


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def _adapters(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "scaling"))


def _scale(model: Any) -> None:
    for module in _adapters(model):
        if isinstance(module.scaling, dict):
            module.scaling.update({name: 3 * value for name, value in module.scaling.items()})


@torch.no_grad()
def _adapter_in_place(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.mul_(-1)


WAYS: dict[str, Way] = {
    "sgd": _step(torch.optim.SGD, lr=1.0),
    "adamw, a loop": _step(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw, foreach": _step(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw, fused": _step(torch.optim.AdamW, lr=1e-2, fused=True),
    "copy_ into data": _each(lambda p: p.data.copy_(p.data * 1.2)),
    "another data": _each(_assign_data),
    "another parameter": _new_parameter,
    "state dict copied": _loaded(assign=False),
    "state dict assigned": _loaded(assign=True),
    "moving average": _swap_with_average,
    "a norm alone": _one("model.layers.2.input_layernorm.weight"),
    "a bias alone": _one("model.layers.1.self_attn.k_proj.bias"),
    "embeddings alone": _one("model.embed_tokens.weight"),
    "a buffer alone": _one("model.rotary_emb.inv_freq"),
    "module replaced": _replace_module,
    "hook added": _hook,
}
ADAPTED: dict[str, Way] = {
    "merged": lambda model: model.merge_adapter(),
    "another adapter": lambda model: model.set_adapter("other"),
    "adapter stepped": _step(torch.optim.AdamW, lr=1e-2, fused=True),
    "adapter in place": _adapter_in_place,
    "scaling": _scale,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


def _adapted() -> Any:
    model = get_peft_model(tiny("qwen2"), _lora("q_proj", "v_proj", "down_proj"))
    model.add_adapter("other", _lora("q_proj", "up_proj"))
    return model


def _lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)


def _stream(engine: Engine, changes: dict[int, Callable[[], object]]) -> list[Record]:
    """Stream records of rows of all lengths; make each change after so many records."""
    prompts = random_prompts(11, len(_LIMITS))
    params = [SamplingParams(n=2, ignore_eos=True, max_new_tokens=limit) for limit in _LIMITS]
    records: list[Record] = []
    for record in engine.stream(prompts, params):
        records.append(record)
        if len(records) in changes:
            changes[len(records)]()
    return records


def _distances(versions: list[Any], records: list[Record]) -> torch.Tensor:
    """[versions]: largest distance of the tokens of each version to that version's own forward."""
    worst = torch.zeros(len(versions))
    for record in records:
        found, stamped = torch.tensor(record.logprobs), torch.tensor(record.weight_versions)
        for version in set(record.weight_versions):
            model = versions[version]
            distance = (found - teacher_forced(model, record)).abs()[stamped == version]
            worst[version] = max(float(worst[version]), float(distance.max()))
    return worst


def _copied(model: Any) -> Any:
    return copy.deepcopy(model).eval()


def _check(model: Any, way: Way, tolerance: float = _TOLERANCE) -> None:
    """Change the weights in the middle of a stream, and again between two calls."""
    engine = Engine(model, None)
    versions: list[Any] = [_copied(model)]

    def change() -> None:
        way(model)
        versions.append(_copied(model))

    records = _stream(engine, {2: change})
    assert {version for record in records for version in record.weight_versions} == {0, 1}
    assert any(len(set(record.weight_versions)) == 2 for record in records)
    distances = _distances(versions, records)
    assert distances.max() < tolerance, distances
    assert engine.stats is not None
    assert engine.stats.kv_bytes_held == 0
    again = list(engine.generate(random_prompts(12, 3), _PARAMS))
    assert {version for record in again for version in record.weight_versions} == {1}
    assert _distances(versions, again).max() < tolerance


@pytest.mark.parametrize("way", WAYS)
def test_every_token_is_of_the_weights_of_its_version(way: str) -> None:
    torch.manual_seed(0)
    model = tiny("qwen2")
    _check(model, WAYS[way])


@pytest.mark.parametrize("way", ADAPTED)
def test_every_token_is_of_the_adapter_of_its_version(way: str) -> None:
    torch.manual_seed(0)
    _check(_adapted(), ADAPTED[way])


def test_untied_head_is_served() -> None:
    _check(tiny("llama", tie_word_embeddings=True), _untie)


def test_merging_and_unmerging_is_no_other_function() -> None:
    torch.manual_seed(0)
    model = _adapted()
    engine = Engine(model, None)
    records = _stream(engine, {1: model.merge_adapter, 3: model.unmerge_adapter})
    model.eval()
    for record in records:
        assert (torch.tensor(record.logprobs) - teacher_forced(model, record)).abs().max() < _TOLERANCE
    assert {version for record in records for version in record.weight_versions} == {0, 1, 2}


def test_other_dtype_is_served_from_the_next_token_on() -> None:
    model = tiny("llama")
    _check(model, lambda model: model.to(torch.bfloat16), tolerance=0.1)


def test_one_fused_step_at_a_small_rate_is_noticed() -> None:
    """Fused optimizers change neither address nor version of a tensor."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        engine = Engine(model, None)
        before = [(p.data_ptr(), p._version) for p in model.parameters()]
        records = _stream(engine, {2: lambda model=model: _step(torch.optim.AdamW, lr=1e-6, fused=True)(model)})
        assert [(p.data_ptr(), p._version) for p in model.parameters()] == before
        assert engine.weight_version == 1
        assert records[-1].weight_versions[-1] == 1


@pytest.mark.parametrize("name", ["train", "requires_grad", "gradient"])
def test_what_leaves_the_weights_is_no_change(name: str) -> None:
    model = tiny("llama")
    leaves: dict[str, Callable[[], object]] = {
        "train": lambda: model.train().eval(),
        "requires_grad": lambda: model.requires_grad_(False),
        "gradient": lambda: _gradients(model),
    }
    engine = Engine(model, None)
    records = _stream(engine, {1: leaves[name], 4: leaves[name]})
    assert {version for record in records for version in record.weight_versions} == {0}
    assert engine.stats is not None
    assert engine.stats.preempted_rows == 0


@pytest.mark.parametrize("tied", [False, True])
def test_row_that_is_written_in_place_is_noticed(tied: bool) -> None:
    """Of 20,000 rows the samples hold 64 pieces."""
    model = tiny("qwen2", vocab_size=20_000, tie_word_embeddings=tied)

    @torch.no_grad()
    def write(model: Any) -> None:
        model.lm_head.weight[7] += 1.0

    _check(model, write, tolerance=1e-4)


def test_casts_that_the_callers_autocast_holds_are_made_anew() -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")  # its layers are no nn.Linear, so no copies replace them
    engine = Engine(model, None)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        last = _stream(engine, {2: lambda: _each(lambda p: p.mul_(1.2))(model)})[-1]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        distances = (torch.tensor(last.logprobs) - teacher_forced(model, last)).abs()
    assert distances[-10:].max() < 0.1


def test_change_that_a_sample_misses_is_seen_once_it_is_declared() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    versions = [_copied(model)]

    def change() -> None:
        model.model.layers[0].mlp.up_proj.weight.data[37, 5] += 3.0
        engine.weights_changed()
        versions.append(_copied(model))

    records = _stream(engine, {2: change})
    assert _distances(versions, records).max() < _TOLERANCE
    assert engine.weight_version == 1


def test_number_that_the_caller_gives_a_change_is_stamped() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    engine.weight_version = 40

    def change() -> None:
        WAYS["sgd"](model)
        engine.weight_version += 1

    records = _stream(engine, {2: change, 4: change})
    assert {version for record in records for version in record.weight_versions} == {40, 41, 42}


def test_copies_are_freed_and_made_again() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    prompts = random_prompts(4, 3)
    first = engine.generate(prompts, _PARAMS)
    engine.release()
    assert [r.logprobs for r in engine.generate(prompts, _PARAMS)] == [r.logprobs for r in first]


def test_autocast_that_begins_within_a_stream_is_followed() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    with ExitStack() as stack:
        records = _stream(engine, {2: lambda: stack.enter_context(torch.autocast(DEVICE.type, torch.bfloat16))})
        last = records[-1]
        half = teacher_forced(model, last)
    distances = (torch.tensor(last.logprobs) - half).abs()
    assert distances[-10:].max() < 0.1


def _score_within(engine: Engine) -> None:
    engine.score([[5, 6]], [[7]])


def _generate_within(engine: Engine) -> None:
    engine.generate([[5, 6]], SamplingParams(max_new_tokens=2))


def _score_within_autocast(engine: Engine) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        _score_within(engine)


@pytest.mark.parametrize("change", [_grow, None])
@pytest.mark.parametrize("call", [_score_within, _generate_within, _score_within_autocast])
def test_a_call_inside_a_stream_leaves_the_stream_to_notice_the_change(
    call: Callable[[Engine], None], change: Way | None
) -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    versions: list[Any] = [_copied(model)]

    def between() -> None:
        if change is not None:
            change(model)
            versions.append(_copied(model))
        call(engine)

    distances = _distances(versions, records := _stream(engine, {2: between}))
    assert {version for record in records for version in record.weight_versions} == set(range(len(versions)))
    assert distances.max() < _TOLERANCE


def test_a_call_inside_a_stream_leaves_the_stream_its_copies_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(Patches, "keep_within", lambda _self, _free: kept.append(len(within)))
    engine = Engine(tiny("llama"), None)
    within: list[int] = []

    def between() -> None:
        _score_within(engine)
        within.append(1)

    _stream(engine, {2: between})
    assert kept == [1]  # once, when the stream had ended
