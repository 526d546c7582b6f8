"""In which order rows that wait are admitted: rows of a prompt together, long ones early enough."""

from __future__ import annotations

import math

import numpy as np

from rollout.batcher.types import FloatArray, IntArray

# A row is started early enough to last so many times what is expected, were the expectation right: to be early by a
# row's length costs less than to be alone at the end.
_CAUTION = 2.0
# It is started earlier by so many standard deviations of what lengths turn out to be about their expectations.
_DEVIATIONS = 3.0
# Until so many rows have ended, expectations are taken to be right.
_BELIEVED_UNTIL = 16
# Expectations are of use when their slope is so many standard errors above zero.
_CERTAINTY = 3.0
# Rows are arranged anew when slope or error have changed by so much.
_CHANGE = 0.1
_KEEP = 1 - 1 / 4096


def together(groups: IntArray) -> IntArray:
    """The order of arrival, but for rows of a group, which follow the first of theirs. Indices, [rows]."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def steady_rows(kv_tokens: int, prompt_tokens: IntArray, output_tokens: FloatArray) -> float:
    """Rows that memory holds when rows of all ages live: each takes E[prompt] + E[output^2] / (2 E[output])."""
    return float(kv_tokens / (prompt_tokens.mean() + (output_tokens**2).mean() / (2 * output_tokens.mean())))


def early_enough(groups: IntArray, expected_tokens: FloatArray, rows: float, caution: float = _CAUTION) -> IntArray:
    """The order of arrival, but long rows before their latest start, so that none is left alone at the end.

    With so many rows alive, a job takes about T = sum(expected) / rows steps, and a row of expected length l should
    start within the first s = T - caution * l of them. Where s is positive, the key is its share of the arrivals times
    s: start times are spread evenly over what each row may choose from. So what is nearly as long as the job goes
    first, longest before, short rows keep their place, and at the end only short ones are left; until then the mix of
    lengths stays what it is. Longest-first order does not leave it so: memory then holds long rows only, and whoever
    learns lengths while the job runs is misled. The more caution, the nearer is this order to that one.

    Rows of a group go together, as early as the longest of them should. Rows of which nothing is expected (NaN) count
    as the mean of the others, and without any expectation the order is that of `together`.

    Args:
        groups: [rows] equal in rows with the same prompt.
        expected_tokens: [rows] outputs to come, NaN where nobody knows.
        rows: that live at a time, about.
        caution: how many times its expectation a row may last without being alone at the end.

    Returns:
        [rows] indices, first to be admitted first.
    """
    known = ~np.isnan(expected_tokens)
    if not known.any():
        return together(groups)
    lengths = np.where(known, expected_tokens, expected_tokens[known].mean())
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    of_group = np.zeros(int(inverse.max()) + 1)
    np.maximum.at(of_group, inverse, lengths)
    slack = lengths.sum() / max(rows, 1.0) - caution * of_group
    arrived = (np.argsort(np.argsort(first)) + 1) / len(first)
    keys = np.where(slack > 0, arrived * slack, slack)
    return np.lexsort((np.arange(len(groups)), first[inverse], keys[inverse]))


class Ordering:
    """`early_enough` with expectations that are corrected, and doubted, as rows end.

    Of the rows that have ended, the logarithm of the length is regressed on that of the expectation: log(length) =
    a + b * log(expected), with residuals of standard deviation s. What is expected of others is corrected by that (so
    hints may be in words, or half of the truth), and the caution is 2 * exp(3 * s): with right hints long rows are
    spread over the time that they may start in, with vague ones the longest go first, for any of them may be longer
    still. Where b is not clearly above zero, the hints tell nothing and the order is that of arrival.

    Until 16 rows have ended, expectations are taken to be right. Short rows end first, so that a young regression
    doubts too much; but the end of the job, for which the order matters, is arranged by an old one.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(6)
        """Of 1, x, y, x * x, x * y, y * y over the rows that ended; old ones fade."""
        self._seen = 0
        self._next_look = 0
        self._used: tuple[float, float] | None = None
        """b and s of the last order."""

    def learn(self, expected_tokens: float, tokens: int) -> None:
        """A row has ended; NaN was expected of it where nobody knew."""
        if math.isnan(expected_tokens):
            return
        x, y = math.log(max(1.0, expected_tokens)), math.log(max(1, tokens))
        self._sums *= _KEEP
        self._sums += (1.0, x, y, x * x, x * y, y * y)
        self._seen += 1

    def changed(self) -> bool:
        """Whether what was learned since the last `order` calls for another one; looked at from time to time."""
        if self._seen < self._next_look:
            return False
        self._next_look = max(_BELIEVED_UNTIL, self._seen + max(8, self._seen // 8))
        _, b, error = self._fitted()
        return self._used is None or max(abs(b - self._used[0]), abs(error - self._used[1])) > _CHANGE

    def order(
        self,
        groups: IntArray,
        prompt_tokens: IntArray,
        expected_tokens: FloatArray,
        kv_tokens: int,
        most_rows: float = math.inf,
    ) -> IntArray:
        """See `early_enough`.

        Args:
            groups, prompt_tokens, expected_tokens: [rows] of those that wait.
            kv_tokens: that memory holds.
            most_rows: that live at a time, whatever memory holds.
        """
        a, b, error = self._fitted()
        self._used = b, error
        known = ~np.isnan(expected_tokens)
        if not b or not known.any():
            return together(groups)
        corrected = np.exp(a + b * np.log(np.maximum(1.0, expected_tokens)) + error**2 / 2)
        rows = min(steady_rows(kv_tokens, prompt_tokens, corrected[known]), most_rows)
        return early_enough(groups, corrected, rows, _CAUTION * math.exp(_DEVIATIONS * error))

    def _fitted(self) -> tuple[float, float, float]:
        """a, b and s; b is 0 where expectations tell nothing."""
        if self._seen < _BELIEVED_UNTIL:
            return 0.0, 1.0, 0.0
        n = self._sums[0]
        x, y, xx, xy, yy = (self._sums[1:] / n).tolist()
        spread, common = xx - x * x, xy - x * y
        if spread < 1e-9:
            return 0.0, 0.0, 0.0
        b = common / spread
        variance = max(0.0, yy - y * y - b * common) * n / (n - 2)
        if b <= _CERTAINTY * math.sqrt(variance / (n * spread)):
            return 0.0, 0.0, 0.0
        return y - b * x, b, math.sqrt(variance)
