"""TRL's ``rollout_func``: one completion for each prompt that TRL passes, as it passes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from rollout import Engine
from rollout.errors import InputError
from rollout.integrations.trl import RolloutGRPOTrainer, rollout_func
from tests.support import trl_world


def _trainer(folder: Path, function: Any, **changes: Any) -> Any:
    args = trl_world.grpo_args(folder, temperature=0.7, learning_rate=1e-2, off_policy_mask_threshold=0.5)
    return trl_world.trainer(GRPOTrainer, args, rollout_func=function, **changes)


def test_it_trains_at_parity_as_the_mixin_does(tmp_path: Path) -> None:
    results: list[Any] = []
    distances: list[float] = []
    function = rollout_func(max_rows=3)

    def observed(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        done = function(prompts, trainer)
        results.append((prompts, done))
        ids = (done["prompt_ids"], done["completion_ids"], done["logprobs"])
        distances.append(trl_world.worst_distance(trainer, *ids))
        return done

    given: list[Any] = []

    def reward(completions: list[str], finish_reason: list[str], **kwargs: Any) -> list[float]:
        given.append(finish_reason)
        return trl_world.distinct_words(completions)

    _trainer(tmp_path, observed, reward_funcs=reward).train()
    assert max(distances) < 1e-5
    for prompts, done in results:
        assert len(prompts) == len(done["completion_ids"]) == 8
        assert len(set(prompts)) == 2
        assert all(done["completion_ids"])
        assert done["sampler_logprobs"] == done["logprobs"]
        assert "env_mask" not in done
    assert given == [done["finish_reason"] for _, done in results]

    args = trl_world.grpo_args(tmp_path, temperature=0.7, learning_rate=1e-2, off_policy_mask_threshold=0.5)
    mixin = trl_world.trainer(RolloutGRPOTrainer, args)
    calls = trl_world.Calls(mixin)
    mixin.train()
    assert calls.ids == [done["completion_ids"] for _, done in results]


def test_a_row_that_cannot_be_completed_is_masked(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, rollout_func(), model=trl_world.model(max_position_embeddings=32))
    done = trainer.rollout_func(["w15 " * 40, "w7 w8"], trainer)
    assert done["completion_ids"][0] == [trl_world.EOS]
    assert done["env_mask"] == [[0], [1] * len(done["completion_ids"][1])]
    assert done["finish_reason"][0] == "error"


def test_an_engine_of_ones_own_must_be_on_the_trainers_model(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, rollout_func())
    own = Engine(trainer.model, trainer.processing_class)
    assert (
        rollout_func(own)(["w7 w8"], trainer)["completion_ids"] == rollout_func()(["w7 w8"], trainer)["completion_ids"]
    )
    with pytest.raises(InputError, match="another model than the trainer's"):
        rollout_func(Engine(trl_world.model(), None))(["w7 w8"], trainer)
    with pytest.raises(InputError, match="max_rows is given beside an engine"):
        rollout_func(own, max_rows=3)
    assert torch.is_grad_enabled()
