"""The ladder of sizes that steps are captured in, and which of them are worth a capture."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple, Self

from torch import nn

from rollout.models.arrays import next_power_of_2
from rollout.models.forward_batch import ForwardBatch

EAGER_STEPS = 4
"""Steps of a size that run eagerly before it is captured. A capture takes as long as about three eager forwards of the
host's time, and each replay saves most of one."""
PADDED_STEPS = 16
"""Steps of a size that a larger graph replays before a graph of their own is captured: padding costs little."""
_LEAST_MIXED_TOKENS = 64
_LEAST_MIXED_LOGITS = 16
_LARGEST_MIXED_TOKENS = 4096
#: Multiplications by a weight that a data-center GPU does in the time that Python takes to launch one layer: about 0.4
#: ms, at some 500 TFLOPS.
_WEIGHTS_PER_LAUNCH = 1e11


class Rung(NamedTuple):
    """The size of a captured step, which serves all steps up to it."""

    tokens: int
    """New tokens, including padding."""
    logits: int
    """Sequences, including padding: rows of the logits."""
    mixed: bool
    """Whether sequences may have new tokens that are attended together."""

    @classmethod
    def of(cls, batch: ForwardBatch) -> Self:
        """Return the smallest rung that holds a batch: powers of two, since few sizes mean few captures.

        Without prefills, a rung has one token per sequence. With them it has a size in tokens and one in sequences, and
        each is at least what costs as much as a single one.
        """
        tokens, sequences = len(batch.tokens), len(batch.query_lens)
        if tokens == sequences and not len(batch.decode_lens):
            return cls(next_power_of_2(tokens), next_power_of_2(tokens), mixed=False)
        return cls(
            max(_LEAST_MIXED_TOKENS, next_power_of_2(tokens)),
            max(_LEAST_MIXED_LOGITS, next_power_of_2(sequences)),
            mixed=True,
        )

    def holds(self, other: Rung) -> bool:
        """Return whether a step of rung ``other`` fits."""
        return self.tokens >= other.tokens and self.logits >= other.logits and self.mixed >= other.mixed


def most_mixed_tokens(model: nn.Module, layers: int) -> int:
    """Return the largest step with prefills, in tokens, that is worth a graph: a power of two.

    An eager forward takes Python a time per layer that does not depend on its tokens, while the device's time grows
    with tokens times weights. Beyond the tokens at which the two are equal, the device is never idle, so a graph saves
    nothing, and its padding would cost up to as much again. Models of 0.5, 1.5, 8 and 70 billion parameters get about
    4,096, 2,048, 512 and 128 tokens.

    Args:
        model: the model.
        layers: its layers with attention.
    """
    per_layer = sum(parameter.numel() for parameter in model.parameters()) / max(1, layers)
    tokens = _WEIGHTS_PER_LAUNCH / max(1.0, per_layer)
    return min(_LARGEST_MIXED_TOKENS, 1 << max(0, round(math.log2(tokens))))


class Ladder:
    """Counts steps by rung, and says which graphs may serve a step and which rungs are worth a capture.

    Args:
        most_mixed_tokens: see the function of this name.
    """

    def __init__(self, most_mixed_tokens: int) -> None:
        self._most_mixed_tokens = most_mixed_tokens
        self._steps: Counter[Rung] = Counter()

    def captures(self, rung: Rung) -> bool:
        """Return whether graphs of a rung pay at all."""
        return not rung.mixed or rung.tokens <= self._most_mixed_tokens

    def serves(self, captured: Rung, rung: Rung) -> bool:
        """Return whether a graph of rung ``captured`` may replay a step of ``rung``: its padding must not cost more."""
        return captured.holds(rung) and captured.tokens <= max(self._most_mixed_tokens, 2 * rung.tokens)

    def is_due(self, rung: Rung, served: bool) -> bool:
        """Count a step; return whether its rung has had enough of them for a capture.

        Args:
            rung: of the step.
            served: whether a larger graph can replay the step.
        """
        self._steps[rung] += 1
        return self._steps[rung] > (PADDED_STEPS if served else EAGER_STEPS)
