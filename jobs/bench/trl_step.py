"""Time the generation of a TRL step: this engine, TRL's plain ``generate``, and continuous batching, in turn.

    python -m jobs.bench.trl_step --prompts 2 --samples 4 --tokens 32 --repeats 3

All three generate from the same prompts with the same live module, whose weights change between any two calls as an
optimizer step changes them. Then this engine generates under ever smaller caps on KV memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from jobs.bench.lib import tables
from rollout.integrations.trl import RolloutGRPOTrainer
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer


def trainer(kind: Any, model: Any, tokenizer: Any, given: argparse.Namespace, **changes: Any) -> Any:
    """Return a trainer on the shared module; what it writes goes to a folder that nobody reads."""
    options = {name: changes.pop(name) for name in ("engine_options",) if name in changes}
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=model.device.type == "cpu",
        bf16=False,
        per_device_train_batch_size=given.prompts * given.samples,
        num_generations=given.samples,
        max_completion_length=given.tokens,
        generation_kwargs={"min_new_tokens": given.tokens},
        report_to=[],
        **changes,
    )
    rows = [
        [{"role": "user", "content": f"What is {12 + i} plus {7 * i + 3}? Explain it."}] for i in range(given.prompts)
    ]
    return kind(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
        args=args,
        **options,
    )


def step_weights(model: Any) -> None:
    """Change every weight by about as much as AdamW does at a learning rate of 1e-6."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter).sign_(), alpha=1e-6)


def generate(given_trainer: Any) -> tuple[float, int]:
    """Return the seconds of one generation, and its tokens."""
    rows = given_trainer.train_dataset["prompt"]
    prompts = [prompt for prompt in rows for _ in range(given_trainer.num_generations)]
    step_weights(given_trainer.model)
    start = time.perf_counter()
    _, completion_ids, *_ = given_trainer._generate(prompts)
    return time.perf_counter() - start, sum(map(len, completion_ids))


def main() -> None:
    """Run the comparison and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    source = ModelSource(path=given.model, dtype="float32")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    model.train()
    trainers = {
        "ours": trainer(RolloutGRPOTrainer, model, tokenizer, given),
        "TRL, generate": trainer(GRPOTrainer, model, tokenizer, given),
        "TRL, continuous batching": trainer(
            GRPOTrainer, model, tokenizer, given, use_transformers_continuous_batching=True
        ),
    }
    timed: dict[str, list[tuple[float, int]]] = {name: [] for name in trainers}
    for repeat in range(given.repeats + 1):
        for name, one in trainers.items():
            found = generate(one)
            print(
                f"{'warm-up' if repeat == 0 else f'repeat {repeat}'}, {name}: {found[0]:.2f} s, {found[1]} tokens",
                flush=True,
            )
            if repeat:
                timed[name].append(found)
    lines = [["generation", "seconds, median", "min", "max", "tokens"]]
    for name, runs in timed.items():
        times = [seconds for seconds, _ in runs]
        row = [f"{median(times):.2f}", f"{min(times):.2f}", f"{max(times):.2f}", f"{runs[0][1]}"]
        lines.append([name, *row])
    tables.tell(lines)

    lines = [["cap on KV memory, MiB", "peak, MiB", "held after, bytes", "preempted rows", "seconds"]]
    for cap in (None, 16, 8, 4):
        options = {} if cap is None else {"max_kv_bytes": cap << 20}
        one = trainer(RolloutGRPOTrainer, model, tokenizer, given, engine_options=options)
        seconds, _ = generate(one)
        stats = one._rollout.stats
        memory = [f"{stats.peak_kv_bytes / 2**20:.1f}", str(stats.kv_bytes_held), str(stats.preempted_rows)]
        lines.append(["none" if cap is None else str(cap), *memory, f"{seconds:.2f}"])
    tables.tell(lines)


if __name__ == "__main__":
    main()
