"""GRPO on generated sums with TRL: its trainer generates with this engine, from the weights that it trains."""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from rollout.integrations.trl import RolloutGRPOTrainer
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer


def sums(count: int) -> Dataset:
    """Generate prompts that show one sum and ask for another, and their answers."""
    rng = random.Random(0)
    pairs = [(rng.randint(2, 19), rng.randint(2, 19)) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"3 + 4 = 7\n{a} + {b} =", "answer": a + b} for a, b in pairs])


def closeness(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """Score completions: 1 if the first line is the answer alone, less the farther off it is, 0 if it is no number."""
    scores = []
    for text, right in zip(completions, answer, strict=True):
        first_line = text.split("\n")[0].strip()
        number = int(first_line) if re.fullmatch(r"\d{1,4}", first_line) else 0
        scores.append(max(0.0, 1 - abs(number - right) / right))
    return scores


def config(steps: int, learning_rate: float, seed: int) -> GRPOConfig:
    """Return TRL's arguments: four prompts a step, four completions of each."""
    return GRPOConfig(
        output_dir="runs/grpo",
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=5,
        seed=seed,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train, and print the mean reward of the first and the last steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct", help="as model.path of a job")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    source = ModelSource(path=options.model, dtype="float32")  # or a model that you have loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = RolloutGRPOTrainer(
        model=load_model(source, device),
        processing_class=load_tokenizer(source),
        reward_funcs=closeness,
        args=config(options.steps, 1e-3 if options.lora else 1e-5, options.seed),
        train_dataset=sums(256),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if options.lora else None,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    some = max(1, len(rewards) // 4)
    first, last = sum(rewards[:some]) / some, sum(rewards[-some:]) / some
    print(f"mean reward of the first {some} steps {first:.3f}, of the last {last:.3f}")


if __name__ == "__main__":
    main()
