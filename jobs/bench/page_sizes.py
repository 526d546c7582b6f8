"""Compute what the page size costs in memory: pages that rows hold over their life, against tokens that they hold.

    python -m jobs.bench.page_sizes LENGTHS.csv --samples 1,8

``LENGTHS.csv`` has a request per line, with columns for tokens of the prompt and of the output, such as the traces of
Azure/AzurePublicDataset. The samples of a prompt share its full pages and hold its last, partial one each. Memory is
summed over the steps of every row, in tokens; a page size of 1 wastes nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jobs.bench.lib import tables

PAGE_SIZES = (16, 32, 64, 128, 256)


def held(lengths: Sequence[tuple[int, int]], samples: int, page_size: int) -> float:
    """Return the tokens that pages of a size hold room for, summed over all steps of all rows.

    Args:
        lengths: tokens of prompt and output of each request.
        samples: of each request.
        page_size: tokens per page.
    """
    total = 0.0
    for prompt, output in lengths:
        shared = prompt // page_size * page_size
        ends = prompt + np.arange(1, output + 1)
        own = -(-ends // page_size) * page_size - shared
        total += float(own.sum()) + output * shared / samples
    return total


def main() -> int:
    """Print a line per number of samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--columns", default="ContextTokens,GeneratedTokens", help="of prompt and output")
    parser.add_argument("--samples", default="1,8", help="per prompt, with commas between")
    parser.add_argument("--limit", type=int, default=4000, help="requests to read")
    given = parser.parse_args()
    prompt, output = given.columns.split(",")
    with given.lengths.open(newline="", encoding="utf-8") as file:
        lengths = [(int(row[prompt]), int(row[output])) for row in csv.DictReader(file)][: given.limit]
    lines = [("samples", *(f"pages of {size}" for size in PAGE_SIZES))]
    for samples in map(int, given.samples.split(",")):
        least = held(lengths, samples, 1)
        lines.append((str(samples), *(f"+{held(lengths, samples, size) / least - 1:.1%}" for size in PAGE_SIZES)))
    print(tables.render(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
