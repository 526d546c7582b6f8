"""The commands of docs/examples.md run in order, as written, and do what the page says."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from jobs.examples.dpo import EngineDPOTrainer, preferences
from jobs.examples.grpo import closeness
from jobs.examples.own_policy import AdditiveIncrease
from jobs.examples.sft_data import conversations
from rollout import Engine
from rollout.batcher.types import StepSample
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer
from tests.docs.test_readme import needs_default_model
from tests.support.arithmetic_model import save_arithmetic_model
from tests.support.observations import observe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
#: Examples that train with TRL.
TRAINED = ("grpo", "tool_use", "rloo", "dpo")
COMMANDS = [shlex.split(block) for block in re.findall(r"^```sh\n(.*?)\n^```$", PAGE, re.MULTILINE | re.DOTALL)]


#: Commands that train for minutes: the tests run them on a tiny model, for two steps.
TRAINING = [command for command in COMMANDS if any(f"jobs.examples.{name}" in command for name in TRAINED)]


@pytest.fixture(scope="module")
def arithmetic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic_model")
    save_arithmetic_model(folder)
    return folder


def test_page_runs_every_example() -> None:
    named = {Path(path).stem for path in re.findall(r"`jobs/examples/(\w+)\.py`", PAGE)}
    assert named == {path.stem for path in (ROOT / "jobs" / "examples").glob("*.py")} - {"__init__"}
    text = " ".join(" ".join(command) for command in COMMANDS)
    assert all(f"jobs.examples.{name}" in text for name in named)


@pytest.mark.long
@needs_default_model
def test_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    for python, _, module, *arguments in (command for command in COMMANDS if command not in TRAINING):
        assert python == "python"
        if module == "rollout":
            command = [sys.executable, "-m", module, *arguments]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
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


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: " ".join(command[2:4]))
def test_training_command_runs_in_a_short_form(
    command: list[str],
    arithmetic_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, module, *arguments = command
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--model", str(arithmetic_model), "--steps", "2"])
    importlib.import_module(module).main()
    printed = capsys.readouterr().out
    if module.endswith("grpo"):
        (rewards,) = re.findall(r"first 1 steps (\S+), of the last (\S+)\n", printed)
        assert all(0 < float(reward) <= 1 for reward in rewards)
    elif module.endswith("rloo"):
        rewards = re.findall(r"^step [12]: mean reward (\S+)$", printed, re.MULTILINE)
        assert [0 < float(reward) <= 1 for reward in rewards] == [True, True]
    elif module.endswith("tool_use"):
        # The tiny model calls in its first turn and answers in its second.
        calls = re.findall(r"^step [12]: (\S+) calls a completion", printed, re.MULTILINE)
        assert len(calls) == 2
        assert all(float(each) >= 0.9 for each in calls)
    else:
        pairs = Dataset.from_json("runs/dpo.jsonl", cache_dir=str(tmp_path / "cache")).to_list()
        assert f"{len(pairs)} pairs in runs/dpo.jsonl\n" in printed
        assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
        # Before the first step the model is its own reference.
        assert "step 1: loss 0.693" in printed


def test_closeness_takes_the_first_line_as_the_answer() -> None:
    texts = [" 20", " 15\n9 +", " 25\n", " 20 = 20", " twenty", " 99", ""]
    assert closeness(texts, [20] * 7) == [1.0, 0.75, 0.75, 0.0, 0.0, 0.0, 0.0]


def test_reference_logprobs_are_those_that_trl_computes(arithmetic_model: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(arithmetic_model), dtype="float32")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    pairs = preferences(Engine(model, tokenizer), count=6, samples=4)
    assert len(pairs) >= 3
    args = DPOConfig(
        str(tmp_path), precompute_ref_log_probs=True, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True
    )
    ours, theirs = (
        kind(model=model, processing_class=tokenizer, args=args, train_dataset=pairs).train_dataset
        for kind in (EngineDPOTrainer, DPOTrainer)
    )
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(torch.tensor(ours[column]), torch.tensor(theirs[column]), atol=1e-4, rtol=0)


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
