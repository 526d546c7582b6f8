"""Count the CUDA graphs that are captured, and the steps they serve, while a batch drains.

    python -m jobs.bench.captures random:tiny --rows 256,1024

Prompts of 16 tokens with outputs of 1 to 512 tokens, drawn evenly, begin together; rows end and none join. Three calls
of one engine are measured, then three of a session. Forwards and graphs compute nothing, so no GPU is needed: what is
captured depends on the sizes of steps alone.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any
from unittest import mock

from jobs.bench.lib import cli, tables
from jobs.bench.lib.empty_graphs import runner_of_empty_graphs
from jobs.bench.lib.spies import Spies, watched
from rollout import Engine, SamplingParams
from rollout.engine.live_module import LiveModule

HEADER = ("rows", "call", "steps", "captures", "replayed", "eager", "sizes captured, in tokens")
LONGEST = 512
PROMPT = 16


def lines(model: Any, rows: int, spies: Spies) -> list[tuple[str, ...]]:
    """Return rows under `HEADER`."""
    with mock.patch.object(LiveModule, "may_keep_graphs", True):
        engine = Engine(model, None, max_rows=rows)
    strategy: Any = engine._module.strategy
    strategy.runner = partial(runner_of_empty_graphs, strategy)
    rng = random.Random(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(rows)]
    params = [SamplingParams(max_new_tokens=rng.randint(1, LONGEST), ignore_eos=True) for _ in range(rows)]
    found = []
    with engine.session() as session:
        calls = [("engine", engine)] * 3 + [("session", session)] * 3
        for number, (name, each) in enumerate(calls):
            spies.clear()
            batch = each.generate(prompts, params, seed=number)
            sizes = " ".join(str(rung.tokens) + "+" * rung.mixed for rung, _ in spies.captures)
            counts = (batch.stats.steps, len(spies.captures), spies.replayed.total(), spies.eager.total())
            found.append((str(rows), name, *map(str, counts), sizes))
            print(*found[-1], flush=True)
    return found


def main() -> int:
    """Print a line per call."""
    parser = cli.options("Counts captures while a batch drains, on a CPU.", device="cpu")
    parser.add_argument("--rows", default="256,1024", help="live rows, with commas between")
    given = parser.parse_args()
    model = cli.model(cli.folder(parser, given), given)
    with watched() as spies:
        found = [line for rows in given.rows.split(",") for line in lines(model, int(rows), spies)]
    print(tables.render([HEADER, *found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
