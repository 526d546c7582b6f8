"""The commands of docs/examples.md run in order, as written, and do what the page says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.examples.own_policy import AdditiveIncrease
from jobs.examples.sft_data import conversations
from rollout.batcher.types import StepSample
from tests.docs.test_readme import needs_default_model
from tests.support.observations import observe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(block) for block in re.findall(r"^```sh\n(.*?)\n^```$", PAGE, re.MULTILINE | re.DOTALL)]


def test_page_runs_every_example() -> None:
    named = {Path(path).stem for path in re.findall(r"`jobs/examples/(\w+)\.py`", PAGE)}
    assert named == {path.stem for path in (ROOT / "jobs" / "examples").glob("*.py")} - {"__init__"}
    text = " ".join(" ".join(command) for command in COMMANDS)
    assert all(f"jobs.examples.{name}" in text for name in named)


@needs_default_model
def test_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    for python, _, module, *arguments in COMMANDS:
        assert python == "python"
        if module == "rollout":
            command = [sys.executable, "-m", module, *arguments]
            # Other tests run beside this one, on the same cores.
            environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
        else:
            # In this process, which has imported torch already.
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            importlib.import_module(module).main()
    printed = capsys.readouterr().out
    records = pq.read_table(next(Path("runs/scored/shards").glob("*.parquet"))).to_pylist()
    assert len(records) == 32
    assert all(record["reward"] is not None for record in records)
    assert f"\n{records[0]['prompt']} -> {records[0]['text']}\n" in printed
    good = {record["row_id"] for record in records if record["reward"] >= 0.5 and record["finish_reason"] == "stop"}
    lines = Path("runs/sft.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(good)
    assert all([m["role"] for m in json.loads(line)["messages"]] == ["user", "assistant"] for line in lines)
    assert "8 samples in " in printed
    (difference,) = re.findall(r"step 0: mean reward .*, log-probabilities differ by at most (\S+)", printed)
    assert float(difference) < 1e-3


def test_best_sample_of_each_prompt_is_kept(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]
    columns = ("row_id", "prompt", "text", "reward", "finish_reason")
    rows = [
        ("a", chat, "low", 0.1, "stop"),
        ("a", chat, "cut", 1.0, "length"),
        ("a", chat, "best", 0.9, "stop"),
        ("a", chat, "good", 0.8, "stop"),
        ("b", chat, "low", 0.1, "stop"),
        ("c", chat, "failed", None, "stop"),
    ]
    (tmp_path / "shards").mkdir()
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table, tmp_path / "shards" / "00000.parquet")
    (found,) = conversations(tmp_path, 0.5)
    assert found == {"messages": [*chat, {"role": "assistant", "content": "best"}]}


def test_policy_halves_the_batch_after_a_slow_step() -> None:
    policy = AdditiveIncrease(budget_ms=100, most_rows=6)
    fast, slow = (StepSample(rows=1, kv_tokens=1, prefill_tokens=0, ms=ms) for ms in (99.0, 101.0))
    rows = [policy.decide(observe(waiting=9, steps=[step])).rows for step in [fast] * 6 + [slow] * 3]
    assert rows == [2, 3, 4, 5, 6, 6, 3, 1, 1]
