"""Read a run's records with datasets, pandas and pyarrow."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyarrow.dataset
from datasets import load_dataset


def main() -> None:
    """Print a completion, the prompts by mean reward, and the mean length by finish reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output.dir of a complete run")
    files = sorted(str(path) for path in (parser.parse_args().run / "shards").glob("*.parquet"))

    # datasets: records as dicts, memory-mapped; the input's columns stand beside those of the run.
    records = load_dataset("parquet", data_files=files, split="train")
    print(records.features)
    print(records[0]["prompt"], "->", records[0]["text"])

    # pandas: only the columns that are needed; log-probabilities are most of a file.
    frame = pd.concat(pd.read_parquet(file, columns=["row_id", "sample", "reward"]) for file in files)
    by_prompt = frame.groupby("row_id")["reward"].agg(["mean", "std", "count"])
    print(by_prompt.sort_values("mean").to_string())

    # pyarrow: any number of shards in batches, in little memory.
    tokens: dict[str, list[int]] = {}
    shards = pyarrow.dataset.dataset(files, format="parquet")
    for batch in shards.to_batches(columns=["finish_reason", "completion_ids"]):
        for reason, ids in zip(batch["finish_reason"].to_pylist(), batch["completion_ids"], strict=True):
            tokens.setdefault(reason, []).append(len(ids))
    for reason, lengths in tokens.items():
        print(f"{reason}: {len(lengths)} samples, {sum(lengths) / len(lengths):.1f} tokens on average")


if __name__ == "__main__":
    main()
