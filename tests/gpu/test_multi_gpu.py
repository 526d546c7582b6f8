"""A model on two GPUs, with layers spread or sliced, gives the records of a model on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.models.loading.load import ModelSource, load_model
from tests.support.devices import DEVICE
from tests.support.parity import random_prompts
from tests.support.tensor_parallel import assert_records_match_one_process
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")


def test_records_of_layers_spread_over_two_gpus(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=8)
    model.save_pretrained(tmp_path)
    prompts, params = random_prompts(5, 12), SamplingParams(n=3, max_new_tokens=24)
    expected = Engine(model, None).generate(prompts, params)
    model_on_two = load_model(ModelSource(str(tmp_path), dtype="float32", device_map="auto"), DEVICE)
    engine = Engine(model_on_two, None)
    layout = engine._module.strategy.kv_layout()
    assert len({site.device for site in layout.layers}) == 2
    for each in (engine, Engine(model_on_two, None, policy="static", max_kv_bytes=12 * layout.bytes_per_page)):
        for ours, theirs in zip(each.generate(prompts, params), expected, strict=True):
            assert ours.completion_ids == theirs.completion_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_records_of_layers_sliced_over_two_gpus(tmp_path: Path) -> None:
    assert_records_match_one_process({"llama": tiny("llama", vocab_size=200)}, tmp_path)
