"""What a command line comes to, without a job that runs."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import rollout.job.job
from rollout.__main__ import main
from rollout.config.schema import Config
from rollout.errors import Exit


@dataclass
class Said:
    """How a command line ended, and the configurations that it would have run."""

    status: int
    out: str
    err: str
    configs: list[Config] = field(default_factory=list)


Ask = Callable[..., Said]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Give the program a command line as a shell would; its jobs return at once."""
    monkeypatch.chdir(tmp_path)
    configs: list[Config] = []

    def note(config: Config, **_: object) -> Exit:
        configs.append(config)
        return Exit.COMPLETE

    monkeypatch.setattr(rollout.job.job, "run_job", note)

    def run(line: str | list[str]) -> Said:
        configs.clear()
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(shlex.split(line) if isinstance(line, str) else line)
        return Said(status, out.getvalue(), err.getvalue(), list(configs))

    return run


@pytest.fixture
def sentence(ask: Ask) -> Callable[[str | list[str]], str]:
    """The one sentence with which a command line is refused."""

    def refused(line: str | list[str]) -> str:
        said = ask(line)
        assert (said.status, said.out, said.configs) == (2, "", [])
        assert said.err.endswith(".\n") or said.err.endswith("?\n"), said.err
        assert "Traceback" not in said.err
        return said.err.removesuffix("\n")

    return refused
