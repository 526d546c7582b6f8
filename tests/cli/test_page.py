"""The commands of docs/cli.md are what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Ask

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(ask: Ask, command: str) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "rollout"]
    folder = [] if "-m" in words[3:] else ["output.dir=out"]
    said = ask([*words[3:], *folder])
    assert said.status == 0, said.err
    assert said.configs


def test_example_of_an_experiment_is_accepted(ask: Ask, tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    said = ask("--config-dir . +experiment=mine")
    assert said.status == 0, said.err
    assert said.configs[0].output.dir == yaml.safe_load(text)["output"]["dir"]
