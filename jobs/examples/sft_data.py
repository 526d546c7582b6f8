"""Turn a scored run into fine-tuning data: the best sample of each prompt, if its reward is high enough."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset

COLUMNS = ["row_id", "prompt", "text", "reward", "finish_reason"]


def conversations(run: Path, least_reward: float) -> Iterator[dict[str, Any]]:
    """Yield one conversation per prompt, in the chat format that TRL, Axolotl and others read."""
    records = load_dataset("parquet", data_files=f"{run}/shards/*.parquet", split="train").select_columns(COLUMNS)
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["finish_reason"] != "stop" or record["reward"] is None or record["reward"] < least_reward:
            continue
        other = best.get(record["row_id"])
        if other is None or record["reward"] > other["reward"]:
            best[record["row_id"]] = record
    for record in best.values():
        prompt = record["prompt"]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        yield {"messages": [*messages, {"role": "assistant", "content": record["text"]}]}


def main() -> None:
    """Write the conversations as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output.dir of a complete run with a reward")
    parser.add_argument("--least-reward", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("sft.jsonl"))
    options = parser.parse_args()
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in conversations(options.run, options.least_reward)]
    options.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} conversations in {options.output}")


if __name__ == "__main__":
    main()
