"""Folders of data files, laid out as dataset repositories of the Hub are."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data.data_folder import files_of_folder
from rollout.errors import InputError


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": [path.stem]}), path)
    else:
        path.write_text(text or json.dumps({"prompt": path.stem}) + "\n")
    return path


def names(folder: Path, split: str = "train", name: str | None = None) -> list[str]:
    return [file.name for file in files_of_folder(str(folder), name, split)]


def readme(folder: Path, configs: str) -> None:
    write(folder / "README.md", f"---\nlicense: mit\nconfigs:\n{configs}---\n# A dataset\n")


def test_names_of_shards_tell_the_splits(tmp_path: Path) -> None:
    shards = [f"train-{number:05d}-of-00002.parquet" for number in range(2)]
    for shard in (*shards, "test-00000-of-00001.parquet"):
        write(tmp_path / "data" / shard)
    write(tmp_path / "README.md", "# A dataset")
    write(tmp_path / "LICENSE.txt", "text")
    write(tmp_path / ".cache" / "x.jsonl")
    assert names(tmp_path) == shards
    assert names(tmp_path, "test") == ["test-00000-of-00001.parquet"]
    with pytest.raises(InputError, match=rf"^data\.split=dev is not in {tmp_path}, which has test, train\.$"):
        names(tmp_path, "dev")


def test_folders_tell_the_splits(tmp_path: Path) -> None:
    for path in ("train/a.jsonl", "train/b.jsonl", "validation/c.jsonl"):
        write(tmp_path / path)
    assert names(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path, "validation") == ["c.jsonl"]


def test_files_without_a_split_in_their_names_are_train(tmp_path: Path) -> None:
    for path in ("b.ndjson", "a.jsonl", "deep/c.jsonl.gz"):
        write(tmp_path / path)
    assert sorted(names(tmp_path)) == ["a.jsonl", "b.ndjson", "c.jsonl.gz"]


def test_configs_of_the_readme_name_the_files(tmp_path: Path) -> None:
    for path in ("x/one.jsonl", "y/two.jsonl"):
        write(tmp_path / path)
    main = "- config_name: main\n  data_files:\n  - split: train\n    path: x/*.jsonl\n  - split: test\n    path: y/*\n"
    readme(tmp_path, main)
    assert names(tmp_path) == ["one.jsonl"]
    assert names(tmp_path, "test", "main") == ["two.jsonl"]
    readme(tmp_path, main + "- config_name: other\n  data_files: y/two.jsonl\n")
    assert names(tmp_path, name="other") == ["two.jsonl"]
    with pytest.raises(InputError, match=r"set data\.name to one of main, other"):
        names(tmp_path)
    with pytest.raises(InputError, match=r"^data\.name=third is not in .* which has main, other"):
        names(tmp_path, name="third")
    readme(
        tmp_path,
        "- config_name: other\n  data_files: y/two.jsonl\n"
        "- config_name: first\n  data_files: x/one.jsonl\n  default: true\n",
    )
    assert names(tmp_path) == ["one.jsonl"]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("- [broken\n", "README.md whose YAML is broken"),
        ("- data_files: a.jsonl\n", "README.md whose configs are wrong"),
        ("- config_name: a\n  data_files: nothing/*.jsonl\n", "names files that are not there"),
    ],
)
def test_wrong_readme_is_refused(tmp_path: Path, configs: str, message: str) -> None:
    write(tmp_path / "a.jsonl")
    readme(tmp_path, configs)
    with pytest.raises(InputError, match=message):
        names(tmp_path)


def test_name_of_a_configuration_without_configs_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"^data\.name=x is not in .* has no configs"):
        names(tmp_path, name="x")


def test_files_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("a.jsonl", "b.jsonl", "c.csv", "notes.txt"):
        write(tmp_path / path)
    assert names(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert "Reading the 2 .jsonl file(s)" in caplog.text
    assert "but not c.csv, notes.txt" in caplog.text
    caplog.clear()
    write(tmp_path / "train_1.jsonl")
    assert names(tmp_path) == ["train_1.jsonl"]
    assert "of no split, and not read, are a.jsonl, b.jsonl, c.csv, notes.txt" in caplog.text


def test_folder_of_files_without_suffixes_is_refused(tmp_path: Path) -> None:
    for name in ("_SUCCESS", "part-00000", ".part-00000.crc"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"no file can be read; readable are \.jsonl"):
        names(tmp_path)


def test_files_of_a_run_inside_the_folder_are_no_input(tmp_path: Path) -> None:
    for path in (
        "a.jsonl",
        "out/run.json",
        "out/rows.parquet",
        "out/shards/00000.jsonl",
        "out/metrics/rank-00000.jsonl",
    ):
        write(tmp_path / path)
    assert names(tmp_path) == ["a.jsonl"]
    assert names(tmp_path / "out" / "shards") == ["00000.jsonl"]
