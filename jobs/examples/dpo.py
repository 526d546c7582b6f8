"""DPO on the model's own samples: sample with this engine, pair the best with the worst, and score the reference."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rollout import Engine, SamplingParams
from rollout.arithmetic import problems
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer

SHOWN = [{"role": "user", "content": "What is 3 plus 4?"}, {"role": "assistant", "content": "7"}]


def closeness(text: str, right: int) -> float:
    """Score a completion: 1 for the answer alone, less the farther off a number is, 0 for anything else."""
    return max(0.0, 1 - abs(int(text) - right) / right) if re.fullmatch(r"\d{1,4}", text) else 0.0


def preferences(engine: Engine, count: int, samples: int, least_difference: float = 0.2) -> Dataset:
    """Sample answers to ``count`` problems, and pair the best with the worst of each where they differ enough."""
    rows = [row for row in problems(16 * count) if row["prompt"].startswith("What is")][:count]
    prompts = [[*SHOWN, {"role": "user", "content": row["prompt"]}] for row in rows]
    batch = engine.generate(prompts, SamplingParams(n=samples, max_new_tokens=12), seed=0)
    pairs = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        texts = [record.text.strip() for record in batch.records[index * samples : (index + 1) * samples]]
        scores = [closeness(text, int(row["answer"])) for text in texts]
        if max(scores) - min(scores) >= least_difference:
            chosen, rejected = texts[scores.index(max(scores))], texts[scores.index(min(scores))]
            answers = {"chosen": chosen, "rejected": rejected}
            pairs.append({"prompt": prompt} | {k: [{"role": "assistant", "content": v}] for k, v in answers.items()})
    return Dataset.from_list(pairs)


class EngineDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL's classes are imported lazily, so they have no type
    """Computes the reference's log-probabilities with this engine, on the very ids that are trained on."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:  # noqa: ARG002
        engine = Engine(self.model, self.processing_class)
        for answer in ("chosen", "rejected"):
            scores = engine.score(dataset["prompt_ids"], dataset[f"{answer}_ids"])
            dataset = dataset.add_column(f"ref_{answer}_logps", [sum(score.logprobs) for score in scores])
        return dataset


def main() -> None:
    """Write the pairs, train on them, and print how often the chosen answer is the likelier one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct", help="as model.path of a job")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/dpo.jsonl"), help="the pairs")
    options = parser.parse_args()

    source = ModelSource(path=options.model, dtype="float32")  # or a model that you have loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(source, device), load_tokenizer(source)
    pairs = preferences(Engine(model, tokenizer), options.prompts, options.samples)
    if not len(pairs):
        raise SystemExit("No prompt has answers whose scores differ enough: sample more with --samples or --prompts.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pairs.to_json(options.output)
    print(f"{len(pairs)} pairs in {options.output}")

    args = DPOConfig(
        output_dir="runs/dpo",
        max_steps=options.steps,
        learning_rate=1e-6,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=4,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer: Any = EngineDPOTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=pairs)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}, preferred {entry['rewards/accuracies']:.2f}")


if __name__ == "__main__":
    main()
