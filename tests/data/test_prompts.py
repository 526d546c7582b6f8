"""Reading prompts: every format, the ids of input rows, and errors of files and prompts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from rollout.config.compose import load_config
from rollout.config.schema import DataConfig
from rollout.data.dataset_row import DatasetRow
from rollout.data.prompts import Prompts, read_prompts
from rollout.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def data(path: object, *overrides: str) -> DataConfig:
    return load_config(["output.dir=out", f"data.path='{path}'", *overrides]).data


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(prompts: Prompts) -> list[DatasetRow]:
    return list(prompts.rows(0, len(prompts)))


ROWS = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"}, {"prompt": "one", "answer": "3"}]


def files(folder: Path) -> dict[str, str]:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.to_csv(folder / "rows.csv")
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved_dict")
    write(folder / "rows.jsonl", ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    (folder / "pieces").mkdir()
    write(folder / "pieces" / "a.jsonl", ROWS[:1])
    write(folder / "pieces" / "b.jsonl", ROWS[1:])
    names = ("rows.parquet", "rows.csv", "saved", "saved_dict", "rows.jsonl", "rows.json", "rows.jsonl.gz")
    return {name: str(folder / name) for name in (*names, "pieces/*.jsonl")}


def test_all_formats_give_the_same_prompts(tmp_path: Path) -> None:
    paths = files(tmp_path)
    read = {name: read_prompts(data(path), with_columns=True) for name, path in paths.items()}
    for prompts in read.values():
        assert [row.prompt for row in rows_of(prompts)] == ["one", "two", "one"]
        assert [str(row.columns["answer"]) for row in rows_of(prompts)] == ["1", "2", "3"]
    assert len({tuple(prompts.row_ids) for prompts in read.values()}) == 1
    plain = {read_prompts(data(path)).content for path in paths.values()}
    assert len(plain) == 1


def test_id_is_the_hash_of_the_prompt_and_an_ordinal(tmp_path: Path) -> None:
    ids = read_prompts(data(write(tmp_path / "a.jsonl", ROWS))).row_ids
    turned = read_prompts(data(write(tmp_path / "b.jsonl", ROWS[::-1]))).row_ids
    assert ids[0][:-2] == ids[2][:-2] != ids[1][:-2]
    assert [row_id[-2:] for row_id in ids] == ["-0", "-0", "-1"]
    assert len(ids[0]) == 18
    assert sorted(ids) == sorted(turned)


def test_id_of_messages_ignores_fields_of_other_rows(tmp_path: Path) -> None:
    plain = {"prompt": [{"role": "user", "content": "a"}]}
    named = {"prompt": [{"role": "user", "content": "b", "name": "x"}]}
    alone = read_prompts(data(write(tmp_path / "a.jsonl", [plain])))
    together = read_prompts(data(write(tmp_path / "b.jsonl", [plain, named])))
    assert alone.row_ids[0] == together.row_ids[0]
    assert rows_of(together)[0].prompt == plain["prompt"]
    assert together.chat_row == together.row_ids[0]


def test_id_column_gives_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "key": 7}, {"prompt": "a", "key": 8}])
    assert read_prompts(data(path, "data.id_column=key")).row_ids[:] == ["7", "8"]


def test_limit_and_split_select_input_rows(tmp_path: Path) -> None:
    paths = files(tmp_path)
    assert len(read_prompts(data(paths["rows.parquet"], "data.limit=2"))) == 2
    assert len(read_prompts(data(paths["rows.parquet"], "data.limit=99"))) == 3
    assert len(read_prompts(data(paths["saved_dict"], "data.split=test"))) == 1


def test_builtin_arithmetic_has_ids_and_answers() -> None:
    prompts = read_prompts(data("builtin:arithmetic", "data.limit=5", "data.id_column=id"), with_columns=True)
    assert prompts.row_ids[:] == [f"arithmetic-{i:05d}" for i in range(5)]
    assert set(rows_of(prompts)[0].columns) == {"id", "prompt", "answer"}
    assert len(read_prompts(data("builtin:arithmetic"))) == 1024


def test_input_rows_are_read_by_range() -> None:
    prompts = read_prompts(data("builtin:arithmetic", "data.limit=9"))
    assert [row.index for row in prompts.rows(3, 6)] == [3, 4, 5]
    assert [row.row_id for row in prompts.rows(3, 6)] == prompts.row_ids[3:6]


def test_content_digest_covers_what_results_depend_on(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", ROWS)
    other_answer = write(tmp_path / "b.jsonl", [*ROWS[:2], {"prompt": "one", "answer": "9"}])
    other_prompt = write(tmp_path / "c.jsonl", [*ROWS[:2], {"prompt": "One", "answer": "3"}])
    other_order = write(tmp_path / "d.jsonl", [ROWS[1], ROWS[0], ROWS[2]])
    assert read_prompts(data(first)).content == read_prompts(data(other_answer)).content
    assert read_prompts(data(first), True).content != read_prompts(data(other_answer), True).content
    assert read_prompts(data(first)).content != read_prompts(data(other_prompt)).content
    assert read_prompts(data(first)).content != read_prompts(data(other_order)).content
    assert read_prompts(data(first)).content != read_prompts(data(first, "data.limit=2")).content


# Chat


def test_as_chat_wraps_text_and_system_prompt_goes_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    user = {"role": "user", "content": "hi"}
    assert rows_of(read_prompts(data(path)))[0].prompt == "hi"
    assert rows_of(read_prompts(data(path, "data.as_chat=true")))[0].prompt == [user]
    both = read_prompts(data(path, "data.as_chat=true", "data.system_prompt=Be brief"))
    assert rows_of(both)[0].prompt == [{"role": "system", "content": "Be brief"}, user]
    with pytest.raises(InputError, match=r"data\.as_chat=true"):
        read_prompts(data(path, "data.system_prompt=Be brief"))


def test_system_message_of_the_prompt_is_kept(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": own}])
    assert rows_of(read_prompts(data(path, "data.system_prompt=other")))[0].prompt == own


# Bad rows: error records of their own


def test_bad_prompts_get_an_error_class(tmp_path: Path) -> None:
    values = ["fine", None, 5, "", [], [1, 2], [1, -2], [1, "a"], [{"content": "no role"}], {"role": "user"}]
    read = rows_of(read_prompts(data(write(tmp_path / "a.jsonl", [{"prompt": value} for value in values]))))
    assert [row.error_class for row in read] == [
        "",
        "bad_prompt",
        "bad_prompt",
        "empty_prompt",
        "empty_prompt",
        "",
        *["bad_prompt"] * 4,
    ]
    assert all((row.prompt is None) == bool(row.error_class) == bool(row.error) for row in read)
    assert len({row.row_id for row in read}) == len(values)


# Bad input: refused at start


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("no.jsonl", "no.parquet", "no/such", "no*.csv"):
        with pytest.raises(InputError, match=r"does not exist|matches no file"):
            read_prompts(data(tmp_path / name))


def test_missing_column_is_refused_with_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        InputError, match=r"data\.prompt_column=question is not a column .* which has prompt, answer: write"
    ):
        read_prompts(data(path, "data.prompt_column=question"))
    with pytest.raises(InputError, match=r"data\.id_column=key is not a column .* prompt, answer\."):
        read_prompts(data(path, "data.id_column=key"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"is empty|holds no input rows"):
        read_prompts(data(tmp_path / "a.jsonl"))


def test_empty_dataset_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="holds no input rows"):
        read_prompts(data(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ('{"prompt": "a"}\n{"prompt": "b', 2),
        ('{"prompt": "a"}\n\n{"prompt": "b\n{"prompt": "c"}\n', 3),
        ('{"prompt": "a"}\n{"prompt": "b"}\n42\n', 3),
        ("not json\n", 1),
        ('[{"prompt": "a"},\n{"prompt": }]', 2),
    ],
)
def test_unreadable_line_is_named(tmp_path: Path, bad: str, line: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(bad)
    with pytest.raises(InputError, match=rf"^Line {line} of {path} "):
        read_prompts(data(path))


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=rf"^Line 2 of {path} .*UTF-8"):
        read_prompts(data(path))


def test_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"^{path} cannot be read"):
        read_prompts(data(path))


def test_duplicate_ids_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "key": k} for k in ("x", "y", "x")])
    with pytest.raises(InputError, match=r"Input rows 0 and 2 \(counted from 0\) have the same id 'x'"):
        read_prompts(data(path, "data.id_column=key"))


def test_missing_id_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "key": "x"}, {"prompt": "b", "key": None}])
    with pytest.raises(InputError, match=r"Input row 1 .* no value in data\.id_column=key"):
        read_prompts(data(path, "data.id_column=key"))


@pytest.mark.parametrize("values", [[1.5, 2.5], [True, False], [None, None], [["a"], ["b"]], [{"role": "x"}] * 2])
def test_column_without_prompts_is_refused(tmp_path: Path, values: list[Any]) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": value} for value in values])
    with pytest.raises(InputError, match=r"data\.prompt_column=prompt holds .* but prompts are text"):
        read_prompts(data(path))


@pytest.mark.parametrize("path", ["builtin:nothing", "a.pdf", "no_such_owner/no_such_dataset"])
def test_path_without_a_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdf").write_text("text")
    with pytest.raises(InputError, match=r"^data\.path"):
        read_prompts(data(path))


def test_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder in which no file can be read; readable are \.jsonl"):
        read_prompts(data(tmp_path))


def test_unknown_split_is_refused_with_the_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.split=nope .* has test, train"):
        read_prompts(data(files(tmp_path)["saved_dict"], "data.split=nope"))


# Length hints


def test_length_hints_are_read_and_invalid_ones_unknown(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "tokens": value, "other": i} for i, value in enumerate([5, None, 0, -3, 2.5])]
    path = write(tmp_path / "rows.jsonl", rows)
    hinted = read_prompts(data(path, "data.length_hint_column=tokens"))
    assert hinted.hinted
    assert [row.length_hint for row in rows_of(hinted)] == [5.0, None, None, None, 2.5]
    assert set(rows_of(hinted)[0].columns) == {"prompt", "tokens"}
    plain = read_prompts(data(path))
    assert not plain.hinted
    assert {row.length_hint for row in rows_of(plain)} == {None}
    assert plain.content == hinted.content, "hints change no result"


def test_length_hint_of_nan_or_infinity_is_unknown(tmp_path: Path) -> None:
    table = {"prompt": ["a", "b", "c"], "tokens": [float("nan"), float("inf"), 7.0]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "rows.parquet")
    prompts = read_prompts(data(tmp_path / "rows.parquet", "data.length_hint_column=tokens"))
    assert [row.length_hint for row in rows_of(prompts)] == [None, None, 7.0]


@pytest.mark.parametrize("values", [["five", "six"], [True, False], [[5], [6]], [None, None]])
def test_column_without_length_hints_is_refused(tmp_path: Path, values: list[Any]) -> None:
    rows = [{"prompt": str(i), "tokens": value} for i, value in enumerate(values)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"^data\.length_hint_column=tokens holds .* .* length hints are numbers"):
        read_prompts(data(path, "data.length_hint_column=tokens"))
    with pytest.raises(InputError, match=r"^data\.length_hint_column=length is not a column of .* prompt, tokens\."):
        read_prompts(data(path, "data.length_hint_column=length"))
