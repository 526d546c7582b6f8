"""A run's copy of its row ids: read as written, and any damage is noticed."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pyarrow as pa
import pytest

from rollout.errors import InputError
from rollout.run_dir import row_ids_file
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.row_ids_file import check_row_ids, read_row_ids, write_row_ids

IDS = [*(f"row-{i}" for i in range(300)), "é\0x", " ", "9" * 1000]


def write(folder: Path, ids: list[str] = IDS) -> tuple[Path, str]:
    path = folder / "rows.arrow"
    return path, write_row_ids(LOCAL, path, folder / "temporary", ids)


@pytest.mark.parametrize("ids", [IDS, ["one"]])
def test_ids_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[str]) -> None:
    monkeypatch.setattr(row_ids_file, "_CHUNK", 100)
    path, sha256 = write(tmp_path, ids)
    assert read_row_ids(path).to_pylist() == ids
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert write(tmp_path, ids)[1] == sha256
    check_row_ids(path, sha256)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]


def test_every_flipped_bit_is_noticed_and_none_crashes_the_reader(tmp_path: Path) -> None:
    path, sha256 = write(tmp_path)
    content = path.read_bytes()
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(250):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"rows\.arrow, the ids of the input rows, is damaged"):
            check_row_ids(path, sha256)
        try:
            # As one who does not check would read it: an error, or values that Arrow holds to be valid.
            assert all(isinstance(row_id, str) for row_id in read_row_ids(path).to_pylist())
        except InputError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_missing_file_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    for call in (lambda: read_row_ids(tmp_path / "rows.arrow"), lambda: check_row_ids(tmp_path / "rows.arrow", "")):
        with pytest.raises(InputError, match="cannot be read"):
            call()


def test_other_table_is_refused(tmp_path: Path) -> None:
    table = pa.table({"row_id": [1, 2]})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="has the columns"):
        read_row_ids(tmp_path / "rows.arrow")
