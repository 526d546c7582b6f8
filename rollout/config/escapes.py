"""Escapes in strings of a configuration, as shells and single-quoted YAML pass them on: two characters for one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_MEANINGS = {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\\\\": "\\"}
_ESCAPE = re.compile(r"\\[ntr\\]")
_EATEN = re.compile(r"n+|t|r")
"""What is left of line breaks and tabs that stood outside of quotes."""
_LINE_BREAK = re.compile(r"(?<!\\)\\n(?!eq|abla|ot|u\b|i\b|e\b|ewcommand)")


def understood_stops(stops: Sequence[str]) -> list[str]:
    """Return stop strings with a backslash and an n as a newline, and so on; say which were changed.

    In shell quotes ``sampling.stop=["\\n"]`` has a backslash and an n, which completions hardly ever contain.
    """
    understood = [_ESCAPE.sub(lambda found: _MEANINGS[found[0]], stop) for stop in stops]
    for written, meant in zip(stops, understood, strict=True):
        if written != meant:
            logger.info(
                "sampling.stop: in '%s' a backslash and a letter are understood as the character %r; write two "
                "backslashes for a backslash of the text.",
                written,
                meant,
            )
    return understood


def warn_about_escapes(stops: Sequence[str], system_prompt: str | None) -> None:
    """Warn about line breaks that a shell has removed, or passed on as two characters.

    Args:
        stops: as `understood_stops` returns them.
        system_prompt: in which LaTeX may have a backslash and an n as well.
    """
    for stop in filter(_EATEN.fullmatch, stops):
        logger.warning(
            "sampling.stop: %r stops at this letter; for a line break, whose backslash the shell removes outside of "
            "quotes, write 'sampling.stop=[\"\\n\"]'.",
            stop,
        )
    if system_prompt and _LINE_BREAK.search(system_prompt):
        logger.warning(
            "data.system_prompt has a backslash and an n, which stay two characters: for a line break write "
            "$'data.system_prompt=\"Line 1\\nLine 2\"'."
        )
