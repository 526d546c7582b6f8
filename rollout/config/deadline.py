"""The forms of ``job.deadline``."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

FORMS = "seconds (5400), a duration (1h30m or 01:30:00), a time to come (2026-11-30T06:00 or T06:00), or null"

_SECONDS = re.compile(r"\d+(\.\d+)?")
_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


def seconds_until(text: str, now: datetime) -> float | None:
    """Return the seconds from ``now``, a time with its zone, until a deadline; None if it has no form that can be read.

    They are negative if it has passed. Times without a zone are those of ``now``'s; ``T06:00`` is the next one.
    """
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    match = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text.replace(" ", ""))
    if match is not None and any(match.groups()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        try:
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
        except OverflowError:
            return None
    try:
        if text.startswith("T"):
            at = datetime.combine(now.date(), time.fromisoformat(text))
            at = at if at.tzinfo is not None else at.replace(tzinfo=now.tzinfo)
            return (at - now).total_seconds() % timedelta(days=1).total_seconds()
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return ((at if at.tzinfo is not None else at.replace(tzinfo=now.tzinfo)) - now).total_seconds()
