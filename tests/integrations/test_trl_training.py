"""TRL's own trainers, with this engine generating."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from trl import RLOOTrainer

from rollout.errors import InputError
from rollout.integrations.trl import RolloutGRPOTrainer, with_rollout
from rollout.models.module.changes import Change, ModuleWatch
from tests.support import trl_world
from tests.support.trl_world import Calls


def _trained(folder: Path, *, args: dict[str, Any] | None = None, **given: Any) -> Calls:
    """Train three steps and return what was generated."""
    trainer = trl_world.trainer(RolloutGRPOTrainer, trl_world.grpo_args(folder, **args or {}), **given)
    calls = Calls(trainer)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    return calls


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """What the engine noticed of the module in each call."""
    found: list[Change] = []
    look = ModuleWatch.look

    def observed(watch: ModuleWatch, **given: Any) -> Change:
        found.append(look(watch, **given))
        return found[-1]

    monkeypatch.setattr(ModuleWatch, "look", observed)
    return found


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-2])
def test_logprobs_are_the_trainers_after_every_update(
    tmp_path: Path, changes: list[Change], learning_rate: float
) -> None:
    """The values alone are noticed, though TRL switches checkpointing and its hooks around every generation."""
    optimizer = {"learning_rate": learning_rate, "optim": "adamw_torch_fused", "max_steps": 5}
    calls = _trained(tmp_path, args={"temperature": 0.7, "max_grad_norm": 0.0, **optimizer})
    assert len(calls.distances) == 5
    assert max(calls.distances) < 1e-5
    assert len(set(calls.samples)) == len(calls.samples) == 5 * 8
    assert [bool(change.values) for change in changes] == [False, True, True, True, True]
    assert not any(change.structure or change.settings or change.moved for change in changes)


def test_bf16_training_keeps_its_masters_and_its_numbers(tmp_path: Path) -> None:
    """TRL's default: fp32 weights under autocast, whose own rounding bounds the distance."""
    model = trl_world.model()
    args = {"bf16": True, "optim": "adamw_torch_fused", "learning_rate": 1e-3}
    calls = _trained(tmp_path, args=args, model=model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 1e-5 < max(calls.distances) < 0.2
    assert all(stats.parity.mean < 0.01 for stats in calls.stats)


def test_ids_do_not_depend_on_the_cap(tmp_path: Path) -> None:
    one, three, eight = (
        _trained(tmp_path, engine_options={"max_rows": rows}, args={"max_steps": 2}).ids for rows in (1, 3, 8)
    )
    assert one == three == eight


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_is_as_before_also_after_a_failure(tmp_path: Path, bf16: bool) -> None:
    trainer = trl_world.trainer(RolloutGRPOTrainer, trl_world.grpo_args(tmp_path, bf16=bf16, max_steps=4))
    generate, seen = trainer._rollout.generate, []
    errors = {1: ZeroDivisionError, 2: KeyboardInterrupt}

    def observed(*given: Any) -> Any:
        before = trl_world.state_of(trainer.model)
        assert before["modes"][0]
        assert before["checkpointing"].count((True, False)) > 0
        error = errors.get(len(seen))
        hook = trainer.model.lm_head.register_forward_pre_hook(_raise(error)) if error else None
        try:
            return generate(*given)
        except (ZeroDivisionError, KeyboardInterrupt):
            return generate(*given)
        finally:
            if hook is not None:
                hook.remove()
            seen.append(trl_world.state_of(trainer.model) == before)
            assert trainer._rollout.stats.kv_bytes_held == 0

    trainer._rollout.generate = observed
    trainer.train()
    assert seen == [True] * 4


def _raise(error: type[BaseException]) -> Any:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error

    return hook


def test_new_weights_draw_other_samples(tmp_path: Path) -> None:
    """With one seed and one step's keys, an update at learning rate 1 changes the samples."""
    trainer = trl_world.trainer(RolloutGRPOTrainer, trl_world.grpo_args(tmp_path, learning_rate=1.0, max_steps=1))
    calls = Calls(trainer)
    trainer.train()
    with torch.no_grad():
        moved = [parameter.abs().max().item() for parameter in trainer.model.parameters()]
    assert max(moved) > 0.5
    trainer.state.global_step = 0
    trainer._rollout.keys.restart("train")
    trainer._rollout.keys.begin_generation("train", 0)
    again = trainer._rollout.generate(trainer, calls.prompts[0])
    assert again.ids != calls.ids[0]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "modules_to_save"],
)
def test_adapters_train_without_merging(tmp_path: Path, changes: list[Change], config: dict[str, Any]) -> None:
    model = get_peft_model(trl_world.model(), LoraConfig(r=4, init_lora_weights=False, **config))
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before = base.detach().clone()
    calls = _trained(tmp_path, model=model, args={"learning_rate": 1e-2, "optim": "adamw_torch_fused"})
    assert max(calls.distances) < 1e-5
    assert torch.equal(base, before)
    assert len(set(calls.samples)) == len(calls.samples)
    assert not any(change.structure for change in changes)
    noticed = {module for change in changes for module, _ in change.values}
    names = [name for name, module in model.named_modules() if id(module) in noticed]
    assert names
    assert not any("base_layer" in name for name in names)


def test_rloo_trains_on_the_engines_samples(tmp_path: Path) -> None:
    trainer = trl_world.trainer(with_rollout(RLOOTrainer), trl_world.rloo_args(tmp_path, learning_rate=1e-2))
    generate, distances = trainer._rollout.generate, []
    trainer._rollout.generate = lambda *given: distances.append(generate(*given)) or distances[-1]
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert len(distances) == 3
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(trl, "DistillationTrainer"), reason="this TRL has no such trainer")
def test_distillation_trains_on_the_engines_samples(tmp_path: Path) -> None:
    args = {k: v for k, v in trl_world.fields(tmp_path).items() if k not in ("num_generations", "beta")}
    student, teacher = trl_world.model(), trl_world.model()
    torch.nn.init.normal_(teacher.lm_head.weight)
    trainer = with_rollout(trl.DistillationTrainer)(
        model=student,
        teacher_model=teacher,
        train_dataset=trl_world.prompts(),
        processing_class=trl_world.tokenizer(),
        args=trl.DistillationConfig(**args),
    )
    before = student.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 3
    assert not torch.equal(before, student.lm_head.weight)
    assert "rollout/tokens_per_s" in trainer.state.log_history[0] or trainer._metrics["train"]["rollout/tokens_per_s"]


def test_a_resumed_run_repeats_the_samples(tmp_path: Path) -> None:
    args = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = _trained(tmp_path, args=args)
    trainer = trl_world.trainer(RolloutGRPOTrainer, trl_world.grpo_args(tmp_path, **args))
    calls = Calls(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert calls.ids == whole.ids[2:]


def test_several_generations_a_step_and_several_steps_a_generation(tmp_path: Path) -> None:
    twice = _trained(tmp_path, args={"steps_per_generation": 1, "max_steps": 2})
    assert [len(call) for call in twice.ids] == [4, 4, 4, 4]
    seldom = _trained(tmp_path, args={"num_iterations": 2, "max_steps": 4})
    assert [len(call) for call in seldom.ids] == [8, 8]
    for calls in (twice, seldom):
        assert len(set(calls.samples)) == len(calls.samples)


def test_evaluation_repeats_itself_and_leaves_training_as_it_is(tmp_path: Path) -> None:
    alone = _trained(tmp_path, args={"learning_rate": 1e-2})
    args = {"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    evaluation = {"num_generations_eval": 2} if hasattr(trl_world.grpo_args(tmp_path), "num_generations_eval") else {}
    trainer = trl_world.trainer(
        RolloutGRPOTrainer, trl_world.grpo_args(tmp_path, **args, **evaluation), eval_dataset=trl_world.prompts(2)
    )
    calls = Calls(trainer)
    trainer.train()
    trained = [ids for ids, prompts in zip(calls.ids, calls.prompts, strict=True) if len(prompts) == 8]
    assert trained == alone.ids
    trainer.evaluate()
    trainer.evaluate()
    size = len(calls.ids) // 2 and sum(len(p) != 8 for p in calls.prompts) // 5
    assert calls.ids[-size:] == calls.ids[-2 * size : -size]


@pytest.mark.parametrize("words", [1, 10, 15, 17, 3000])
def test_prompts_of_any_length(tmp_path: Path, words: int) -> None:
    args = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 1}
    calls = _trained(tmp_path, args=args, train_dataset=trl_world.prompts(2, words))
    assert len(calls.prompts[0][0]) == words
    assert max(calls.distances) < 2e-5


def test_a_row_that_cannot_be_completed_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The row stands as one end of sequence, outside the loss and its group's mean."""
    args = trl_world.grpo_args(tmp_path, shuffle_dataset=False, max_steps=1, generation_batch_size=8)
    rows = ["w15 " * 40, "w7 w8"]
    dataset = trl_world.prompts(2).map(lambda _, i: {"prompt": rows[i]}, with_indices=True)
    trainer = trl_world.trainer(
        RolloutGRPOTrainer, args, model=trl_world.model(max_position_embeddings=32), train_dataset=dataset
    )
    outputs, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(score(inputs)) or outputs[-1]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("has no completion and is left out of the loss") == 4
    failed = (outputs[0]["prompt_ids"] == 15).any(dim=1)
    assert failed.sum() == 4
    assert not outputs[0]["completion_mask"][failed].any()
    assert (outputs[0]["completion_mask"][~failed].sum(dim=1) > 1).all()
    assert torch.equal(outputs[0]["advantages"][failed], torch.zeros(4))
    # The failed rows would have a reward of 0.
    log = trainer.state.log_history[-1]
    assert log["rewards/distinct_words/mean"] > 8
    assert log["rollout/failed_rows"] == 4


def test_a_call_without_any_completion_says_why(tmp_path: Path) -> None:
    trainer = trl_world.trainer(
        RolloutGRPOTrainer,
        trl_world.grpo_args(tmp_path),
        model=trl_world.model(max_position_embeddings=8),
        train_dataset=trl_world.prompts(2, 20),
    )
    with pytest.raises(InputError, match="None of a call's 8 prompts has a completion"):
        trainer.train()
