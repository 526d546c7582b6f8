"""Lengths of a previous run's completions, complete or not."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from rollout.errors import InputError
from rollout.job.job import run_job
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.previous_lengths import read_lengths
from tests.support.jobs import FakeEngine, config_of, load_fake, read_part_records, read_records

JOB = ("data.limit=20", "sampling.n=3", "output.rows_per_shard=4")


class Words(FakeEngine):
    """Every prompt has token ids of its own."""

    def encode(self, prompt: object) -> list[int]:
        return list(str(prompt).encode())


def means(records: list[tuple[list[int], list[int]]]) -> dict[tuple[int, ...], float]:
    lengths = defaultdict(list)
    for prompt_ids, completion_ids in records:
        lengths[tuple(prompt_ids)].append(len(completion_ids))
    return {prompt: fmean(values) for prompt, values in lengths.items()}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_lengths_of_a_complete_run(tmp_path: Path, form: str):
    run_job(config_of(tmp_path, *JOB, f"output.format={form}"), load_fake(Words()))
    records = read_records(tmp_path / "out")
    expected = means([(record["prompt_ids"], record["completion_ids"]) for record in records])
    lengths = read_lengths(str(tmp_path / "out"))
    assert len(lengths) == len(expected) > 15
    assert [lengths.expected(prompt) for prompt in expected] == pytest.approx(list(expected.values()))


def test_lengths_of_a_killed_run_include_its_part_files(tmp_path: Path):
    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path, *JOB), load_fake(Words(fail_after=33)))
    paths = RunPaths(tmp_path / "out")
    parts = list(paths.work.glob("parts/*/*.jsonl"))
    committed = [(record["prompt_ids"], record["completion_ids"]) for record in read_records(paths.root)]
    under_way = read_part_records(paths.root)
    assert committed
    assert under_way
    with parts[0].open("ab") as file:
        file.write(b'{"row_id": "torn')
    expected = means(committed + [(record.prompt_ids, record.completion_ids) for record in under_way])
    lengths = read_lengths(str(paths.root))
    assert [lengths.expected(prompt) for prompt in expected] == pytest.approx(list(expected.values()))
    assert len(lengths) == len(expected)


def test_error_records_have_no_length(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "fine"}\n{"prompt": ""}\n')
    run_job(config_of(tmp_path, f"data.path={tmp_path}/rows.jsonl"), load_fake(Words()))
    lengths = read_lengths(str(tmp_path / "out"))
    assert len(lengths) == 1
    assert lengths.expected([]) is None


def test_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"^data\.lengths_from=.*nowhere holds no run"):
        read_lengths(str(tmp_path / "nowhere"))


def test_broken_shard_is_named(tmp_path: Path):
    run_job(config_of(tmp_path, *JOB), load_fake(Words()))
    (tmp_path / "out" / "shards" / "00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"data\.lengths_from=.*00002\.parquet cannot be read"):
        read_lengths(str(tmp_path / "out"))
