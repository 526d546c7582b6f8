"""Figures of several runs as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

OURS = "ours"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one engine; ``error`` is empty unless it failed."""

    engine: str
    tokens: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    error: str = ""

    @property
    def rate(self) -> float:
        """Useful output tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """An engine's figures over its runs that did not fail; None where all did."""

    engine: str
    runs: int
    failed: int
    rate: float | None
    slowest: float | None
    fastest: float | None
    ratio: float | None
    """Of the median rate to that of the first peer; None where there is no such peer."""
    peak_rss_bytes: int | None


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row an engine, in the order of their first runs."""
    names = list(dict.fromkeys(run.engine for run in runs))
    rates = {name: sorted(run.rate for run in runs if run.engine == name and not run.error) for name in names}
    medians = {name: median(values) for name, values in rates.items() if values}
    base = medians.get(first_peer(names) or "")
    rows = []
    for name in names:
        own = [run for run in runs if run.engine == name]
        rate = medians.get(name)
        rows.append(
            Row(
                engine=name,
                runs=len(own),
                failed=sum(bool(run.error) for run in own),
                rate=rate,
                slowest=rates[name][0] if rates[name] else None,
                fastest=rates[name][-1] if rates[name] else None,
                ratio=rate / base if rate is not None and base is not None else None,
                peak_rss_bytes=max((run.peak_rss_bytes for run in own if not run.error), default=None),
            )
        )
    return rows


def first_peer(names: Sequence[str]) -> str | None:
    """The engine that others are compared with: the first one named that is not ours."""
    return next((name for name in names if name.split(":")[0] != OURS), None)


def render(rows: Sequence[Row]) -> str:
    """The table as text, columns aligned."""
    peer = first_peer([row.engine for row in rows])
    header = ("engine", "tok/s", "slowest", "fastest", f"x {peer}" if peer else "x", "peak RSS", "runs")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    runs = f"{row.runs - row.failed}/{row.runs}" if row.failed else str(row.runs)
    rss = "-" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 2**20:.0f} MiB"
    rates = (_number(value, ".1f") for value in (row.rate, row.slowest, row.fastest))
    return (row.engine, *rates, _number(row.ratio, ".2f"), rss, runs)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
