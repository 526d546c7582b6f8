"""Models whose layers lie on several devices: the numbers of one device, and memory where it belongs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rollout import Engine, SamplingParams
from rollout.engine.kv_memory import KVMemory
from rollout.engine.loop import Loop
from rollout.headroom.fake import FakeHeadroom
from rollout.headroom.headroom import MultiDeviceHeadroom, after_reserve, headroom_over
from rollout.models.errors import UnsupportedModel
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.loading.adapter import require_adapter, with_adapter
from rollout.models.loading.load import ModelSource, load_model
from rollout.models.module.inspect import output_device
from tests.support.fake_devices import FAR, NEAR, Devices, spread
from tests.support.tiny_models import shallow, tiny

PROMPTS = [list(range(3, 3 + length)) for length in (5, 20, 33)]
SAMPLED = SamplingParams(n=3, max_new_tokens=20)
CPU = torch.device("cpu")
#: A token has 8 bytes on the first device and 24 on the second.
LAYOUT = KVLayout(
    (
        AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind(), NEAR),
        AttentionLayer(nn.Identity(), 2, 1, 1, MaskKind(), FAR),
        AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind(), FAR),
    ),
    torch.float32,
    page_size=4,
)


# -- numbers ---------------------------------------------------------------------------------------------


# Through the interface, with tied embeddings (computed on the first device again), and gathering.
@pytest.mark.parametrize(
    ("family", "last", "late"), [("llama", FAR, True), ("gemma2", NEAR, False), ("falcon", NEAR, True)]
)
def test_two_devices_give_the_records_of_one_device(
    family: str, last: torch.device, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=late))
    whole = Engine(shallow(family), None, max_kv_bytes=10_000_000)
    expected, page_bytes = list(whole.generate(PROMPTS, SAMPLED)), whole._module.strategy.kv_layout().bytes_per_page
    model = shallow(family)
    with Devices():
        spread(model)
        assert output_device(model) == last
        # Small enough for rows to be preempted and slabs to come and go.
        engine = Engine(model, None, policy="static", max_kv_bytes=8 * page_bytes, headroom=FakeHeadroom(1_000_000))
        assert {layer.device for layer in engine._module.strategy.kv_layout().layers} == {NEAR, FAR}
        batch = engine.generate(PROMPTS, SAMPLED)
    assert [record.completion_ids for record in batch] == [record.completion_ids for record in expected]
    for ours, theirs in zip(batch, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert batch.stats.preempted_rows > 0


def test_recurrent_states_are_refused_on_two_devices() -> None:
    model = tiny("falcon_h1")
    with Devices(), pytest.raises(UnsupportedModel, match="lies on several devices: place it on one"):
        Engine(spread(model), None, headroom=FakeHeadroom(1_000_000))


def test_layers_offloaded_to_disk_give_the_same_records(tmp_path: Path) -> None:
    """A trainer's own business; here it is a model whose first weight lies nowhere."""
    tiny("llama").save_pretrained(tmp_path)
    names = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb")
    places = dict(zip((*names, "lm_head"), ["disk", "cpu", "disk", "cpu", "disk", "cpu", "cpu", "disk"], strict=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    assert model.device.type == "meta"
    batch = Engine(model, None, max_kv_bytes=10_000_000).generate(PROMPTS, SAMPLED)
    expected = Engine(tiny("llama"), None, max_kv_bytes=10_000_000).generate(PROMPTS, SAMPLED)
    assert [record.completion_ids for record in batch] == [record.completion_ids for record in expected]


# -- memory ----------------------------------------------------------------------------------------------


def test_layers_lie_on_their_devices_and_share_page_ids() -> None:
    with Devices():
        pool = PagePool(LAYOUT, 2, NEAR)
        assert pool.layer_locations == ((0, 0), (1, 0), (1, 1))
        assert [part.device for part in pool.device_pools] == [NEAR, FAR]
        pool.grow()
        pool.grow()
        slab = pool.slab(1)
        assert [tensor.device for tensor in (*slab.keys, *slab.values)] == 2 * [NEAR, FAR, FAR]
        assert sum(tensor.numel() for tensor in slab.tensors) * 4 == pool.slab_bytes
        pages = pool.allocate(3)
        pool.release(pages[:1])
        for number, tensor in enumerate(pool.slab(0).tensors):
            tensor[1] = number + 1.0
        table = pages[1:].copy()
        assert pool.shrink([table])
        assert table.tolist() == [3, 2], "the first slab's page has moved to the second"
        pool.check_integrity([table])
        kept = pool.slab(1)
        assert [float(tensor[1].flatten()[0]) for tensor in kept.tensors] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        for number, part in enumerate(pool.device_pools):
            assert part.slabs == [None, kept.device_slabs[number]], "a dropped slab must not live on in a part"
            assert (part.live_slabs, part.slab_changes) == (1, 3)
        assert pool.device_pools[1].slab(1).keys[1] is kept.keys[2]


def test_pool_on_one_device_is_its_only_device_pool() -> None:
    pool = PagePool(
        KVLayout(
            (AttentionLayer(None, 1, 1, 1, MaskKind(), CPU), AttentionLayer(None, 1, 1, 1, MaskKind())),
            torch.float32,
            4,
        ),
        2,
        CPU,
    )
    assert pool.device_pools == (pool,)
    assert pool.layer_locations == ((0, 0), (0, 1))


def test_all_layers_on_another_device_than_the_pool() -> None:
    with Devices():
        layout = KVLayout((AttentionLayer(None, 1, 1, 1, MaskKind(), FAR),), torch.float32, 4)
        pool = PagePool(layout, 2, NEAR)
        pool.grow()
        assert [part.device for part in pool.device_pools] == [FAR]
        assert pool.slab(0).keys[0].device == FAR


@pytest.mark.parametrize(("near", "far", "most"), [(1000, 10**6, 3600), (10**6, 1000, 1200), (1000, 3000, 3600)])
def test_device_with_least_headroom_limits_the_pool(near: int, far: int, most: int) -> None:
    """A tenth of each device is reserved; a quarter of the pool's bytes is on the first."""
    shares = LAYOUT.shares(NEAR)
    assert shares == {NEAR: 0.25, FAR: 0.75}
    fakes = {NEAR: FakeHeadroom(near), FAR: FakeHeadroom(far)}
    headroom = MultiDeviceHeadroom([(fakes[device], share) for device, share in shares.items()], 0.1)
    assert after_reserve(headroom, 0.1) == most
    with Devices():
        memory = KVMemory(LAYOUT, headroom, NEAR, None, 0.1, 10**9)
    assert memory.obtainable_bytes == most // memory.pool.slab_bytes * memory.pool.slab_bytes
    fakes[FAR].taken_bytes = far
    memory.read_headroom()
    assert memory.headroom_bytes == int(-0.1 * far / 0.75), "what is to be given back is counted in the pool's bytes"


def test_headroom_of_one_device_is_not_wrapped() -> None:
    assert type(headroom_over({CPU: 1.0}, 0.1)).__name__ == "HostHeadroom"


# -- loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two CUDA devices of numbers; what is asked of transformers ends up in the dict, and is not done."""
    asked: dict[str, Any] = {}
    own = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, device_map: Any, max_memory: Any, **kwargs: Any) -> Any:
        asked.update(device_map=device_map, max_memory=max_memory)
        model, info = own(*args, **kwargs)
        model.hf_device_map = {"": "disk" if asked.get("short") else 0}
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 + index, 200))
    return asked


AUTO = torch.device("cuda", 0)


def test_layers_are_spread_over_all_devices(saved: Path, two_gpus: dict[str, Any]) -> None:
    model = load_model(ModelSource(str(saved), device_map="auto"), AUTO)
    assert isinstance(model, LlamaForCausalLM)
    # Nothing is left to the host's memory, which each forward would copy from.
    assert two_gpus == {"device_map": "auto", "max_memory": {0: 100, 1: 101}}


def test_ranks_divide_the_devices(saved: Path, two_gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        load_model(ModelSource(str(saved), device_map="auto"), AUTO)
        assert two_gpus["max_memory"] == {rank: 100 + rank}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="2 CUDA devices among 3 processes: start at most one process per device"):
        load_model(ModelSource(str(saved), device_map="auto"), AUTO)


def test_model_larger_than_free_gpu_memory_is_refused(saved: Path, two_gpus: dict[str, Any]) -> None:
    two_gpus["short"] = True
    with pytest.raises(ValueError, match=r"than is free on the CUDA devices of a process \(0, 1\):"):
        load_model(ModelSource(str(saved), device_map="auto"), AUTO)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [({"device_map": "auto"}, "leave device_map unset"), ({"tensor_parallel": True}, "turn tensor_parallel off")],
)
def test_gguf_on_several_devices_is_refused(key: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"unpacked on one device: {remedy}"):
        load_model(ModelSource(str(tmp_path / "model.gguf"), **key), AUTO)


def test_device_map_without_gpus_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"no CUDA device here to spread a model over: leave device_map unset"):
        load_model(ModelSource(str(saved), device_map="auto"), CPU)


@pytest.mark.usefixtures("two_gpus")
def test_recurrent_states_are_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedModel, match=r"keeps recurrent states and must lie on one device"):
        load_model(ModelSource(str(tmp_path), device_map="auto"), AUTO)


def test_adapter_is_merged_on_the_devices_of_its_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny("llama"), settings).save_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    config = require_adapter(tmp_path)
    expected = with_adapter(tiny("llama"), tmp_path, config, CPU, None)(ids).logits
    with Devices():
        merged = with_adapter(spread(tiny("llama")), tmp_path, config, CPU, None)
        assert {weight.device for weight in merged.parameters()} == {NEAR, FAR}
        logits = merged(ids.to(FAR)).logits.cpu()
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, tiny("llama")(ids).logits)
