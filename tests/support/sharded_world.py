"""Run by two processes that share a module in every way that trainers do; each writes what it found.

Ranks generate different amounts, so a collective inside a call would not return.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from rollout import Engine, SamplingParams
from rollout.engine import live_module
from rollout.models.errors import UnsupportedModel
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny

_STEPS = 3


def ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def prepared(model: Any) -> nn.Module:
    wrapped: nn.Module = Accelerator(cpu=True).prepare(model)
    return wrapped


def fsdp2(model: Any, **options: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model  # type: ignore[no-any-return]


def fsdp1(model: Any) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": ddp,
    "prepared": prepared,
    "fsdp2": fsdp2,
    "fsdp2 bf16": functools.partial(fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "fsdp1": fsdp1,
}


def train_and_generate(model: nn.Module, rank: int) -> dict[str, Any]:
    """Return the distance of each call's log-probabilities from the module's own, the loss of each step, and checks."""
    with patch.object(live_module, "check_parity", wraps=live_module.check_parity) as start_check:
        distances, losses = _steps(model, rank)
    return {"distances": distances, "losses": losses, "start checks": start_check.call_count}


def _steps(model: nn.Module, rank: int) -> tuple[list[float], list[float]]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([[5, 6, 7, 8, 9 + rank]])
    params = SamplingParams(max_new_tokens=8 + 20 * rank)
    engine = Engine(model, None)
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    distances, losses = [], []
    for step in range(_STEPS):
        batch = engine.generate(random_prompts(rank, 3 + 4 * rank), params, seed=step)
        assert [isinstance(parameter, DTensor) for parameter in model.parameters()] == sharded
        distances.append(max(_distance(model, batch[i % len(batch)]) for i in range(3)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return distances, losses


def _distance(model: nn.Module, record: Any) -> float:
    with torch.no_grad():
        ids = torch.tensor([record.prompt_ids + record.completion_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(record.prompt_ids) - 1 : -1].float()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(record.completion_ids)[:, None])[:, 0]
    return float((chosen - torch.tensor(record.logprobs)).abs().max())


def sentence_of_a_step_inside_a_stream() -> str:
    """Return what a stream says after a training step between two of its records."""
    model = fsdp2(tiny("llama", num_hidden_layers=2))
    params = [SamplingParams(max_new_tokens=count) for count in (2, 40)]
    stream = Engine(model, None).stream([[5], [6]], params)
    next(stream)
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    try:
        list(stream)
    except UnsupportedModel as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    own = distributed.get_rank()
    found: dict[str, Any] = {
        name: train_and_generate(share(tiny("llama", num_hidden_layers=2)), own) for name, share in WAYS.items()
    }
    found["stream"] = sentence_of_a_step_inside_a_stream()
    (Path(sys.argv[1]) / f"{own}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
