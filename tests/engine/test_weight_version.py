"""A change of the weights is counted once, by the engine or by the caller."""

from __future__ import annotations

from rollout.engine.weight_version import WeightVersion


def test_changes_are_counted() -> None:
    version = WeightVersion()
    assert [version.look(changed) for changed in (False, True, False, True, True)] == [0, 1, 1, 2, 3]


def test_change_that_the_caller_has_numbered_is_not_counted_again() -> None:
    version = WeightVersion()
    version.number += 1
    assert version.look(True) == 1
    assert version.look(True) == 2
    version.number = 10
    assert version.look(True) == 10


def test_number_set_without_a_change_does_not_hide_a_later_one() -> None:
    version = WeightVersion()
    version.number = 7
    assert version.look(False) == 7
    assert version.look(True) == 8
