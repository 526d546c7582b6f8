"""``--help``, ``--version`` and what Hydra prints."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from rollout.cli.help import help_text
from rollout.config.compose import load_config
from rollout.config.key_comments import all_keys
from rollout.config.keys import dotted_keys
from tests.cli.conftest import Ask


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = help_text(width=110)
    squeezed = " ".join(text.split())
    policies = ("predictive", "sla", "memory")
    keys = {key for name in policies for key in dotted_keys(load_config([f"batcher={name}", "output.dir=x"]))}
    for name in keys - {"batcher.name", "reward"}:
        assert f"  {name}=" in text, name
    for key in all_keys().values():
        assert key.meaning in squeezed
    for experiment in ("ppo_sampling", "grpo_sampling", "bulk_inference"):
        assert f"  {experiment} " in text
    for internal in ("_bounds", "schema_", "hydra/"):
        assert internal not in text
    assert max(map(len, text.splitlines())) <= 110
    assert max(map(len, help_text(width=80).splitlines())) <= 80


@pytest.mark.parametrize("arguments", ["--help", "-h", "--help sampling.temprature=1", "+experiment=ppo_sampling -h"])
def test_help_is_printed_whatever_stands_beside_it(ask: Ask, arguments: str) -> None:
    said = ask(arguments)
    assert (said.status, said.err, said.configs) == (0, "", [])
    assert said.out == help_text() + "\n"


def test_help_needs_neither_torch_nor_hydra() -> None:
    code = "import sys; from rollout.__main__ import main; main(['-h']); print({'torch', 'hydra'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version_is_the_packages(ask: Ask) -> None:
    assert ask("--version").out == f"rollout {metadata.version('rollout')}\n"


def test_completion_offers_what_can_be_chosen(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "rollout batcher=")
    said = ask("-sc query=bash")
    names = ("memory", "paper", "predictive", "sla", "static")
    assert said.out.split() == [f"batcher={name}" for name in names]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("--cfg job", "dir: ???"),
        ("--cfg job -p sampling +experiment=ppo_sampling", "max_new_tokens: 96"),
        ("-c all", "hydra:"),
        ("seed=3 --cfg job data.limit=2", "seed: 3"),
        ("--cfg job --resolve output.dir=x data.split='${seed}'", "split: '0'"),
        ("--info searchpath", "pkg://rollout.conf"),
        ("--hydra-help", "Hydra"),
        ("-sc install=bash", "complete"),
    ],
)
def test_hydras_own_options_work(ask: Ask, arguments: str, printed: str) -> None:
    said = ask(arguments)
    assert (said.status, said.configs) == (0, []), said.err
    assert printed in said.out
