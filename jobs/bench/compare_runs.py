"""Compare several runs of one job: how many samples are equal, and how far log-probabilities differ.

    python -m jobs.bench.compare_runs runs/cap1 runs/cap8 runs/cap64

compares every run with the first, on the rows that both have. Runs of the same data, sampling and seed with other
batch caps, ranks or interruptions should agree: in float32 on every sample, in bfloat16 on most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars, load_dataset


def samples(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the records of a run by row and sample."""
    kind = json.loads((run / "run.json").read_text(encoding="utf-8"))["output_format"]
    name = {"parquet": "parquet", "jsonl": "json"}[kind]
    files = str(run / "shards" / f"*.{kind}")
    return {(record["row_id"], record["sample"]): record for record in load_dataset(name, data_files=files)["train"]}


def main() -> None:
    """Compare the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    disable_progress_bars()
    first, *others = parser.parse_args().runs
    expected = samples(first)
    print(f"{'run':32} samples  identical  share     tokens before they part (median)  max |Δ logprob| of identical")
    for run in others:
        found = samples(run)
        common = expected.keys() & found.keys()
        assert common, f"{run} has other rows than {first}"
        same = [key for key in common if found[key]["completion_ids"] == expected[key]["completion_ids"]]
        gaps = [
            abs(a - b) for key in same for a, b in zip(found[key]["logprobs"], expected[key]["logprobs"], strict=True)
        ]
        parted = sorted(
            next(
                i
                for i, (a, b) in enumerate(
                    zip([*found[key]["completion_ids"], -1], [*expected[key]["completion_ids"], -2], strict=False)
                )
                if a != b
            )
            for key in common - set(same)
        )
        middle = parted[len(parted) // 2] if parted else "-"
        share = 100 * len(same) / len(common)
        print(f"{run.name:32} {len(common):7}  {len(same):9}  {share:6.2f} %  {middle!s:>33}  {max(gaps):.1e}")


if __name__ == "__main__":
    main()
