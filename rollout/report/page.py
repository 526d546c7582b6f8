"""The page of a run: its settings, numbers and charts. Everything read from the run is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import Any

from rollout.report.chart_specs import byte_unit, each_worker, finished_over_time, over_time
from rollout.report.data_section import data_section
from rollout.report.data_statistics import DataStatistics
from rollout.report.history import Activity, History
from rollout.report.samples_to_read import SamplePicker
from rollout.report.series import Counts, Limits, add_counts, quantile, share_above
from rollout.report.svg import rounded
from rollout.report.tables import table
from rollout.report.time_axis import clock
from rollout.run_dir.run import RunDir
from rollout.run_dir.summary import Totals, format_counts

_ATTEMPT_COLUMNS = (
    *("attempt", "started (UTC)", "host", "workers", "policy", "budget", "KV limit", "ran for"),
    *("tokens", "tokens/s", "step p50, p95, p99", "over budget", "preempted"),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """The run that the page shows."""

    run: RunDir
    description: Mapping[str, Any]
    """The contents of ``run.json``."""
    totals: Totals
    attempts: Mapping[int, dict[str, Any]]
    """What each attempt ran with, by number."""
    limits: Mapping[int, Limits]
    """By attempt."""

    @property
    def prompt_column(self) -> str:
        """The value of ``data.prompt_column``."""
        return str(_mapping(_mapping(self.description.get("config")).get("data")).get("prompt_column", "prompt"))

    def attempt(self, number: int) -> dict[str, Any]:
        """Return what an attempt ran with; empty if that is not known."""
        return self.attempts.get(number, {})


def page(subject: Subject, history: History, statistics: DataStatistics, picker: SamplePicker) -> str:
    """Draw the whole HTML document; it loads nothing, and its content security policy forbids it."""
    style, script = (_resource(name) for name in ("page.css", "hover.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    name = escape(subject.run.paths.root.resolve().name)
    finished = finished_over_time(history) if history.spans else ""
    content = "".join(
        (
            f'<h1>{name}</h1>\n<p class="under">{escape(" · ".join(_subtitle(subject, history)))}</p>\n',
            _tiles(subject, history),
            _facts(subject),
            _performance(subject, history) if history.spans else "",
            data_section(statistics, picker, subject.prompt_column, finished),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}: rollout</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style>\n</head>\n<body>\n{content}"
        f'<div id="tip" hidden></div>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _performance(subject: Subject, history: History) -> str:
    """Draw the half of the page about the run."""
    return "".join((over_time(history), _attempts(subject, history), each_worker(history), _notes(history)))


def _subtitle(subject: Subject, history: History) -> list[str]:
    state = "complete" if subject.run.complete() else "not complete"
    if not history.spans:
        return [state, "no metrics, hence no charts over time"]
    began = datetime.fromtimestamp(history.spans[0].start, UTC)
    return [
        state,
        f"began {began:%Y-%m-%d %H:%M:%S} UTC",
        _plural(len(history.tracks), "worker"),
        _plural(len(history.attempts), "attempt"),
    ]


def _tiles(subject: Subject, history: History) -> str:
    run, totals = subject.run, subject.totals
    tiles = [
        ("samples", f"{totals.samples:,}", f"of {run.rows * run.samples:,}; {totals.shards} of {run.shards} shards"),
        ("tokens generated", f"{totals.completion_tokens:,}", f"{totals.prompt_tokens:,} in prompts"),
        *(_speed(subject, history) if history.spans else ()),
        ("prompts with errors", f"{totals.error_rows:,}", format_counts(totals.errors)) if totals.errors else None,
        ("mean reward", f"{totals.mean_reward:.4f}", "") if totals.mean_reward is not None else None,
    ]
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>\n"
        for name, value, more in filter(None, tiles)
    )
    return f'<dl class="tiles">\n{"".join(cells)}</dl>\n'


def _speed(subject: Subject, history: History) -> list[tuple[str, str, str] | None]:
    """Return the tiles about speed: name, value and remark of each."""
    seconds = sum(span.seconds for span in history.spans)
    tokens = sum(attempt.new_tokens for attempt in history.attempts.values())
    preempted = sum(attempt.preempted_rows for attempt in history.attempts.values())
    live = sum(track.level_seconds("live_rows") for track in history.tracks.values()) / seconds
    times = _step_times(history.attempts.values())
    p50, p95, p99 = (_ms(quantile(times, q)) for q in (0.5, 0.95, 0.99))
    over, of = _over_budget(history.attempts, subject.limits)
    oom = round(sum(activity.out_of_memory_events for activity in history.attempts.values()))
    return [
        ("tokens/s", f"{tokens / seconds:,.1f}", f"over {clock(seconds)} of running"),
        ("live samples", f"{live:,.1f}", "on average" + (", all workers" if len(history.tracks) > 1 else "")),
        ("step time p50", p50, f"p95 {p95}, p99 {p99}"),
        ("steps over budget", _percent(over), of) if of else None,
        ("preempted samples", f"{preempted:,.0f}", f"out of memory {_plural(oom, 'time')}"),
    ]


def _facts(subject: Subject) -> str:
    run, totals, description = subject.run, subject.totals, subject.description
    config = _mapping(description.get("config"))
    last = subject.attempt(run.attempt)
    facts = {
        "model": _pairs(_not_null(config.get("model")) | {"dtype": run.dtype}),
        "data": _pairs({"prompts": run.rows} | _not_null(config.get("data"))),
        "sampling": _pairs(_mapping(config.get("sampling")) | {"seed": config.get("seed")}),
        "batcher": _pairs(last.get("batcher")),
        "memory": _pairs(last.get("memory")),
        "output": _pairs(_mapping(config.get("output")) | {"rows_per_shard": run.rows_per_shard}),
        "reward": _pairs(config.get("reward")),
        "finished": format_counts(totals.finish_reasons),
        "cost": _pairs(_not_null(description.get("cost"))),
        "versions": _pairs(description.get("packages")),
    }
    cells = (f"<tr><th>{name}</th><td>{escape(text)}</td></tr>\n" for name, text in facts.items() if text)
    return f'<table class="facts">\n{"".join(cells)}</table>\n'


def _attempts(subject: Subject, history: History) -> str:
    rows = []
    for number, activity in history.attempts.items():
        attempt = subject.attempt(number)
        limits = subject.limits.get(number, Limits())
        times = activity.step_ms_counts
        over, of = _over_budget({number: activity}, subject.limits)
        rows.append(
            [
                str(number),
                _text(attempt.get("started", "?")).replace("T", " ").removesuffix("+00:00"),
                _text(attempt.get("host", "?")),
                str(len(activity.workers)),
                _text(_mapping(attempt.get("batcher")).get("name", "?")),
                "none" if limits.latency_budget_ms is None else _ms(limits.latency_budget_ms),
                "none" if limits.max_kv_bytes is None else _bytes(limits.max_kv_bytes),
                clock(activity.seconds),
                f"{activity.new_tokens:,.0f}",
                f"{activity.new_tokens / activity.seconds:,.1f}",
                ", ".join(_ms(quantile(times, q)).removesuffix(" ms") for q in (0.5, 0.95, 0.99)) + " ms",
                _percent(over) if of else "",
                f"{activity.preempted_rows:,.0f}",
            ]
        )
    return f"<h2>Attempts</h2>\n{table(_ATTEMPT_COLUMNS, rows)}"


def _notes(history: History) -> str:
    notes = [
        "Times count from the start of the run; pauses, in which no worker ran, are not to scale.",
        "Free memory is what the machine had left; it is no limit of the run. "
        "Workers that share a host's memory or a GPU count it once.",
        "Step times are rounded up to two digits.",
        "Samples, KV memory and tokens of several workers are summed.",
    ]
    if history.unreadable:
        lines = _plural(history.unreadable, "line")
        notes.append(f"Not shown: {lines} of metrics that cannot be read, for example torn by a kill.")
    return f'<p class="note">{" ".join(notes)}</p>\n'


def _step_times(attempts: Iterable[Activity]) -> Counts:
    total: Counts = {}
    for attempt in attempts:
        add_counts(total, attempt.step_ms_counts)
    return total


def _over_budget(attempts: Mapping[int, Activity], limits: Mapping[int, Limits]) -> tuple[float, str]:
    """Return the share of steps over their attempt's budget, and the budgets as text; no text without a budget."""
    over = total = 0.0
    budgets = []
    for number, attempt in attempts.items():
        budget = limits.get(number, Limits()).latency_budget_ms
        if budget is not None:
            steps = sum(attempt.step_ms_counts.values())
            over += steps * share_above(attempt.step_ms_counts, budget) if steps else 0.0
            total += steps
            budgets.append(_ms(budget))
    return over / total if total else math.nan, f"of {' or '.join(dict.fromkeys(budgets))}" if budgets else ""


# -- formatting ------------------------------------------------------------------------------------------


def _plural(count: int, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _not_null(values: Any) -> dict[str, Any]:
    """Return the values that are not null."""
    return {name: value for name, value in _mapping(values).items() if value is not None}


def _pairs(values: Any) -> str:
    return " · ".join(f"{name} {_named(name, value)}" for name, value in _mapping(values).items())


def _named(name: str, value: Any) -> str:
    return _bytes(value) if name.endswith("_bytes") and isinstance(value, int | float) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _bytes(value: float) -> str:
    unit, factor = byte_unit(value)
    return f"{rounded(value / factor)} {unit}"


def _ms(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _percent(share: float) -> str:
    return "?" if math.isnan(share) else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
