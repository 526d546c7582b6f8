"""Escapes in strings of a configuration, as shells and single-quoted YAML pass them on: two characters for one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_MEANINGS = {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\\\\": "\\"}
_ESCAPE = re.compile(r"\\[ntr\\]")


def understood_stops(stops: Sequence[str]) -> list[str]:
    """Return stop strings with a backslash and an n as a newline, and so on; say which were changed.

    In shell quotes ``sampling.stop=["\\n"]`` has a backslash and an n, which completions hardly ever contain.
    """
    understood = [_ESCAPE.sub(lambda found: _MEANINGS[found[0]], stop) for stop in stops]
    for written, meant in zip(stops, understood, strict=True):
        if written != meant:
            logger.info(
                "sampling.stop: '%s' is understood as %r; write two backslashes for a backslash of the text.",
                written,
                meant,
            )
    return understood
