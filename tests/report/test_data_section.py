"""The half of the page about the data: statistics of records, samples to read, and what is said of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.records import Record
from rollout.report import data_statistics
from rollout.report.__main__ import main
from rollout.report.data_statistics import DataStatistics, read_statistics
from rollout.report.prompt_text import other_columns, prompt_text
from rollout.report.record_files import record_files
from rollout.report.samples_to_read import SamplePicker
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from tests.support.jobs import write_part
from tests.support.report import BEGAN, change_run, drawn, write_metrics

EVIL = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def record(row: int, sample: int, **values: Any) -> dict[str, Any]:
    """Return a record's columns, with logprobs that the report must not need."""
    tokens = values.pop("tokens", 3)
    return {
        "row_id": f"row-{row}",
        "sample": sample,
        "prompt_ids": list(range(1, values.pop("prompt_tokens", 4) + 1)),
        "completion_ids": list(range(tokens)),
        "text": f"text {row} {sample}",
        "logprobs": [0.0] * tokens,
        "sampler_logprobs": [0.0] * tokens,
        "finish_reason": "stop",
        "error_class": "",
        "error": "",
        "reward": None,
        "seed": 0,
        "weight_version": 0,
        "attempt": 0,
    } | values


def failed(row: int, sample: int, name: str = "prompt_too_long", error: str = "It is too long.") -> dict[str, Any]:
    values = {"finish_reason": "error", "error_class": name, "error": error, "text": ""}
    return record(row, sample, tokens=0, prompt_tokens=0, **values)


def random_records(count: int, samples: int) -> list[dict[str, Any]]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [
        failed(row, sample)
        if rng.random() < 0.1
        else record(
            row,
            sample,
            tokens=rng.randrange(1, 60),
            prompt_tokens=1 + row % 7,
            finish_reason=rng.choice(["stop", "length"]),
            reward=rng.choice([None, 0.0, 0.5, 1.0, -2.25]),
        )
        for row in range(count)
        for sample in range(samples)
    ]


def write_shards(paths: RunPaths, shards: dict[int, list[dict[str, Any]]], form: str = "parquet") -> None:
    """Replace the records of a run's shards; the other shards vanish."""
    for path in [*paths.shards.iterdir()]:
        if path.suffix != ".json" or int(path.stem) not in shards:
            path.unlink()
    for number, rows in shards.items():
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), paths.shard(number, form), row_group_size=50)
        elif form == "jsonl":
            paths.shard(number, form).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            paths.manifest(number).unlink()
            write_part(read_run(paths), number, [Record(**row) for row in rows])
    change_run(paths, output_format="parquet" if form == "part" else form)


def statistics_of(paths: RunPaths) -> tuple[DataStatistics, SamplePicker]:
    picker = SamplePicker()
    return read_statistics(record_files(read_run(paths)), picker), picker


# -- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl", "part"])
def test_statistics_equal_plain_counts_in_every_format(paths: RunPaths, form: str) -> None:
    rows = random_records(count=60, samples=4)
    write_shards(paths, {0: rows[:120], 2: rows[120:]}, form)
    found, _ = statistics_of(paths)
    assert found.samples == 240
    assert found.files == 2
    assert found.completion_lengths == {
        reason: Counter(len(row["completion_ids"]) for row in rows if row["finish_reason"] == reason)
        for reason in {row["finish_reason"] for row in rows}
    }
    known = [row for row in rows if row["prompt_ids"] and row["sample"] == 0]
    assert found.prompt_lengths == Counter(len(row["prompt_ids"]) for row in known)
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    assert found.rewards == Counter(rewards)
    assert sum(found.reward_sums.values()) == pytest.approx(sum(rewards))
    assert found.rewarded.total() == len(rewards)
    assert found.errors == Counter(row["error_class"] for row in rows if row["error_class"])
    groups: dict[str, set[float]] = {}
    several = Counter(row["row_id"] for row in rows if row["reward"] is not None)
    for row in rows:
        if row["reward"] is not None and several[row["row_id"]] > 1:
            groups.setdefault(row["row_id"], set()).add(row["reward"])
    assert found.groups.mixed == sum(len(values) > 1 for values in groups.values())
    assert found.groups.constant == Counter(values.pop() for values in groups.values() if len(values) == 1)


def test_torn_shard_is_named_and_the_others_are_drawn(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(paths, {0: [record(0, 0)], 1: [record(1, 0)]})
    paths.shard(1, "parquet").write_bytes(b"PAR1 torn")
    text = drawn(paths, capsys).text
    assert "Not read: 00001.parquet (" in text
    assert "row-0, sample 0" in text


def test_large_run_is_drawn_from_shards_at_equal_distances(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(paths, {shard: [record(shard, 0)] for shard in range(4)})
    size = sum(file.bytes for file in record_files(read_run(paths)))
    monkeypatch.setattr(data_statistics, "MOST_BYTES", size / 1.9)
    text = drawn(paths, capsys).text
    assert "from 3 of 4 shards at equal distances, 3 samples" in text


def test_many_rewards_keep_few_distinct_values(paths: RunPaths) -> None:
    rows = [record(row, 0, reward=row / 7e3 - 3) for row in range(20_000)]
    write_shards(paths, {0: rows})
    found, _ = statistics_of(paths)
    assert found.rewards.total() == 20_000
    assert len(found.rewards) < 2000
    assert min(found.rewards) == -3


# -- samples to read -------------------------------------------------------------------------------------


def test_samples_are_chosen_by_rule_and_none_twice(paths: RunPaths) -> None:
    rows = [record(row, 0, tokens=10 + row, reward=0.5) for row in range(400)]
    rows[70] |= {"completion_ids": [1]}
    rows[90] |= {"completion_ids": list(range(999))}
    rows[110] |= {"reward": -7.0}
    rows[120] |= {"reward": 9.0}
    for row in (130, 131):
        rows[row] |= {"finish_reason": "length"}
    for row in (140, 141):
        rows[row] = failed(row, 0, "empty_prompt")
        rows[row + 10] = failed(row + 10, 0)
    write_shards(paths, {0: rows[:200], 1: rows[200:]})
    _, picker = statistics_of(paths)
    chosen = picker.samples()
    assert len(chosen) == len({sample.record["row_id"] for sample in chosen}) == 12
    by_rule = {sample.why: sample.record["row_id"] for sample in chosen}
    drawn_at_random = {sample.record["row_id"] for sample in chosen if sample.why == "random"}
    assert len(drawn_at_random) == 4
    for why, row in {
        "shortest completion": 70,
        "longest completion": 90,
        "lowest reward": 110,
        "highest reward": 120,
    }.items():
        assert by_rule.get(why) == f"row-{row}" or f"row-{row}" in drawn_at_random, why
    assert by_rule["cut off at the limit"] in ("row-130", "row-131")
    assert by_rule["error empty_prompt"] in ("row-140", "row-141")
    assert by_rule["error prompt_too_long"] in ("row-150", "row-151")
    (median,) = (sample for sample in chosen if sample.why == "median length")
    assert 200 <= len(median.record["completion_ids"]) <= 220
    assert "logprobs" not in median.record
    assert picker.samples() == chosen


def test_prompts_are_chosen_by_their_rewards(paths: RunPaths) -> None:
    rows = [record(row, sample, reward=float(row % 2)) for row in range(40) for sample in range(4)]
    for sample in range(4):
        rows[4 * 7 + sample]["reward"] = 10.0 * sample
        rows[4 * 9 + sample]["reward"] = -5.0
        rows[4 * 11 + sample]["reward"] = 25.0
    write_shards(paths, {0: rows})
    found, picker = statistics_of(paths)
    chosen = [(one.why, one.record["row_id"], round(one.value, 3)) for one in picker.prompts()]
    assert [why for why, _, _ in chosen] == sorted([why for why, _, _ in chosen], key=chosen_order)
    assert ("lowest mean reward", "row-9", -5) in chosen
    assert ("widest spread", "row-7", 11.18) in chosen
    assert ("highest mean reward", "row-11", 25) in chosen
    assert len({row for _, row, _ in chosen}) == len(chosen) == 7
    assert found.groups.mixed == 1


def test_prompts_of_equal_rewards_are_not_listed(paths: RunPaths) -> None:
    write_shards(paths, {0: [record(row, sample, reward=0.5) for row in range(9) for sample in range(2)]})
    found, picker = statistics_of(paths)
    assert found.groups.constant == {0.5: 9}
    assert picker.prompts() == []


def chosen_order(why: str) -> int:
    return ["lowest mean reward", "widest spread", "highest mean reward"].index(why)


@pytest.mark.parametrize(
    ("values", "column", "text"),
    [
        ({"prompt": "Why?"}, "prompt", "Why?"),
        ({"question": "Why?"}, "question", "Why?"),
        ({"text": "the completion", "input_text": "the prompt"}, "text", "the prompt"),
        ({"text": "the completion"}, "text", "(4 tokens; the text is not in the output)"),
        ({}, "prompt", "(4 tokens; the text is not in the output)"),
        ({"prompt": [5, 6, 7]}, "prompt", "(3 token ids)"),
        ({"body": {"messages": [{"role": "user", "content": "Hi"}]}}, "body.messages", "user: Hi"),
        ({"a.b": "dotted"}, "a.b", "dotted"),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"text": "Hi"}]}]},
            "prompt",
            "system: Be brief.\n\nuser: Hi",
        ),
        (
            {"prompt": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
            "prompt",
            'assistant: {"tool_calls": [{"name": "f"}]}',
        ),
    ],
)
def test_prompt_text_is_found_among_kept_columns(values: dict[str, Any], column: str, text: str) -> None:
    assert prompt_text(record(0, 0) | values, column) == text


def test_other_columns_leave_out_the_prompt_and_long_texts() -> None:
    values = record(0, 0) | {"prompt": "p", "answer": 42, "input_seed": 7, "essay": "x" * 999, "none": None}
    values |= {"reasoning": "2 + 2", "ref_logprobs": [-0.5]}
    assert other_columns(values, "prompt") == {"answer": "42", "input_seed": "7"}


# -- the page --------------------------------------------------------------------------------------------


def test_everything_in_records_is_escaped(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    def shard(text: str) -> list[dict[str, Any]]:
        kept = {
            "prompt": [{"role": text, "content": text}],
            "answer": text,
            text: text,
            "reasoning": text,
            "text": text,
        }
        rows = [record(row, sample, reward=row % 2) | kept for row in range(6) for sample in range(2)]
        errors = [failed(6 + row, 0, text, text) | kept for row in range(2)]
        return [row | {"row_id": row["row_id"] + text} for row in rows + errors] + [
            record(9, 0, finish_reason=text, **kept)
        ]

    tags = {}
    for text in ("plain", EVIL):
        write_shards(paths, {0: shard(text)})
        page = drawn(paths, capsys)
        assert page.text.count(text) >= 30
        tags[text] = Counter(page.tags)
        assert not {name for name, _ in page.attributes if name.startswith("on")}
    assert tags["plain"] == tags[EVIL]


def test_page_shows_rewards_by_prompt(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = [[0, 0], [0, 0], [0, 0], [1, 1], [0, 1], [0.5, 0.5], [0.5, None]]
    rows = [
        record(row, sample, reward=reward) for row, pair in enumerate(rewards) for sample, reward in enumerate(pair)
    ]
    write_shards(paths, {0: rows})
    text = drawn(paths, capsys).text
    assert "always 0, the lowest 3 50 %" in text
    assert "always 1, the highest 1 17 %" in text
    assert "always the same in between 1 17 %" in text
    assert "different between samples 1 17 %" in text
    assert "83 % of the prompts have the same reward in all samples" in text
    assert "Reward mean 0.3462, standard deviation 0.4107, 13 samples" in text


def test_page_shows_finish_reasons_and_rewards_over_time(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{}] * 8)
    lines = [json.loads(line) for line in paths.metrics(0).read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"finish_reasons": {"stop": 3, "length": number}, "rewards": 2, "reward_sum": -1.0 * number}
    paths.metrics(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(paths, capsys)
    reasons, rewards = page.data[1]["figures"]
    assert [values[:3] for values in reasons] == [
        ["stop", " %", [100, 75, 60, 50]],
        ["length", " %", [None, 25, 40, 50]],
        ["finished", "", [3, 4, 5, 6]],
    ]
    assert rewards == [["mean of the samples that finished", "", [0, -0.5, -1, -1.5]]]


def test_run_without_rewards_has_no_section_of_rewards(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(paths, {0: [record(0, sample) for sample in range(4)]})
    text = drawn(paths, capsys).text
    assert "reward" not in text[text.index("Data") :].lower()
    assert "Completion length tokens; median 3, p95 3, longest 3" in text


def test_run_of_errors_alone_is_drawn(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(paths, {0: [failed(row, 0) for row in range(50)] + [failed(50, 0, "empty_prompt", "It is empty.")]})
    text = drawn(paths, capsys).text
    assert "prompt_too_long 50 98 % It is too long." in text
    assert "empty_prompt 1 2 % It is empty. row-50" in text
    assert "longest completion" not in text


def test_single_record_is_drawn(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(paths, {0: [record(0, 0, tokens=1, reward=2.5)]})
    text = drawn(paths, capsys).text
    assert "Samples to read" in text
    assert text.count("row-0, sample 0") == 1
    assert "Reward mean 2.5, standard deviation 0, 1 samples" in text


def test_long_texts_are_cut(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(paths, {0: [record(0, 0, text="x" * 100_000, prompt="y" * 7000)]})
    page = drawn(paths, capsys)
    assert "… (94,000 more characters)" in page.text
    assert "… (1,000 more characters)" in page.text
    assert paths.report.stat().st_size < 100_000


def test_run_with_nothing_to_draw_is_refused(
    paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(paths, {})
    capsys.readouterr()
    assert main([str(paths.root)]) == 2
    assert "holds a run with nothing to draw" in capsys.readouterr().err
    write_metrics(paths, 0, 0, BEGAN, [{}] * 4)
    assert "No sample is finished yet." in drawn(paths, capsys).text
