"""Summarise several runs in tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one engine on one workload."""

    workload: str
    engine: str
    """Engine as named on the command line."""
    setting: str
    """The engine with its cap and dtype."""
    tokens: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of all requests, however often they were computed or shared."""
    noisy: bool = False
    """Whether other work on the machine disturbed the run."""
    error: str = ""
    """Reason of a failure; empty otherwise."""
    cut: bool = False
    """Whether it was stopped because an earlier setting was faster."""

    @property
    def rate(self) -> float:
        """Useful output tokens per second."""
        return self.tokens / self.seconds

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, over the same time."""
        return self.prompt_tokens / self.seconds

    @property
    def finished(self) -> bool:
        return not self.error and not self.cut

    def __str__(self) -> str:
        if self.error:
            outcome = f"failed: {self.error}"
        elif self.cut:
            outcome = "stopped: slower than another setting"
        else:
            outcome = f"{self.rate:.1f} tok/s ({self.seconds:.1f} s, {self.peak_rss_bytes / 2**20:.0f} MiB)"
        return f"{self.setting}: {outcome}{', noisy' if self.noisy else ''}"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of an engine's process."""

    engine: str
    setting: str
    seconds: float
    """From the start of the process to the first token of a prompt: imports and loading included."""
    noisy: bool = False

    def __str__(self) -> str:
        return f"{self.setting}: first token after {self.seconds:.1f} s{', noisy' if self.noisy else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """An engine's figures on a workload over its successful runs; None where all failed."""

    workload: str
    engine: str
    setting: str
    runs: int
    failed: int
    noisy: int
    rate: float | None
    slowest: float | None
    fastest: float | None
    ratio: float | None
    """Our median rate on this workload divided by this one; None where one is missing."""
    peak_rss_bytes: int | None
    prompt_rate: float | None
    """The median, like ``rate``."""
    seconds: float | None
    """The median, like ``rate``."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds to the first token of a fresh process."""

    engine: str
    first: float
    """With empty caches."""
    later: float | None
    """The median of later starts with the same settings; None if there was none."""


def summarise(runs: Sequence[Run], ours: str | None) -> list[Row]:
    """Return a row per workload and engine in the order of first runs; ``ours`` is the engine to compare with."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.workload, run.engine), []).append(run)
    rates = {key: sorted(run.rate for run in own if run.finished) for key, own in groups.items()}
    medians = {key: median(values) for key, values in rates.items() if values}
    rows = []
    for key, own in groups.items():
        rate, base = medians.get(key), medians.get((key[0], ours or ""))
        rows.append(
            Row(
                workload=key[0],
                engine=key[1],
                setting=own[-1].setting,
                runs=len(own),
                failed=sum(not run.finished for run in own),
                noisy=sum(run.noisy for run in own),
                rate=rate,
                slowest=min(rates[key], default=None),
                fastest=max(rates[key], default=None),
                ratio=base / rate if rate and base else None,
                peak_rss_bytes=max((run.peak_rss_bytes for run in own if run.finished), default=None),
                prompt_rate=_median([run.prompt_rate for run in own if run.finished]),
                seconds=_median([run.seconds for run in own if run.finished]),
            )
        )
    return rows


def first_tokens(starts: Sequence[Start]) -> list[FirstToken]:
    """Return the time to the first token of each engine, over all starts in order."""
    found = []
    for engine in dict.fromkeys(start.engine for start in starts):
        own = [start for start in starts if start.engine == engine]
        seen = set[str]()
        again = []
        for start in own:
            if start.setting in seen:
                again.append(start.seconds)
            seen.add(start.setting)
        found.append(FirstToken(engine, own[0].seconds, _median(again)))
    return found


RESULTS = (
    "workload",
    "engine",
    "s",
    "tok/s",
    "slowest",
    "fastest",
    "ours / it",
    "prompt tok/s",
    "peak RSS",
    "runs",
    "noisy",
)
FIRST_TOKENS = ("engine", "first token, empty caches", "first token, later starts")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row under `RESULTS`."""
    runs = f"{row.runs - row.failed}/{row.runs}" if row.failed else str(row.runs)
    rss = "-" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 2**20:.0f} MiB"
    rates = (_number(value, ".1f") for value in (row.rate, row.slowest, row.fastest))
    ratio, prompt = _number(row.ratio, ".2f"), _number(row.prompt_rate, ".0f")
    return (row.workload, row.setting, _number(row.seconds, ".1f"), *rates, ratio, prompt, rss, runs, str(row.noisy))


def first_token_cells(found: FirstToken) -> tuple[str, ...]:
    """Return a row under `FIRST_TOKENS`."""
    return (found.engine, f"{found.first:.1f} s", "-" if found.later is None else f"{found.later:.1f} s")


Lines = Sequence[Sequence[str]]
"""The cells of a table; the first line is its header."""


def render(lines: Lines) -> str:
    """Return a table as text: names left-aligned, figures right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    names = [cell in ("workload", "engine") for cell in lines[0]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name else cell.rjust(width)
            for cell, width, name in zip(line, widths, names, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(lines: Lines) -> str:
    """Return a table as Markdown."""
    marked = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in marked)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return math.exp(fmean(math.log(value) for value in values))


def tell(lines: Lines) -> None:
    """Print a table as Markdown."""
    print(markdown(lines), flush=True)
