"""Apply token rules to logits: allowed ids, bad words, biases and bans, penalties, in vLLM's order.

Each operation reads and writes only the entries of the logits that its rules name. Entries named twice get the same
value twice, so the result does not depend on the order of writes, nor on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded
from rollout.models.sampling.token_history import TokenHistory
from rollout.models.sampling.token_rules import ANY, RuleTables, TokenRules

_CHUNK_ROWS = 256
"""Rows whose logits are copied at a time, which bounds the memory of the copies."""
_CHUNK_ROWS_CPU = 16
"""The same on a CPU, so that the copies stay in cache between the operations."""
_OUTSIDE = -3
"""Stands before the first token of a context; no rule names it."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of c rows, each of shape [c, 1] float32, and the history that they look back on."""

    history: TokenHistory
    host_rows: IntArray
    """[c] rows of the history."""
    rows: torch.Tensor
    """[c] the same on the device."""
    ordered: torch.Tensor
    """[c] int64, see `TokenHistory.ordered`."""
    outputs: torch.Tensor
    """[c] int64, see `TokenHistory.outputs`."""
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    counted: bool
    """Whether any row has a presence or a frequency penalty."""
    penalised: bool
    """Whether any row has a penalty; the others have bad words only."""

    @classmethod
    def of(cls, rules: Sequence[TokenRules], history: TokenHistory, rows: IntArray, device: torch.device) -> Penalties:
        """Copy the penalties of c rows to ``device``."""
        values = np.array(
            [[rule.repetition_penalty, rule.presence_penalty, rule.frequency_penalty] for rule in rules], np.float32
        )
        repetition, presence, frequency = uploaded(values, device).split(1, dim=1)
        on_device, ordered, outputs = uploaded(np.stack((rows, history.ordered[rows], history.outputs[rows])), device)
        return cls(
            history=history,
            host_rows=rows,
            rows=on_device,
            ordered=ordered,
            outputs=outputs,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            counted=any(rule.counted for rule in rules),
            penalised=any(rule.counted or rule.repetition_penalty != 1 for rule in rules),
        )

    def append(self, tokens: torch.Tensor) -> None:
        """Append the [c] drawn tokens to the history."""
        self.history.append(self.host_rows, self.rows, tokens, self.counted)

    def last_tokens(self, count: int, positions: torch.Tensor) -> torch.Tensor:
        """Return [c, count] the last tokens of each text; `_OUTSIDE` before its beginning."""
        ends = self.outputs + positions
        at = ends[:, None] - torch.arange(count, 0, -1, device=ends.device)
        tokens = self.history.ids[self.rows[:, None], at.clamp(min=0)]
        return torch.where(at >= self.ordered[:, None], tokens, _OUTSIDE)

    def apply(self, scores: torch.Tensor) -> None:
        """Penalise, in place, the tokens of the history in ``scores`` [c, V]."""
        width = self.history.width
        if not (self.penalised and width):
            return
        ids, counts = self.history.ids[self.rows, :width], self.history.counts[self.rows, :width]
        values = scores.gather(1, ids)
        values = torch.where(values > 0, values / self.repetition, values * self.repetition)
        values = values - self.frequency * counts - self.presence * (counts > 0)
        scores.scatter_(1, ids, values)


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Token rules of c rows of a batch: either all rows or none have allowed ids, and likewise a history."""

    members: IntArray
    """[c] indices of the rows in the batch."""
    at: torch.Tensor
    """[c] int64, the same on the device."""
    rule: torch.Tensor
    """[c] int64, index of each row's rules in ``tables``."""
    tables: RuleTables
    allow: bool
    penalties: Penalties | None

    def apply(self, scores: torch.Tensor, positions: torch.Tensor) -> None:
        """Edit, in place, the float32 logits [c, V] of rows that have [c] ``positions`` tokens already."""
        if self.allow:
            ids = self.tables.allowed[self.rule]
            allowed = scores.gather(1, ids)
            scores.fill_(-torch.inf).scatter_(1, ids, allowed)
        if self.penalties is not None and self.tables.lasts.shape[1]:
            prefixes = self.tables.prefixes[self.rule]
            context = self.penalties.last_tokens(prefixes.shape[-1], positions)
            complete = ((prefixes == context[:, None]) | (prefixes == ANY)).all(-1)
            # Words with the same last token meet in one entry, where the smallest value wins.
            bans = torch.where(complete, -torch.inf, torch.inf)
            scores.scatter_reduce_(1, self.tables.lasts[self.rule], bans, "amin")
        if self.tables.ids.shape[1]:
            ids = self.tables.ids[self.rule]
            biased = scores.gather(1, ids) + self.tables.bias[self.rule]
            scores.scatter_(1, ids, biased.masked_fill(positions[:, None] < self.tables.until[self.rule], -torch.inf))
        if self.penalties is not None:
            self.penalties.apply(scores)

    def append(self, tokens: torch.Tensor) -> None:
        """Append the drawn tokens [B] of the batch to the histories."""
        if self.penalties is not None:
            self.penalties.append(tokens[self.at])


def logit_edits(
    rules: Sequence[TokenRules | None], history: TokenHistory, rows: IntArray, device: torch.device
) -> list[LogitEdits]:
    """Group the rows of a batch that have rules into chunks, and copy the rules to ``device``.

    Args:
        rules: [B] rules of each row, None where it has none; equal rules are one object.
        history: history of the rows that need one.
        rows: [B] row in ``history``; ignored where the rules need none.
    """
    chunk = _CHUNK_ROWS_CPU if device.type == "cpu" else _CHUNK_ROWS
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, rule in enumerate(rules):
        if rule is not None:
            kinds.setdefault((len(rule.allowed) > 0, rule.needs_history), []).append(i)
    edits = []
    for (allow, looks_back), members in kinds.items():
        chosen = [rule for i in members if (rule := rules[i]) is not None]
        distinct = {id(rule): rule for rule in chosen}
        number = {key: i for i, key in enumerate(distinct)}
        tables = RuleTables.of(list(distinct.values()), device)
        for start in range(0, len(members), chunk):
            part = np.array(members[start : start + chunk], np.int64)
            own = chosen[start : start + chunk]
            edits.append(
                LogitEdits(
                    members=part,
                    at=uploaded(part, device),
                    rule=uploaded(np.array([number[id(rule)] for rule in own], np.int64), device),
                    tables=tables,
                    allow=allow,
                    penalties=Penalties.of(own, history, rows[part], device) if looks_back else None,
                )
            )
    return edits
