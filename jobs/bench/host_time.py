"""Measure the share of a step spent outside the model: policy, pages, tokens, records and Python.

    python -m jobs.bench.host_time packaged:SmolLM2-135M-Instruct
    python -m jobs.bench.host_time random:tiny --settings 64,256,1024,64x2000
    python -m jobs.bench.host_time random:tiny --runner graphs --settings 64x1024,256x1024,1024x1024

With ``--runner graphs``, forwards compute nothing, and take what the host does for a CUDA graph but for its launch:
they fill the buffers that a captured step reads, on a CPU. Logits are then all 0.

A setting is ``ROWS[xCONTEXT]``. Each runs twice: in "decode" all rows only decode; in "flow" rows finish and new ones
join all the time. The engine runs unchanged, with timers around the calls of `POINTS`. Figures are medians over steps.
A step is measured from the end of the step before, so the time between steps is included. CPU only: a GPU would still
be computing when a call returns.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import rollout.engine.generation
import rollout.engine.loop
from jobs.bench.lib import cli, tables
from jobs.bench.lib.empty_graphs import runner_of_empty_graphs
from rollout import Engine, SamplingParams
from rollout.requests import Request, StepReport

_GENERATION: Any = rollout.engine.generation
_LOOP: Any = rollout.engine.loop

POINTS: tuple[tuple[str, Any, str], ...] = (
    ("sampling", _LOOP, "sample"),
    ("policy", _LOOP.Loop, "_decide"),
    ("pages", _LOOP.Scheduler, "shrink"),
    ("pages", _LOOP.Scheduler, "preempt_beyond"),
    ("pages", _LOOP.Scheduler, "admit"),
    ("pages", _LOOP.Scheduler, "make_room"),
    ("pages", _LOOP.Scheduler, "go_live"),
    ("packing", _LOOP.Scheduler, "prefill_chunks"),
    ("packing", _LOOP, "build_forward_batch"),
    ("records", _LOOP.Loop, "_settle"),
    ("queue", _LOOP.Loop, "refill"),
)
"""A part and a call that belongs to it; the runner's ``forward`` is added. Time in a nested call counts for that call
alone."""
MODEL = ("forward", "sampling")
PARTS = (*MODEL, "policy", "pages", "packing", "records", "other", "queue", "between")
"""``other`` is the rest of the step itself, ``between`` the rest of the time since the step before."""
STEPS = 48
"""Measured steps."""
WARM_UP = 8
"""Steps before them, in which first calls allocate and compile."""
MEAN_TOKENS = 64
"""Mean output tokens per row in a flow: one in this many rows finishes per step."""
SHORT = 100
"""Tokens per row where a setting gives none."""

Kind = Literal["decode", "flow"]
KINDS: tuple[Kind, ...] = ("decode", "flow")


class Enough(Exception):
    """Raised when all steps are measured."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Live rows, and tokens per row."""

    rows: int
    context: int = SHORT

    @classmethod
    def of(cls, text: str) -> Setting:
        """Parse ``ROWS[xCONTEXT]``.

        Raises:
            ValueError: the text has another form.
        """
        rows, _, context = text.partition("x")
        return cls(int(rows), int(context or SHORT))

    def requests(self, kind: Kind, vocabulary: int) -> Iterator[Request]:
        """Yield more requests than are needed."""
        rng = random.Random(0)
        endless = kind == "flow"
        prompt = max(1, self.context - (MEAN_TOKENS // 2 if endless else WARM_UP + STEPS // 2))
        for i in range(1_000_000 if endless else self.rows):
            ids = [rng.randrange(vocabulary) for _ in range(prompt)]
            # Rows that only decode live until the steps are measured.
            new = rng.randint(1, 2 * MEAN_TOKENS - 1) if endless else 2 * (STEPS + WARM_UP) + self.rows * prompt // 512
            yield Request(str(i), ids, SamplingParams(max_new_tokens=new, ignore_eos=True))


@dataclass(frozen=True, slots=True)
class Step:
    """One measured step."""

    seconds: float
    """Time since the end of the step before."""
    parts: dict[str, float]


class Timers:
    """Timers around the calls of `POINTS`; `steps` has what each measured step took.

    Args:
        setting, kind: what runs.
    """

    def __init__(self, setting: Setting, kind: Kind) -> None:
        self.steps: list[Step] = []
        self._setting, self._kind = setting, kind
        self._counted = 0
        self._inner = 0.0
        """Seconds of timed calls nested in the current one."""
        self._clear()

    def _clear(self) -> None:
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._began = time.perf_counter()

    def on_step(self, report: StepReport) -> None:
        """For `Engine.run`.

        Raises:
            Enough: there are `STEPS`.
        """
        seconds, parts = time.perf_counter() - self._began, self._parts
        inside = report.step_ms / 1e3
        parts["between"] = max(0.0, seconds - inside - parts["queue"])
        parts["other"] = inside - sum(parts[part] for part in PARTS[: PARTS.index("other")])
        if self._counts(report):
            self._counted += 1
            if self._counted > WARM_UP:
                self.steps.append(Step(seconds, parts))
        if len(self.steps) == STEPS:
            raise Enough
        self._clear()

    def _counts(self, report: StepReport) -> bool:
        if self._kind == "decode":
            return report.live_rows == self._setting.rows and not report.prefill_tokens
        # Once the first rows are in, few are prefilled at a time.
        return report.new_tokens >= 0.8 * self._setting.rows

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``call`` so that its own time is added to a part."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            around, self._inner = self._inner, 0.0
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self._parts[part] += seconds - self._inner
                self._inner = around + seconds

        return wrapper

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the timers inside this block."""

        def loop(runner: Any, *args: Any, **kwargs: Any) -> Any:
            runner.forward = self.timed("forward", runner.forward)
            return plain(runner, *args, **kwargs)

        plain, originals = _GENERATION.Loop, [(owner, name, getattr(owner, name)) for _, owner, name in POINTS]
        for (part, owner, name), (_, _, original) in zip(POINTS, originals, strict=True):
            setattr(owner, name, self.timed(part, original))
        _GENERATION.Loop = loop
        try:
            yield
        finally:
            _GENERATION.Loop = plain
            for owner, name, original in originals:
                setattr(owner, name, original)


def measure(model: Any, setting: Setting, kind: Kind, policy: str, empty_graphs: bool = False) -> list[Step]:
    """Return the steps of one run, whose forwards are those of the model or, if ``empty_graphs``, compute nothing.

    Raises:
        ValueError: the requested rows were not live together for long enough.
    """
    timers = Timers(setting, kind)
    engine = Engine(model, None, policy=policy, max_rows=setting.rows)
    if empty_graphs:  # only now, since an engine checks at first what forwards compute
        strategy: Any = engine._module.strategy
        strategy.runner = partial(runner_of_empty_graphs, strategy)
    requests = setting.requests(kind, model.get_input_embeddings().weight.shape[0])
    try:
        with timers.installed():
            for _ in engine.run(requests, on_step=timers.on_step):
                pass
    except Enough:
        return timers.steps
    raise ValueError(f"only {len(timers.steps)} steps had {setting.rows} rows: is there memory for them?")


HEADER = ("rows", "context", "kind", "step ms", *(f"{part} ms" for part in PARTS), "outside of the model")


def line(setting: Setting, kind: Kind, steps: Sequence[Step]) -> tuple[str, ...]:
    """Return a row under `HEADER`: medians, and the share of a step outside forward and sampling."""
    parts = [median(step.parts[part] for step in steps) for part in PARTS]
    outside = median(1 - sum(step.parts[part] for part in MODEL) / step.seconds for step in steps)
    whole = median(step.seconds for step in steps)
    figures = (f"{1e3 * seconds:.2f}" for seconds in (whole, *parts))
    return (str(setting.rows), str(setting.context), kind, *figures, f"{100 * outside:.1f} %")


def main() -> int:
    """Print a line per setting and kind."""
    parser = cli.options("Shows what a step spends outside of the model, on a CPU.", device="cpu")
    parser.add_argument("--settings", default="64,256,1024,64x2000", help="ROWS[xCONTEXT], with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of decode and flow")
    parser.add_argument("--policy", default="predictive")
    parser.add_argument("--runner", default="model", choices=("model", "graphs"), help="what runs forwards")
    given = parser.parse_args()
    try:
        settings = [Setting.of(text) for text in given.settings.split(",")]
        kinds = [KINDS[KINDS.index(text)] for text in given.kinds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    model = cli.model(cli.folder(parser, given), given)
    lines = []
    for setting in settings:
        for kind in kinds:
            steps = measure(model, setting, kind, given.policy, empty_graphs=given.runner == "graphs")
            lines.append(line(setting, kind, steps))
            print(*lines[-1], flush=True)
    print(tables.render([HEADER, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
