"""Expected lengths: how they reach the engine, and that they change no record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from tests.support.jobs import FakeEngine, config_of, load_fake, read_records, refuse_to_load, without_attempt


class RecordingEngine(FakeEngine):
    """Remembers the expected tokens of each request that it reads. Each prompt has its own token ids."""

    def __init__(self, fail_after: int | None = None) -> None:
        super().__init__(fail_after=fail_after)
        self.expectations: dict[str, tuple[float | None, int]] = {}

    def encode(self, prompt: Any) -> list[int]:
        super().encode(prompt)
        return list(str(prompt).encode())

    def run(self, requests: Any, **options: Any) -> Any:
        def recorded() -> Any:
            for request in requests:
                if request is not None:
                    self.expectations[request.row_id] = request.expected_tokens, request.ahead
                yield request

        return super().run(recorded(), **options)


def hinted_rows(folder: Path) -> str:
    rows = [{"prompt": f"row {i}", "id": f"r{i}", "tokens": 100.0 * i if i % 4 else None} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={folder}/rows.jsonl"


def test_length_hints_reach_the_engine_per_shard_and_change_no_record(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2", "output.rows_per_shard=4")
    plain = RecordingEngine()
    assert run_job(config_of(tmp_path, *job), load_fake(plain)) == Exit.COMPLETE
    assert set(plain.expectations.values()) == {(None, 0)}, "nothing is read ahead"
    records = read_records(tmp_path / "out")

    (tmp_path / "out").rename(tmp_path / "plain")
    hinted = RecordingEngine()
    run_job(config_of(tmp_path, *job, "data.length_hint_column=tokens"), load_fake(hinted))
    lengths = {f"r{i}": (100.0 * i if i % 4 else None, 3 - i % 4 if i < 8 else 9 - i) for i in range(10)}
    assert hinted.expectations == lengths
    assert read_records(tmp_path / "out") == records


def test_run_resumes_with_length_hints(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2", "output.rows_per_shard=4")
    run_job(config_of(tmp_path, *job), load_fake(RecordingEngine()))
    records = read_records(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "plain")
    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path, *job), load_fake(RecordingEngine(fail_after=5)))
    engine = RecordingEngine()
    hinted = config_of(tmp_path, *job, "data.length_hint_column=tokens", f"data.lengths_from={tmp_path / 'plain'}")
    assert run_job(hinted, load_fake(engine)) == Exit.COMPLETE
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(records)
    assert engine.expectations["r5"][0] == 500.0, "the row's own hint comes first"


def test_lengths_of_a_previous_run_are_expected_of_its_prompts(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2")
    run_job(config_of(tmp_path, *job, "data.limit=6"), load_fake(RecordingEngine()))
    previous = read_records(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "previous")
    engine = RecordingEngine()
    config = config_of(tmp_path, *job, "seed=1", f"data.lengths_from={tmp_path / 'previous'}")
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    for i in range(10):
        lengths = [len(record["completion_ids"]) for record in previous if record["row_id"] == f"r{i}"]
        assert engine.expectations[f"r{i}"] == (sum(lengths) / 2 if i < 6 else None, 9 - i)


def test_bad_hints_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.lengths_from=.* holds no run"):
        run_job(config_of(tmp_path, f"data.lengths_from={tmp_path / 'nowhere'}"), refuse_to_load)
    with pytest.raises(InputError, match=r"^data\.length_hint_column=prompt holds the text '"):
        run_job(config_of(tmp_path, "data.length_hint_column=prompt"), refuse_to_load)
