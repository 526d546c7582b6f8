"""Row ids on disk: as they would be in memory, mapped by later processes, and never taken from a damaged file."""

from __future__ import annotations

import errno
import json
import random
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from rollout.config.compose import load_config
from rollout.data import kept_columns, reading, row_ids, row_survey
from rollout.data.prompts import Prompts, read_prompts
from rollout.data.row_ids import HashCounter, RowIds, first_duplicate
from rollout.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep in the cache what is found, however little it is."""
    monkeypatch.setattr(reading, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(row_survey, "SMALL_BYTES", 0)
    monkeypatch.setattr(kept_columns, "SMALL_BYTES", 0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an entry with each pass over all rows."""
    passes: list[int] = []
    whole = row_survey._pass
    monkeypatch.setattr(row_survey, "_pass", lambda *given: (passes.append(1), whole(*given))[1])
    return passes


ROWS = [{"key": f"k{i}", "prompt": f"prompt {i % 7}", "tokens": i} for i in range(2500)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, *overrides: str, with_columns: bool = False) -> Prompts:
    return read_prompts(load_config(["output.dir=out", f"data.path={path}", *overrides]).data, with_columns)


def cached_ids(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "rollout").glob("*.ids"))


@pytest.mark.parametrize("override", ["data.id_column=key", "data.id_column=null", "data.length_hint_column=tokens"])
def test_kept_ids_are_those_found_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, override: str
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(row_ids, "_CHUNK", 700)
    alone = read(path, override)
    assert not cached_ids(tmp_path)
    request.getfixturevalue("kept")
    passes = request.getfixturevalue("counted")
    for _ in range(3):
        again = read(path, override)
        assert again.row_ids[:] == alone.row_ids[:]
        assert (again.content, again.chat_row, again.kept.digest()) == (
            alone.content,
            alone.chat_row,
            alone.kept.digest(),
        )
        assert [row.row_id for row in again.rows(998, 1003)] == alone.row_ids[998:1003]
    assert len(passes) == 1
    assert len(cached_ids(tmp_path)) == 1


@pytest.mark.usefixtures("kept")
def test_ids_are_found_anew_when_what_they_depend_on_changes(tmp_path: Path, counted: list[int]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    seen = {}
    for number, overrides in enumerate(
        (
            (),
            ("data.id_column=key",),
            ("data.prompt_column=key",),
            ("data.limit=2000",),
            ("data.as_chat=true",),
            ("data.as_chat=true", "data.system_prompt=hi"),
            ("data.length_hint_column=tokens",),
            ("data.sampling_columns={max_new_tokens:tokens}",),
            ("data.keep_columns=[key]",),
        ),
        1,
    ):
        found = read(path, *overrides)
        seen[overrides] = (found.row_ids[:], found.content, found.chat_row)
        assert len(counted) == number, overrides
    assert read(path, with_columns=True).content != seen[()][1]
    write(path, [{**row, "prompt": "other"} for row in ROWS])
    assert read(path).content != seen[()][1]


@pytest.mark.usefixtures("kept")
def test_chat_settings_are_refused_from_kept_ids_too(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        with pytest.raises(InputError, match="needs chat messages"):
            read(path, "data.system_prompt=hi")


@pytest.mark.usefixtures("kept")
def test_damaged_ids_in_the_cache_are_found_anew(tmp_path: Path, counted: list[int]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    whole = read(path)
    (file,) = cached_ids(tmp_path)
    content = file.read_bytes()
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for number in range(40):
        file.unlink()
        damaged = bytearray(content)
        if number % 4:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        before = len(counted)
        found = read(path)
        assert (found.row_ids[:], found.content, found.chat_row) == (whole.row_ids[:], whole.content, None)
        assert len(counted) == before + 1
        assert file.read_bytes() == content


@pytest.mark.usefixtures("kept")
def test_unwritable_cache_costs_a_pass_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert len(read(path).row_ids) == len(ROWS)
    assert "are found anew at every start" in caplog.text


@pytest.mark.usefixtures("kept")
def test_full_disk_costs_a_pass_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    whole = read(path, "data.limit=2499")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (row_survey, kept_columns):
        monkeypatch.setattr(module, "cached", refuse)
    found = read(path, "data.limit=2499")
    assert (found.row_ids[:], found.kept.digest()) == (whole.row_ids[:], whole.kept.digest())
    assert "No space left" in caplog.text


@pytest.mark.usefixtures("kept")
def test_saved_dataset_that_was_replaced_is_read_anew(tmp_path: Path, counted: list[int]) -> None:
    for prompt in ("a", "b"):
        rows = datasets.Dataset.from_list([{"prompt": prompt}] * 50)
        rows._fingerprint = "same"  # as a tool that copies the folder's description leaves it
        rows.save_to_disk(tmp_path / f"rows-{prompt}")
        (tmp_path / f"rows-{prompt}").rename(tmp_path / "rows")
        found = [read(tmp_path / "rows").row_ids[0] for _ in range(2)]
        assert found[0] == found[1]
        (tmp_path / "rows").rename(tmp_path / f"old-{prompt}")
    assert len(counted) == 2


def test_ids_are_a_sequence(tmp_path: Path) -> None:
    ids = read(write(tmp_path / "rows.jsonl", ROWS), "data.id_column=key").row_ids
    whole = [row["key"] for row in ROWS]
    assert isinstance(ids, RowIds)
    assert (len(ids), ids[0], ids[-1], ids[1999]) == (2500, "k0", "k2499", "k1999")
    assert list(ids) == whole
    for cut in (slice(3, 8), slice(-5, None), slice(8, 3), slice(None, None, 600), slice(2490, 9999)):
        assert ids[cut] == whole[cut]
    assert list(ids.within(990, 2010)) == whole[990:2010]


def test_earlier_occurrences_are_counted_exactly() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    counter, seen = HashCounter(), Counter[int]()
    for _ in range(60):
        hashes = rng.integers(0, 40, rng.integers(0, 30)).astype(np.uint64) * np.uint64(2**58)
        expected = []
        for value in hashes.tolist():
            expected.append(seen[value])
            seen[value] += 1
        assert counter.add(hashes).tolist() == expected


@pytest.mark.parametrize("colliding", [False, True])
def test_first_duplicate_is_exact(colliding: bool) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(60):
        ids = [str(rng.randrange(400)) for _ in range(rng.randrange(1, 40))]
        hashes = np.array([len(row_id) if colliding else int(row_id) for row_id in ids], np.uint64)
        first: dict[str, int] = {}
        pairs = [(first[name], i) for i, name in enumerate(ids) if first.setdefault(name, i) != i]
        assert first_duplicate(ids.__getitem__, hashes) == (pairs[0] if pairs else None)
