"""The forms in which a job's deadline is given."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from rollout.config.compose import load_config
from rollout.config.deadline import seconds_until
from rollout.errors import InputError

NOW = datetime(2026, 11, 29, 23, 30, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5400", 5400),
        ("0", 0),
        ("90.5", 90.5),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2d", 172800),
        ("45s", 45),
        ("01:30:00", 5400),
        ("120:00:00", 432000),
        ("1-02:00:03", 93603),
        ("2026-11-30T00:30", 3600),
        ("2026-11-30 00:30:10", 3610),
        ("2026-11-29T23:30:00+00:00", 3600),
        ("2026-11-29T22:31Z", 60),
        ("2026-11-29", -84600),
        ("T23:31", 60),
        ("T06:00", 23400),
        ("T22:31:00Z", 60),
    ],
)
def test_forms_of_a_deadline(text: str, seconds: float) -> None:
    assert seconds_until(text, NOW) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "-5", "1e3", "inf", "nan", "30:00", "1h90", "m", "01:90", "2026-13-01", "T25:00"),
        *("25:61:00", "01:00:60", "999999999999d"),
    ],
)
def test_other_forms_are_none(text: str) -> None:
    assert seconds_until(text, NOW) is None


@pytest.mark.parametrize("value", ["soon", "2020-01-01T00:00", "30:00", "-1", "''"])
def test_deadline_that_cannot_be_read_or_has_passed_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"^job\.deadline is .*, but must be seconds \(5400\)"):
        load_config(["output.dir=out", f"job.deadline={value}"])


def test_deadline_of_a_configuration() -> None:
    assert load_config(["output.dir=out"]).job.deadline is None
    assert load_config(["output.dir=out", "job.deadline=5400"]).job.deadline == "5400"
    assert load_config(["output.dir=out", "job.deadline=01:30:00"]).job.deadline == "01:30:00"


@pytest.mark.parametrize("seconds", ["0.5", "86401", "1e12", "inf", "nan"])
def test_a_lease_of_no_use_is_refused(seconds: str) -> None:
    with pytest.raises(InputError, match=r"^job\.lease_seconds is .*, but must be from 1 to 86400, a day\.$"):
        load_config(["output.dir=out", f"job.lease_seconds={seconds}"])
