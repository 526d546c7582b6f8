"""The half of the page about the data: lengths, finish reasons, rewards, errors, and samples to read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rollout.report.chart_specs import FINISH_COLOURS
from rollout.report.data_statistics import MOST_BYTES, DataStatistics
from rollout.report.histogram import Stack, histogram
from rollout.report.prompt_text import other_columns, prompt_text
from rollout.report.samples_to_read import SamplePicker, SampleToRead
from rollout.report.svg import rounded
from rollout.report.tables import table

_LONGEST_TEXT = 6000
"""Most characters of a prompt or completion on the page."""
_LONGEST_CELL = 240


def data_section(statistics: DataStatistics, picker: SamplePicker, prompt_column: str, over_time: str) -> str:
    """Draw the data half of the page.

    Args:
        prompt_column: ``data.prompt_column``.
        over_time: charts of finished samples over time, which stand between lengths and rewards.
    """
    if not statistics.samples:
        return f"<h2>Data</h2>\n{_notes(statistics)}"
    return "".join(
        (
            f"<h2>Data</h2>\n{_notes(statistics)}",
            _lengths(statistics),
            over_time,
            _rewards(statistics),
            _prompts(picker, prompt_column),
            _errors(statistics, picker),
            _samples(picker.samples(), prompt_column),
        )
    )


def _notes(statistics: DataStatistics) -> str:
    notes = []
    if not statistics.samples:
        notes.append("No sample is finished yet.")
    if statistics.skipped_files:
        shards = statistics.files + statistics.skipped_files
        notes.append(
            f"This half is drawn from {statistics.files:,} of {shards:,} shards at equal distances, "
            f"{statistics.samples:,} samples: the run has more than {MOST_BYTES >> 30} GiB of records."
        )
    notes += [f"Not read: {name} ({reason})." for name, reason in statistics.unreadable.items()]
    return f'<p class="note">{escape(" ".join(notes))}</p>\n' if notes else ""


# -- lengths and finish reasons ----------------------------------------------------------------------------


def _lengths(statistics: DataStatistics) -> str:
    lengths = statistics.completion_lengths
    ordered = sorted(lengths, key=lambda name: ([*FINISH_COLOURS, name].index(name), name))
    stacks = [Stack(name, FINISH_COLOURS.get(name, "teal"), lengths[name]) for name in ordered]
    completions: Counter[int] = Counter()
    for name, counts in lengths.items():
        if name != "error":
            completions.update(counts)
    rewarded = statistics.rewarded.total() > 0
    rows = [
        [
            name,
            f"{lengths[name].total():,}",
            share(lengths[name].total(), statistics.samples),
            _mean(sum(length * count for length, count in lengths[name].items()), lengths[name].total()),
            *([_mean(statistics.reward_sums[name], statistics.rewarded[name])] if rewarded else []),
        ]
        for name in ordered
    ]
    return (
        histogram("Completion length", _quantiles("tokens", completions), stacks, "samples")
        + histogram(
            "Prompt length",
            _quantiles("tokens", statistics.prompt_lengths),
            [Stack("", "blue", statistics.prompt_lengths)],
            "prompts",
        )
        + table(("finish reason", "samples", "share", "mean tokens", *(["mean reward"] if rewarded else [])), rows)
    )


def _quantiles(unit: str, counts: Counter[int]) -> str:
    """Return the unit of a histogram, with the median, the 95th percentile and the largest value."""
    if not counts:
        return unit
    middle, most = (_quantile(counts, q) for q in (0.5, 0.95))
    return f"{unit}; median {middle:,}, p95 {most:,}, longest {max(counts):,}"


def _quantile(counts: Counter[int], q: float) -> int:
    left = q * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


# -- rewards -------------------------------------------------------------------------------------------


def _rewards(statistics: DataStatistics) -> str:
    rewarded = statistics.rewarded.total()
    if not rewarded:
        return ""
    total = sum(statistics.reward_sums.values())
    mean = total / rewarded
    deviation = math.sqrt(max(0.0, statistics.reward_squares / rewarded - mean * mean))
    unit = f"mean {rounded(mean)}, standard deviation {rounded(deviation)}, {rewarded:,} samples"
    drawn = histogram("Reward", unit, [Stack("", "purple", statistics.rewards)], "samples")
    return f"<h2>Rewards</h2>\n{drawn}{_groups(statistics)}"


def _groups(statistics: DataStatistics) -> str:
    """Draw rewards by prompt; empty if no prompt has several samples with a reward."""
    groups, prompts = statistics.groups, statistics.groups.prompts
    if not prompts:
        return ""
    low, high = min(statistics.rewards), max(statistics.rewards)
    kinds = {
        f"always {rounded(low)}, the lowest": groups.constant[low],
        f"always {rounded(high)}, the highest": groups.constant[high] if high != low else 0,
        "always the same in between": groups.constant.total() - sum(groups.constant[value] for value in {low, high}),
        "different between samples": groups.mixed,
    }
    rows = [[kind, f"{count:,}", share(count, prompts)] for kind, count in kinds.items() if count]
    same = share(groups.constant.total(), prompts)
    return (
        histogram("Mean reward of a prompt", f"{prompts:,} prompts", [Stack("", "purple", groups.means)], "prompts")
        + table(("rewards of a prompt's samples", "prompts", "share"), rows)
        + f'<p class="note">{same} of the prompts have the same reward in all samples, which gives group-relative '
        f"advantages of 0. The mean standard deviation within a prompt is "
        f"{rounded(groups.deviation_sum / prompts)}.</p>\n"
    )


def _prompts(picker: SamplePicker, prompt_column: str) -> str:
    """List some prompts of low, mixed and high reward."""
    rows = [
        [
            one.why,
            rounded(one.value) if one.why != "widest spread" else f"± {rounded(one.value)}",
            clipped(prompt_text(one.record, prompt_column), _LONGEST_CELL),
        ]
        for one in picker.prompts()
    ]
    return table(("chosen for", "reward", "prompt"), rows) if rows else ""


# -- errors --------------------------------------------------------------------------------------------


def _errors(statistics: DataStatistics, picker: SamplePicker) -> str:
    if not statistics.errors:
        return ""
    examples = picker.errors()
    rows = []
    for name, count in statistics.errors.most_common():
        texts = {
            clipped(str(one.record.get("error")), _LONGEST_CELL): str(one.record["row_id"]) for one in examples[name]
        }
        rows.append([name, f"{count:,}", share(count, statistics.samples), "\n".join(texts), ", ".join(texts.values())])
    return f"<h2>Errors</h2>\n{table(('class', 'samples', 'share', 'for example', 'row'), rows)}"


# -- samples -------------------------------------------------------------------------------------------


def _samples(samples: Sequence[SampleToRead], prompt_column: str) -> str:
    cards = "".join(_card(sample.why, sample.record, prompt_column) for sample in samples)
    return (
        "<h2>Samples to read</h2>\n"
        '<p class="note">Chosen at random with a fixed seed, or at random among those that a rule selects.</p>\n'
        f"{cards}"
    )


def _card(why: str, record: Mapping[str, Any], prompt_column: str) -> str:
    facts = {
        "row": f"{record['row_id']}, sample {record['sample']}",
        "finish reason": record["finish_reason"],
        "tokens": f"{len(record['completion_ids'] or ()):,}",
        "reward": "" if record.get("reward") is None else rounded(record["reward"]),
        "error": " ".join(str(record[name]) for name in ("error_class", "error") if record.get(name)),
    }
    texts = {
        "prompt": prompt_text(record, prompt_column),
        "reasoning": str(record.get("reasoning") or ""),
        "completion": str(record.get("text") or ""),
    }
    return (
        f'<article>\n<h3>{escape(why)}</h3>\n<p class="facts">{_named(facts.items())}</p>\n'
        + "".join(_block(name, text) for name, text in texts.items() if text or name == "completion")
        + (
            f'<p class="facts">{columns}</p>\n'
            if (columns := _named(other_columns(record, prompt_column).items()))
            else ""
        )
        + "</article>\n"
    )


def _named(facts: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"<span><b>{escape(name)}</b> {escape(text)}</span>" for name, text in facts if text)


def _block(name: str, text: str) -> str:
    shown = escape(clipped(text, _LONGEST_TEXT)) if text else "<i>empty</i>"
    return f'<div class="text"><b>{name}</b><pre dir="auto" tabindex="0">{shown}</pre></div>\n'


# -- formatting ------------------------------------------------------------------------------------------


def clipped(text: str, longest: int) -> str:
    """Return a text, or its beginning and how much is left out."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def share(part: float, total: float) -> str:
    """Format a share in percent."""
    if not total:
        return ""
    value = 100 * part / total
    return f"{value:.0f} %" if value >= 10 or part == 0 else f"{value:.2g} %"


def _mean(total: float, count: int) -> str:
    return rounded(total / count) if count else ""
