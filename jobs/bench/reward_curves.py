"""Compare the reward curves of the GRPO example, this engine's generation against TRL's own, over several seeds."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl import GRPOTrainer

from jobs.examples.grpo import closeness, config, sums
from rollout.integrations.trl import RolloutGRPOTrainer
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer

COLUMNS = ["weights", "generation", "seed", "step", "reward", "seconds"]
LEARNING_RATES = {"full": 1e-5, "lora": 1e-3}
TRAINERS: dict[str, Any] = {"rollout": RolloutGRPOTrainer, "plain": GRPOTrainer}

Key = tuple[str, str, int]


def run(weights: str, generation: str, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """Train once; yield a row for each step."""
    source = ModelSource(path="packaged:SmolLM2-135M-Instruct", dtype="float32")
    trainer = TRAINERS[generation](
        model=load_model(source, torch.device("cpu")),
        processing_class=load_tokenizer(source),
        reward_funcs=closeness,
        args=config(steps, LEARNING_RATES[weights], seed),
        train_dataset=sums(256),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if weights == "lora" else None,
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            values = (weights, generation, seed, entry["step"], entry["reward"], entry["step_time"])
            yield dict(zip(COLUMNS, values, strict=True))


def read(file: Path) -> dict[Key, list[dict[str, Any]]]:
    """Return the steps of each run in the file, in their order."""
    runs: dict[Key, list[dict[str, Any]]] = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                runs.setdefault((row["weights"], row["generation"], int(row["seed"])), []).append(row)
    return runs


def table(runs: dict[Key, list[dict[str, Any]]]) -> str:
    """Return the mean reward of each run's first and last quarter, as Markdown."""
    lines = [
        "| weights | generation | seed | steps | first quarter | last quarter | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for (weights, generation, seed), steps in sorted(runs.items()):
        rewards = [float(step["reward"]) for step in steps]
        some = max(1, len(rewards) // 4)
        first, last = sum(rewards[:some]) / some, sum(rewards[-some:]) / some
        seconds = sum(float(step["seconds"]) for step in steps) / len(steps)
        lines.append(f"| {weights} | {generation} | {seed} | {len(steps)} | {first:.3f} | {last:.3f} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the file does not have yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="a CSV file; runs that it has are not repeated")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    for seed in range(options.seeds):
        for weights in LEARNING_RATES:
            for generation in TRAINERS:
                runs = read(options.file)
                if (weights, generation, seed) in runs:
                    continue
                rows = list(run(weights, generation, seed, options.steps))
                with options.file.open("a", encoding="utf-8", newline="") as lines:
                    writer = csv.DictWriter(lines, COLUMNS)
                    if not runs:
                        writer.writeheader()
                    writer.writerows(rows)
    print(table(read(options.file)))


if __name__ == "__main__":
    main()
