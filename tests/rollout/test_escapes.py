"""Escapes in stop strings, as shells pass them on."""

from __future__ import annotations

import logging

import pytest

from rollout.config.compose import load_config


def stops_of(*overrides: str) -> list[str]:
    return load_config(["output.dir=out", *overrides]).sampling.stop


def test_escapes_of_the_shell_are_understood_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert stops_of(r'sampling.stop=["\n", "a\tb", "\\n"]') == ["\n", "a\tb", r"\n"]
    assert r"'\n' is understood as '\n'" in caplog.text


def test_other_stop_strings_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert stops_of(r'sampling.stop=["###", "\boxed", "</s>"]') == ["###", r"\boxed", "</s>"]
    assert "understood" not in caplog.text
