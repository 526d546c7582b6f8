"""The charts of one worker or of all workers, with the values that the page shows under the pointer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from rollout.report.charts import Lane, Series, chart, strip
from rollout.report.history import History
from rollout.report.series import FloatArray, Track, sum_tracks
from rollout.report.time_axis import TimeAxis, clock

MOST_WORKERS = 64
"""Most workers with charts of their own; the others appear only in the charts of all workers."""
_COLOURS = {
    "memory": "blue",
    "latency": "orange",
    "cap": "green",
    "hold": "grey",
    "running": "purple",
    "over_budget": "pink",
    "oom": "red",
}
FINISH_COLOURS = {"stop": "green", "length": "orange", "abort": "grey", "error": "red"}
_OTHER_COLOURS = ("teal", "yellow", "brown")
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))


def over_time(history: History) -> str:
    """Draw the charts of all workers combined, with a lane of reasons per worker."""
    tracks = history.tracks
    if len(tracks) == 1:
        return f"<h2>Over time</h2>\n{_single(next(iter(tracks.values())), history)}"
    lanes = {f"worker {worker}": track for worker, track in tracks.items()}
    return f"<h2>Over time</h2>\n{_section(sum_tracks(tracks.values()), lanes, history)}"


def each_worker(history: History) -> str:
    """Draw the charts of each worker, folded; empty if there is only one worker."""
    if len(history.tracks) == 1:
        return ""
    parts = [
        f"<details><summary>Worker {worker}</summary>\n{_single(track, history)}</details>\n"
        for worker, track in list(history.tracks.items())[:MOST_WORKERS]
    ]
    rest = len(history.tracks) - MOST_WORKERS
    if rest > 0:
        parts.append(f'<p class="note">{rest} more workers appear only in the charts of all workers.</p>\n')
    return f"<h2>Each worker</h2>\n{''.join(parts)}"


def _single(track: Track, history: History) -> str:
    return _section(track, {"reasons": track}, history)


def _section(track: Track, lanes: Mapping[str, Track], history: History) -> str:
    """Draw the charts of a track, with a lane of reasons for each track of ``lanes``."""
    axis, bins = TimeAxis(history.spans), (history.starts, history.ends)
    starts = {number: activity.spans[0].start for number, activity in history.attempts.items()}
    named = starts if len(starts) > 1 else None
    marks = history.starts[track.out_of_memory > 0]
    paused = track.level("paused_rows")
    held, limit, headroom = track.level("kv_bytes"), track.level("max_kv_bytes"), track.headroom_bytes()
    unit, factor = byte_unit(float(np.nanmax(held)))
    headroom_unit, headroom_factor = byte_unit(float(np.nanmax(headroom)))
    if any(track.step_ms_counts):
        times = [
            Series("median", track.step_ms(0.5), "blue", "area"),
            Series("p95", track.step_ms(0.95), "purple"),
        ]
    else:
        times = [Series("mean", track.step_ms_mean(), "blue", "area")]
    figures = [
        ("Live samples", "", 170, [
            Series("live", track.level("live_rows"), "blue", "area"),
            Series("paused", paused if np.nansum(paused) else np.full_like(paused, np.nan), "purple", leading=False),
            Series("target", track.level("row_target"), "orange", "dashed", leading=False),
        ]),
        ("KV memory", unit, 150, [
            Series("held", held / factor, "blue", "area"),
            Series("limit (memory.max_kv_bytes)", limit / factor, "red", "dashed", leading=False),
        ]),
        ("KV tokens", "in pages held by samples", 110, [Series("tokens", track.level("kv_tokens"), "purple", "area")]),
        ("Free memory", headroom_unit, 90, [Series(_headroom_name(track), headroom / headroom_factor, "teal", "area")]),
        ("Step time", "ms", 150, [
            *times,
            Series("slowest", track.peak("step_ms_max"), "grey", "level", leading=False),
            Series("budget", track.peak("latency_budget_ms"), "red", "dashed"),
        ]),
        ("Throughput", "tokens/s", 130, [
            Series("generated", track.rate("new_tokens"), "green", "area"),
            Series("prefilled", track.rate("prefill_tokens"), "orange", leading=False),
        ]),
    ]  # fmt: skip
    drawn = [
        chart(title, unit, axis, bins, series, height=height, starts=named, marks=None if i else marks)
        for i, (title, unit, height, series) in enumerate(figures)
    ]
    values = [[_values(one, unit) for one in series] for _, unit, _, series in figures]
    colours = _reason_colours(lanes.values())
    preempted = Series("preempted", track.preempted_rows, "brown")
    events = preempted if preempted.values.any() or len(marks) else None
    strips = [Lane(name, one.reasons) for name, one in lanes.items()]
    drawn.insert(1, strip("Reasons for the target", axis, bins, strips, colours, counts=events, marks=marks))
    values.insert(1, _reason_values(lanes, list(colours)) + ([_values(preempted, "")] if events else []))
    return _charts(drawn, values, history)


def finished_over_time(history: History) -> str:
    """Draw finish reasons and the mean reward of the samples that finished at each time; empty if unknown."""
    track = sum_tracks(history.tracks.values())
    if not track.finish_reasons:
        return ""
    axis, bins = TimeAxis(history.spans), (history.starts, history.ends)
    others = [name for name in track.finish_reasons if name not in FINISH_COLOURS]
    colours = FINISH_COLOURS | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
    colours = {name: colour for name, colour in colours.items() if name in track.finish_reasons}
    finished = Series("finished", np.sum(list(track.finish_reasons.values()), axis=0), "blue")
    lane = Lane("share", track.finish_reasons)
    drawn = [strip("Finish reasons over time", axis, bins, [lane], colours, counts=finished)]
    values = [[*_shares(track.finish_reasons, list(colours)), _values(finished, "")]]
    reward = track.reward_mean()
    if not np.isnan(reward).all():
        means = [Series("mean of the samples that finished", reward, "purple")]
        drawn.append(chart("Reward over time", "", axis, bins, means, height=110))
        values.append([_values(means[0], "")])
    return _charts(drawn, values, history)


def _charts(drawn: Sequence[str], values: Sequence[list[Any]], history: History) -> str:
    """Join figures that share the time axis, with the values that the page's script shows under the pointer."""
    axis, bins = TimeAxis(history.spans), (history.starts, history.ends)
    left, right = (np.round(axis.x(times), 1).tolist() for times in bins)
    data = {
        "left": left,
        "right": right,
        "time": [f"{clock(t - axis.begin)}  ({datetime.fromtimestamp(t, UTC):%H:%M:%S} UTC)" for t in bins[0].tolist()],
        "figures": values,
    }
    # A script element has no entities, and only "<" could end it.
    stored = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<section class="charts">\n{"".join(drawn)}<script type="application/json">{stored}</script>\n</section>\n'


def _headroom_name(track: Track) -> str:
    """Describe the headroom, which is a reading of the machine and no limit of the run."""
    memories = len(track.headroom)
    name = "left on the machine, above the reserve"
    return name if memories == 1 else f"{name}; {memories} hosts or GPUs, each counted once"


def _values(series: Series, unit: str) -> list[Any]:
    """Return the name, unit and values of a series for the page's script."""
    unit = f" {unit}" if unit in ("ms", "tokens/s", "GiB", "MiB", "KiB", "bytes") else ""
    return [series.name, unit, [None if math.isnan(v) else _rounded(v) for v in series.values.tolist()]]


def _reason_values(lanes: Mapping[str, Track], reasons: Sequence[str]) -> list[list[Any]]:
    """Return the share of each reason in percent for one lane, the most frequent reason of each for several."""
    if len(lanes) == 1:
        (track,) = lanes.values()
        return _shares(track.reasons, reasons)
    values = []
    for name, track in lanes.items():
        steps = np.array([track.reasons.get(reason, np.zeros_like(track.covered)) for reason in reasons])
        known = steps.sum(axis=0) > 0
        most = np.where(known, steps.argmax(axis=0), -1).tolist()
        values.append([name, "", [None if kind < 0 else kind for kind in most], list(reasons)])
    return values


def _shares(counts: Mapping[str, FloatArray], names: Sequence[str]) -> list[list[Any]]:
    """Return the share of each name in percent."""
    total = np.sum(list(counts.values()), axis=0)
    shares = {
        name: 100 * np.divide(count, total, out=np.zeros_like(total), where=total > 0) for name, count in counts.items()
    }
    return [[name, " %", [round(v) or None for v in shares[name].tolist()]] for name in names if name in shares]


def _reason_colours(tracks: Iterable[Track]) -> dict[str, str]:
    """Assign a colour to each reason that occurs, the most frequent first."""
    steps: Counter[str] = Counter()
    for track in tracks:
        steps.update({name: float(values.sum()) for name, values in track.reasons.items()})
    others = [name for name, _ in steps.most_common() if name not in _COLOURS]
    colours = _COLOURS | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
    return {name: colours[name] for name, _ in steps.most_common()}


def byte_unit(value: float) -> tuple[str, int]:
    """Return the name and the size in bytes of the unit to show ``value`` bytes in."""
    return next(((name, factor) for name, factor in _UNITS if value >= factor), _UNITS[-1])


def _rounded(value: float) -> float | int:
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() else rounded
