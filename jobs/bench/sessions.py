"""Time the turns of conversations with and without a session.

    python -m jobs.bench.sessions packaged:SmolLM2-135M-Instruct --device cpu --dtype float32 --rows 16

Each conversation begins with a prompt of its own length; between turns, tokens stand for a tool's output. Both engines
get the same prompts, and take turns, so that a change of the machine's speed affects both alike. The second and later
turns of the session prefill only what is new.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from jobs.bench.lib import cli, tables
from rollout import Batch, Engine, SamplingParams

HEADER = ("turn", "engine", "prompt tokens", "prefilled", "reused", "seconds", "KV bytes held after")
#: Common ids, the same in most vocabularies.
_FIRST_ID, _LAST_ID = 100, 1000


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of one engine."""

    number: int
    engine: str
    prompt_tokens: int
    prefilled: int
    reused: int
    seconds: float
    bytes_held: int


def conversations(
    engine: Engine, first: Sequence[list[int]], params: SamplingParams, turns: int, tool: int
) -> list[Turn]:
    """Run ``turns`` turns, alternately without and with a session; each prompt continues its first sample."""
    rng, found, prompts = np.random.default_rng(1), list[Turn](), list(first)
    with engine.session() as session:
        for number in range(1, turns + 1):
            calls = [("plain", engine), ("session", session)]
            batches: list[Batch] = []
            for name, caller in calls if number % 2 else calls[::-1]:
                start = time.perf_counter()
                batch = caller.generate(prompts, params, seed=number)
                seconds, stats = time.perf_counter() - start, batch.stats
                tokens = sum(map(len, prompts))
                found.append(
                    Turn(
                        number, name, tokens, stats.prefilled_tokens, stats.reused_tokens, seconds, stats.kv_bytes_held
                    )
                )
                batches.append(batch)
            ids = [[record.completion_ids for record in batch] for batch in batches]
            print(f"turn {number}: {sum(a == b for a, b in zip(*ids, strict=True))} of {len(ids[0])} alike", flush=True)
            prompts = [
                record.prompt_ids + record.completion_ids + rng.integers(_FIRST_ID, _LAST_ID, tool).tolist()
                for record in batches[0]
                if not record.sample
            ]
    return found


def lines(turns: Sequence[Turn]) -> tables.Lines:
    """Return rows under `HEADER`: medians over the repetitions."""
    rows = []
    for number, engine in dict.fromkeys((turn.number, turn.engine) for turn in turns):
        same = [turn for turn in turns if (turn.number, turn.engine) == (number, engine)]
        seconds = median(turn.seconds for turn in same)
        counts = (f"{count:,}" for count in (same[0].prompt_tokens, same[0].prefilled, same[0].reused))
        rows.append((str(number), engine, *counts, f"{seconds:.2f}", f"{same[0].bytes_held:,}"))
    return rows


def main() -> int:
    """Print a line per turn and engine."""
    parser = cli.options("Times turns of conversations with and without a session.")
    parser.add_argument("--rows", type=int, default=16, help="conversations")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt")
    parser.add_argument("--shortest", type=int, default=100, help="tokens of the shortest first prompt")
    parser.add_argument("--longest", type=int, default=800, help="tokens of the longest first prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion")
    parser.add_argument("--tool", type=int, default=40, help="tokens of a tool's output")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    engine = Engine(cli.model(cli.folder(parser, given), given), None)
    rng = np.random.default_rng(0)
    lengths = np.linspace(given.shortest, given.longest, given.rows).astype(int)
    first = [rng.integers(_FIRST_ID, _LAST_ID, length).tolist() for length in lengths]
    params = SamplingParams(n=given.samples, max_new_tokens=given.tokens, ignore_eos=True)
    engine.generate(first[:1], SamplingParams(max_new_tokens=2))  # set up
    turns = [
        turn for _ in range(given.repeats) for turn in conversations(engine, first, params, given.turns, given.tool)
    ]
    print(tables.render([HEADER, *lines(turns)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
