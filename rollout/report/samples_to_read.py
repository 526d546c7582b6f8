"""Choose the samples and prompts that a reader should see: by rule and at random with a fixed seed, never by hand."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollout.report.record_files import RecordFile, UnreadableFile, read_records

RANDOM = 4
"""Samples chosen at random, besides those chosen by a rule."""
ERRORS = 3
"""Examples per class of error."""
PROMPTS = 3
"""Prompts per kind."""
_MEDIAN_OF = 501
"""The sample of median length is that of this many random samples."""
_ALTERNATIVES = 8
"""Candidates per rule, of which the first that is not shown already is taken."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Candidate(NamedTuple):
    """A record that a rule may choose; the least one is chosen."""

    score: float
    tie: float
    """Random, so that a rule does not prefer the first of equals."""
    file: RecordFile
    row: int
    """Position in the file."""
    value: float
    """What the rule is about: a length, a reward, a deviation."""


@dataclass(slots=True)
class Shortlist:
    """The candidates of least score among all that are offered."""

    size: int
    best: list[Candidate] = field(default_factory=list)
    """In order."""

    def offer(self, file: RecordFile, rows: IntArray, scores: FloatArray, ties: FloatArray, values: FloatArray) -> None:
        """Offer records of a file; arrays are [records]."""
        if len(self.best) == self.size:
            near = np.flatnonzero(scores <= self.best[-1].score)
            rows, scores, ties, values = rows[near], scores[near], ties[near], values[near]
        order = np.lexsort((ties, scores))[: self.size]
        columns = (column[order].tolist() for column in (scores, ties, rows, values))
        new = (Candidate(score, tie, file, row, value) for score, tie, row, value in zip(*columns, strict=True))
        self.best = heapq.nsmallest(self.size, [*self.best, *new])


@dataclass(frozen=True, slots=True)
class SampleToRead:
    """A record, and the rule that chose it."""

    why: str
    record: dict[str, Any]
    value: float


class SamplePicker:
    """Choose samples and prompts from records that are offered batch by batch."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._random = Shortlist(_MEDIAN_OF)
        names = ("shortest completion", "longest completion", "highest reward", "lowest reward", "cut off at the limit")
        self._by_rule = {name: Shortlist(_ALTERNATIVES) for name in names}
        self._errors: dict[str, Shortlist] = {}
        kinds = ("lowest mean reward", "widest spread", "highest mean reward")
        self._prompts = {kind: Shortlist(PROMPTS * len(kinds)) for kind in kinds}

    def add(
        self,
        file: RecordFile,
        start: int,
        *,
        lengths: IntArray,
        rewards: FloatArray,
        reasons: dict[str, IntArray],
        errors: dict[str, IntArray],
    ) -> None:
        """Offer consecutive records of a file.

        Args:
            start: position of the first.
            lengths: [records] tokens of each completion.
            rewards: [records], NaN where there is none.
            reasons: positions within the batch, by finish reason.
            errors: the same by class of error.
        """
        ties = self._rng.random(len(lengths))

        def offer(shortlist: Shortlist, these: IntArray, scores: FloatArray, values: FloatArray) -> None:
            shortlist.offer(file, start + these, scores[these], ties[these], values[these])

        sizes = lengths.astype(np.float64)
        failed = reasons.get("error", np.empty(0, np.int64))
        completed = np.setdiff1d(np.arange(len(lengths)), failed, assume_unique=True)
        offer(self._random, np.arange(len(lengths)), ties, sizes)
        offer(self._by_rule["shortest completion"], completed, sizes, sizes)
        offer(self._by_rule["longest completion"], completed, -sizes, sizes)
        rewarded = np.flatnonzero(~np.isnan(rewards))
        offer(self._by_rule["highest reward"], rewarded, -rewards, rewards)
        offer(self._by_rule["lowest reward"], rewarded, rewards, rewards)
        offer(self._by_rule["cut off at the limit"], reasons.get("length", np.empty(0, np.int64)), ties, sizes)
        for name, these in errors.items():
            if name:
                offer(self._errors.setdefault(name, Shortlist(_ALTERNATIVES)), these, ties, sizes)

    def add_prompts(self, file: RecordFile, rows: IntArray, *, means: FloatArray, deviations: FloatArray) -> None:
        """Offer the prompts of a file.

        Args:
            rows: [prompts] position of one record of each.
            means: [prompts] mean reward of its samples.
            deviations: [prompts] their standard deviation.
        """
        ties = self._rng.random(len(rows))
        scores = {"lowest mean reward": means, "widest spread": -deviations, "highest mean reward": -means}
        for kind, score in scores.items():
            values = deviations if kind == "widest spread" else means
            self._prompts[kind].offer(file, rows, score, ties, values)

    def samples(self) -> list[SampleToRead]:
        """Read the chosen samples; at most twelve, none twice."""
        rules: list[tuple[str, list[Candidate]]] = [("random", self._random.best)] * RANDOM
        by_length = sorted(self._random.best, key=lambda candidate: candidate.value)
        rules.append(("median length", by_length[len(by_length) // 2 :]))
        rewards = [self._by_rule[name].best for name in ("lowest reward", "highest reward")]
        constant = not all(rewards) or rewards[0][0].value == rewards[1][0].value
        rules += [
            (name, shortlist.best)
            for name, shortlist in self._by_rule.items()
            if not (constant and name.endswith("reward"))
        ]
        rules += [(f"error {name}", shortlist.best) for name, shortlist in list(self._errors.items())[:2]]
        return _read(_first_unused(rules))

    def errors(self) -> dict[str, list[SampleToRead]]:
        """Read examples of each class of error."""
        return {
            name: _read([(name, one) for one in shortlist.best[:ERRORS]]) for name, shortlist in self._errors.items()
        }

    def prompts(self) -> list[SampleToRead]:
        """Read a sample of each chosen prompt; no prompt twice, and none for a value that all prompts have."""
        lowest, widest, highest = (shortlist.best for shortlist in self._prompts.values())
        worthy = (
            [one for one in lowest if one.value < highest[0].value],
            [one for one in widest if one.value > 0],
            [one for one in highest if one.value > lowest[0].value],
        )
        rules = list(zip(self._prompts, worthy, strict=True))
        chosen = _read(_first_unused(rules * PROMPTS))
        return sorted(chosen, key=lambda one: list(self._prompts).index(one.why))


def _first_unused(rules: Sequence[tuple[str, list[Candidate]]]) -> list[tuple[str, Candidate]]:
    """Return the best candidate of each rule that no rule before has taken."""
    used: set[tuple[RecordFile, int]] = set()
    chosen = []
    for why, candidates in rules:
        for candidate in candidates:
            if (candidate.file, candidate.row) not in used:
                used.add((candidate.file, candidate.row))
                chosen.append((why, candidate))
                break
    return chosen


def _read(chosen: Sequence[tuple[str, Candidate]]) -> list[SampleToRead]:
    """Read the records of candidates; a file that has gone since then is left out."""
    records: dict[tuple[RecordFile, int], dict[str, Any]] = {}
    for file in {candidate.file for _, candidate in chosen}:
        rows = {candidate.row for _, candidate in chosen if candidate.file == file}
        try:
            records.update({(file, row): record for row, record in read_records(file, rows).items()})
        except UnreadableFile:
            continue
    return [
        SampleToRead(why, records[candidate.file, candidate.row], candidate.value)
        for why, candidate in chosen
        if (candidate.file, candidate.row) in records
    ]
