"""Name what a mistyped name most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NEAR = 0.65


def near_name(wrong: str, names: Iterable[str]) -> str | None:
    """Return the name that ``wrong`` most likely means, or None if none is near.

    Case, ``_``, ``-`` and spaces do not count, and neither does an ending that was left out.
    """
    plain = {_plain(name): name for name in names}
    typed = _plain(wrong)
    if typed in plain:
        return plain[typed]
    if len(typed) >= 3:
        begun = [name for text, name in plain.items() if text.startswith(typed)]
        if len(begun) == 1:
            return begun[0]
    close = difflib.get_close_matches(typed, plain, n=1, cutoff=_NEAR)
    return plain[close[0]] if close else None


def describe_names(wrong: str, names: Iterable[str]) -> str:
    """Return which name ``wrong`` may mean, and which there are, as the end of a sentence."""
    known = list(names)
    if not known:
        return "it has none"
    near = near_name(wrong, known)
    return f"the nearest is {near!r} (known: {', '.join(known)})" if near else f"known: {', '.join(known)}"


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "_- ")
