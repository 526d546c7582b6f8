"""RLOO with TRL, on the sums of the GRPO example: any trainer of TRL that samples takes this engine in the same way."""

from __future__ import annotations

import argparse

import torch
from trl import RLOOConfig, RLOOTrainer

from jobs.examples.grpo import closeness, sums
from rollout.integrations.trl import with_rollout
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer

RolloutRLOOTrainer = with_rollout(RLOOTrainer)


def main() -> None:
    """Train, and print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct", help="as model.path of a job")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    source = ModelSource(path=options.model, dtype="float32")  # or a model that you have loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = RLOOConfig(
        output_dir="runs/rloo",
        max_steps=options.steps,
        learning_rate=1e-5,
        beta=0.0,  # no KL penalty, so no reference model
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=5,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RolloutRLOOTrainer(
        model=load_model(source, device),
        processing_class=load_tokenizer(source),
        reward_funcs=closeness,
        args=args,
        train_dataset=sums(256),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']}: mean reward {entry['reward']:.3f}")


if __name__ == "__main__":
    main()
