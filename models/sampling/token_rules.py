"""Rules on the tokens that a row may draw: bans, biases and penalties, as arrays on the host and tables on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.models.arrays import IntArray, uploaded

ALWAYS = np.iinfo(np.int64).max
"""Position until which a token is banned for good."""
ANY = -1
"""Matches every token of a context."""
NEVER = -2
"""Matches no token of a context."""
_NO_IDS: IntArray = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRules:
    """What one row's sampling parameters do to its logits before temperature and filters."""

    allowed: IntArray
    """[A] the only ids that may be drawn; [0] if all may."""
    ids: IntArray
    """[E] ids with a bias or a ban, each once."""
    bias: NDArray[np.float32]
    """[E] added to the logit."""
    until: IntArray
    """[E] position in the completion before which the id is banned."""
    prefixes: IntArray
    """[W, K] all but the last token of bad words of several tokens, `ANY` before the shorter ones."""
    lasts: IntArray
    """[W] the last token of each of them."""
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float

    @property
    def counted(self) -> bool:
        """Whether the rules depend on how often the completion has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_history(self) -> bool:
        """Whether the rules depend on the tokens drawn so far."""
        return self.repetition_penalty != 1 or self.counted or len(self.lasts) > 0

    def leaves_nothing(self, vocabulary: int) -> bool:
        """Return whether no token of a vocabulary may be drawn at some position, whatever the context."""
        banned = self.ids[(self.until > 0) | (self.bias == -np.inf)]
        if len(self.allowed):
            return bool(np.isin(self.allowed, banned).all())
        return len(banned) >= vocabulary


def token_rules(
    *,
    allowed: Sequence[int] = (),
    bias: Mapping[int, float],
    bad_words: Iterable[Sequence[int]] = (),
    stop_ids: Iterable[int] = (),
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> TokenRules | None:
    """Build the rules of a row; return None if they change nothing.

    Args:
        allowed: the only ids that may be drawn; empty: all.
        bias: added to the logits of ids; -inf is a ban.
        bad_words: token-id sequences, none empty, of which the last token is not drawn after the others.
        stop_ids: ids that are not drawn before ``min_new_tokens`` tokens.
    """
    words = sorted({tuple(word) for word in bad_words})
    until = dict.fromkeys(stop_ids, min_new_tokens) if min_new_tokens else {}
    until |= dict.fromkeys((word[0] for word in words if len(word) == 1), ALWAYS)
    ids = sorted(until.keys() | {i for i, value in bias.items() if value != 0})
    words = [word for word in words if len(word) > 1]
    longest = max((len(word) for word in words), default=1)
    rules = TokenRules(
        allowed=np.array(sorted(set(allowed)), np.int64),
        ids=np.array(ids, np.int64),
        bias=np.array([bias.get(i, 0.0) for i in ids], np.float32),
        until=np.array([until.get(i, 0) for i in ids], np.int64),
        prefixes=np.array([(ANY,) * (longest - len(word)) + word[:-1] for word in words], np.int64).reshape(
            len(words), longest - 1
        ),
        lasts=np.array([word[-1] for word in words], np.int64),
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    return rules if rules.needs_history or len(rules.allowed) or len(rules.ids) else None


@dataclass(frozen=True, slots=True)
class RuleTables:
    """R different rules on a device, padded to equal lengths.

    Padding repeats an entry of the same rule, or changes nothing: it never conflicts with another entry.
    """

    allowed: torch.Tensor
    """[R, A] int64."""
    ids: torch.Tensor
    """[R, E] int64."""
    bias: torch.Tensor
    """[R, E] float32."""
    until: torch.Tensor
    """[R, E] int64."""
    prefixes: torch.Tensor
    """[R, W, K] int64."""
    lasts: torch.Tensor
    """[R, W] int64."""

    @classmethod
    def of(cls, rules: Sequence[TokenRules], device: torch.device) -> RuleTables:
        """Copy the rules to ``device``."""

        def table(rows: Sequence[NDArray[np.generic]]) -> torch.Tensor:
            return uploaded(_padded(rows), device)

        words, longest = max(len(rule.lasts) for rule in rules), max(rule.prefixes.shape[1] for rule in rules)
        prefixes = np.full((len(rules), words, longest), NEVER, np.int64)
        for row, rule in zip(prefixes, rules, strict=True):
            count, length = rule.prefixes.shape
            row[:count] = ANY
            row[:count, longest - length :] = rule.prefixes
        return cls(
            allowed=table([rule.allowed for rule in rules]),
            ids=table([rule.ids for rule in rules]),
            bias=table([rule.bias for rule in rules]),
            until=table([rule.until for rule in rules]),
            prefixes=uploaded(prefixes, device),
            lasts=table([rule.lasts for rule in rules]),
        )


def _padded(rows: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Stack arrays of different lengths, each continued by its first item, or by 0 if it has none."""
    padded = np.zeros((len(rows), max(map(len, rows))), rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        if len(row):
            target[:] = row[0]
            target[: len(row)] = row
    return padded
