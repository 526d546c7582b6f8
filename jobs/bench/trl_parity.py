"""Measure, at each step of a GRPO run, how far the engine's log-probabilities are from the trainer's own.

    python -m jobs.bench.trl_parity --steps 50 --bf16

Beside it stands, at every fifth step, the trainer's distance from itself: the same rows in one batch, as they are
trained on, and one by one, padded as ``pad_to_multiple_of=64`` pads them.
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig

from jobs.bench.lib import tables
from rollout.integrations.trl import RolloutGRPOTrainer
from rollout.models.arrays import ceil_div
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer


def trainers_logprobs(trainer: Any, prompts: Any, completions: Any, multiple: int = 1) -> list[torch.Tensor]:
    """Return the trainer's log-probabilities of each completion, in one batch padded to a multiple."""
    width = ceil_div(max(map(len, prompts)), multiple) * multiple
    longest = max(map(len, completions))
    ids = torch.full((len(prompts), width + longest), trainer.processing_class.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, width - len(prompt) : width + len(completion)] = torch.tensor([*prompt, *completion])
        mask[row, width - len(prompt) : width + len(completion)] = 1
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, longest, batch_size=len(ids))[0]
    return [found[row, : len(completion)].float() for row, completion in enumerate(completions)]


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest and the mean distance over all tokens."""
    apart = (torch.cat(one) - torch.cat(other)).abs()
    return apart.max().item(), apart.mean().item()


def main() -> None:
    """Train, and print the distances of each step and over all steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    source = ModelSource(path=given.model, dtype="float32")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=given.bf16,
        gradient_checkpointing=False,
        per_device_train_batch_size=given.samples,
        num_generations=given.samples,
        max_completion_length=given.tokens,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [[{"role": "user", "content": f"What is {12 + i} plus {7 * i + 3}?"}] for i in range(64)]
    trainer = RolloutGRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [-len(row[-1]["content"].split()) / 10 for row in completions],
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
        args=args,
    )
    generate = trainer._rollout.generate
    engine_distances: list[tuple[float, float]] = []
    own_distances: list[tuple[float, float]] = []

    def observed(_: Any, prompts: Any) -> Any:
        done = generate(trainer, prompts)
        step = trainer.state.global_step
        batch = trainers_logprobs(trainer, prompts, done.ids)
        engine_distances.append(distance([torch.tensor(row) for row in done.logprobs], batch))
        print(f"step {step}: engine {engine_distances[-1]}", flush=True)
        if step % 5 == 0:
            alone = [
                trainers_logprobs(trainer, [prompt], [ids], multiple=64)[0]
                for prompt, ids in zip(prompts, done.ids, strict=True)
            ]
            own_distances.append(distance(alone, batch))
            print(f"step {step}: trainer itself {own_distances[-1]}", flush=True)
        return done

    trainer._rollout.generate = observed
    trainer.train()
    lines = [["distance of log-probabilities", "calls", "largest", "mean", "mean of the last ten"]]
    for name, found in (("engine and trainer", engine_distances), ("trainer and itself", own_distances)):
        means = [mean for _, mean in found]
        numbers = (max(most for most, _ in found), fmean(means), fmean(means[-10:]))
        lines.append([name, str(len(found)), *(f"{number:.1e}" for number in numbers)])
    tables.tell(lines)


if __name__ == "__main__":
    main()
