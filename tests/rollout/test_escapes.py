"""Escapes in stop strings, as shells pass them on."""

from __future__ import annotations

import logging

import pytest

from rollout.config.compose import load_config
from rollout.config.escapes import warn_about_escapes


def stops_of(*overrides: str) -> list[str]:
    return load_config(["output.dir=out", *overrides]).sampling.stop


def test_escapes_of_the_shell_are_understood_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert stops_of(r'sampling.stop=["\n", "a\tb", "\\n"]') == ["\n", "a\tb", r"\n"]
    assert r"in '\n' a backslash and a letter are understood as the character '\n'" in caplog.text


def test_other_stop_strings_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert stops_of(r'sampling.stop=["###", "\boxed", "</s>"]') == ["###", r"\boxed", "</s>"]
    assert "understood" not in caplog.text


@pytest.mark.parametrize("stop", ["n", "nn"])
def test_line_break_whose_backslash_the_shell_removed_is_warned_of(stop: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_about_escapes(stops_of(f"sampling.stop=[{stop}]"), None)
    assert "write 'sampling.stop=[\"\\n\"]'" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "warned"), [(r"one\ntwo", True), (r"put it in \boxed{}", False), (r"$a \neq b$", False)]
)
def test_written_line_break_of_a_system_prompt_is_warned_of(
    prompt: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_about_escapes([], prompt)
    assert ("stay two characters" in caplog.text) == warned
