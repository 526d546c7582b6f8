"""Versions: those of packages and of the project's own code, and sentences about what changed."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import rollout.run_dir.versions as module
from rollout.run_dir.versions import changes, installed_versions, source_digest


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    # Not what this process has found before.
    found = installed_versions.__wrapped__()
    assert found == {
        "torch": metadata.version("torch"),
        "no-such-package": None,
        "python": platform.python_version(),
        "rollout's source": source_digest(),
    }


def test_each_change_is_said_in_a_sentence() -> None:
    before = {"torch": "2.11.0", "numpy": "2.0.0", "peft": None, "wandb": "1", "old": "1"}
    now = {"torch": "2.13.0", "numpy": "2.0.0", "peft": "0.21.0", "wandb": None, "new": "1"}
    assert changes(before, now) == [
        "This attempt runs torch 2.13.0; the run began with 2.11.0.",
        "This attempt runs peft 0.21.0; the run began with none.",
        "This attempt runs without wandb; the run began with 1.",
    ]
    assert changes(before, before) == []


def test_the_digest_of_the_source_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether sub-packages lie inside the package or beside it; another one for every changed file."""
    package = tmp_path / "one" / "own_pkg"
    (package / "inner").mkdir(parents=True)
    for path in ("__init__.py", "a.py", "inner/__init__.py", "inner/b.c"):
        (package / path).write_text(path)
    (package / "cache.pyc").write_text("1")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(module, "_CODE_OF", ("own_pkg",))
    found = source_digest()
    (package / "cache.pyc").write_text("2")
    assert source_digest() == found
    (package / "inner" / "b.c").write_text("other")
    assert source_digest() != found


def test_the_digest_covers_all_packages_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert set(module._CODE_OF) == set(project["tool"]["setuptools"]["package-dir"])
