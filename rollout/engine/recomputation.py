"""How many generated tokens one forward computes again one by one, which takes memory for each."""

from __future__ import annotations

from rollout.models.kv_cache.layout import KVLayout

MOST_KEYS = 1 << 22
"""Keys that such tokens of a forward attend to, counted for each token.

Attention keeps partial results of each token and 256 keys: with 32 heads of 128 numbers in float32 they take 270 MB.
"""


class Recomputation:
    """Limits the chunks of one forward, where the layout says that generated tokens are decoded apart.

    Args:
        layout: of the keys and values.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._limited = layout.decodes_apart
        self._keys = MOST_KEYS

    def take(self, start: int, tokens: int, prompt: int) -> int:
        """Return how many of the next ``tokens`` of a sequence the forward computes, and count them.

        The first sequence of a forward gets at least one.

        Args:
            start: tokens of the sequence that are computed.
            prompt: its tokens that are not generated.
        """
        together = max(0, prompt - start)
        if not self._limited or tokens <= together:
            return tokens
        end = start + tokens
        least = 1 if self._keys == MOST_KEYS else 0
        apart = min(tokens - together, max(least, self._keys // end))
        self._keys -= apart * end
        return together + apart
