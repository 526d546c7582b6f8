"""Values as they stand in files, files that differ, and files that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.config.compose import load_config
from rollout.data import reading
from rollout.data.prompts import Prompts, read_prompts
from rollout.errors import InputError

ID = "data.id_column=id"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: object, *overrides: str, columns: bool = True) -> Prompts:
    config = load_config(["output.dir=out", f"data.path='{path}'", *overrides])
    return read_prompts(config.data, with_columns=columns)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def columns_of(prompts: Prompts) -> list[dict[str, Any]]:
    return [row.columns for row in prompts.rows(0, len(prompts))]


def texts(prompts: Prompts) -> list[Any]:
    return [row.prompt for row in prompts.rows(0, len(prompts))]


# Values


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_every_csv_value_is_its_text(tmp_path: Path, suffix: str, comma: str) -> None:
    values = ["00123", "1e5", "None", "NA", "null", "nan", "", "True", "2020-01-01", "1.0"]
    table = "".join(comma.join(row) + "\n" for row in [["prompt", "x"], *([value or "-", value] for value in values)])
    prompts = read(write(tmp_path / f"a.{suffix}", table), "data.id_column=prompt")
    assert prompts.row_ids[:] == [value or "-" for value in values]
    assert [row["x"] for row in columns_of(prompts)] == values


def test_csv_with_bom_crlf_quotes_and_blank_lines(tmp_path: Path) -> None:
    table = '\ufeffprompt,my id,\r\n"a\nb ""c"", d",1,\r\n\r\nplain,2,\r\n'
    prompts = read(write(tmp_path / "a.csv", table), "data.id_column='my id'")
    assert texts(prompts) == ['a\nb "c", d', "plain"]
    assert prompts.row_ids[:] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.csv", '\ufeffid;prompt\r\n01;"a;b, c"\r\n'),
        ("a.csv", 'sep=;\r\nid;prompt\r\n01;"a;b, c"\r\n'),
        ("a.csv", "id|prompt\n01|a;b, c\n"),
        ("a.csv", "id\tprompt\n01\ta;b, c\n"),
        ("a.tsv", 'id,prompt\n01,"a;b, c"\n'),
    ],
)
def test_header_or_first_line_shows_another_delimiter(tmp_path: Path, name: str, table: str) -> None:
    assert columns_of(read(write(tmp_path / name, table))) == [{"id": "01", "prompt": "a;b, c"}]


def test_column_name_with_a_delimiter_divides_nothing(tmp_path: Path) -> None:
    prompts = read(write(tmp_path / "a.csv", "prompt; text\na;b\n"), "data.prompt_column='prompt; text'")
    assert texts(prompts) == ["a;b"]


def test_line_of_a_csv_error_counts_a_line_that_names_the_delimiter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Line 4 of .* a field with a semicolon in it"):
        read(write(tmp_path / "a.csv", "sep=;\nid;prompt\n1;a\n2;a;b\n"))


@pytest.mark.parametrize(
    ("columns", "asked", "hint"),
    [
        (["meta", "messages"], "prompt", "write data.prompt_column=messages"),
        (["answer", "question"], "prompt", "write data.prompt_column=question"),
        (["custom_id", "body"], "prompt", "write data.prompt_column=body.messages"),
        (["text", "Prompt "], "prompt", "write 'data.prompt_column=\"Prompt \"'"),
        (["text", "promt"], "prompt", "write data.prompt_column=promt"),
    ],
)
def test_refusal_names_the_likely_prompt_column(tmp_path: Path, columns: list[str], asked: str, hint: str) -> None:
    path = write(tmp_path / "a.jsonl", lines([dict.fromkeys(columns, "x")]))
    with pytest.raises(InputError, match=re.escape(hint)):
        read(path, f"data.prompt_column={asked}")


def test_refusal_names_no_column_that_is_not_likely(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "a", "text": "b"}]))
    with pytest.raises(InputError, match=r"data\.id_column=key is not .* which has prompt, text\.$"):
        read(path, "data.id_column=key")


def test_repeated_csv_header_is_refused_only_where_it_is_read(tmp_path: Path) -> None:
    assert columns_of(read(write(tmp_path / "a.csv", "prompt,x,x\na,1,2\n"))) == [{"prompt": "a", "x": "1", "x.1": "2"}]
    with pytest.raises(InputError, match=r"b\.csv has several columns named prompt"):
        read(write(tmp_path / "b.csv", "prompt,prompt\na,1\n"))


def test_json_values_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2020-01-01T00:00:00", "id": "00123", "x": 2**70, "y": [{"a": 1}, {"b": [None]}]},
        {"prompt": "1", "id": 7, "x": 1, "y": "text"},
        {"prompt": "2", "id": 1.5, "x": 0.5, "y": {"a": None}},
    ]
    prompts = read(write(tmp_path / "a.jsonl", lines(rows)), ID)
    assert columns_of(prompts) == rows
    assert [type(row["x"]) for row in columns_of(prompts)] == [int, int, float]
    assert prompts.row_ids[:] == ["00123", "7", "1.5"]


def test_json_may_begin_with_a_bom_and_have_nan(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a", "x": NaN}\r\n\r\n{"prompt": "b", "x": Infinity}'
    (first, second) = columns_of(read(write(tmp_path / "a.jsonl", content)))
    assert first["x"] != first["x"]
    assert second["x"] == float("inf")


@pytest.mark.parametrize(
    "content",
    [
        '[{"prompt": "a"},\n {"prompt": "b]}"} , {"prompt":\n"c"}]\n',
        '{\n"prompt": "a"}{"prompt": "b]}"}\n{"prompt": "c"\n}',
    ],
)
def test_json_of_an_array_or_of_objects_over_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr("rollout.data.json_rows._CHUNK_BYTES", 7)
    assert texts(read(write(tmp_path / "a.json", content))) == ["a", "b]}", "c"]


def test_text_file_has_a_prompt_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.txt", "one\r\n\r\n  two \u2028 x \nthree")
    assert texts(read(path)) == texts(read(path, "data.prompt_column=text")) == ["one", "  two \u2028 x ", "three"]
    assert "Skipped 1 blank line(s) of a.txt" in caplog.text


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_file_is_read_and_a_torn_one_refused(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(lines([{"prompt": str(number)} for number in range(3000)]).encode())
    assert len(read(write(tmp_path / f"a.ndjson.{suffix}", whole))) == 3000
    path = write(tmp_path / f"b.ndjson.{suffix}", whole[:-20])
    with pytest.raises(InputError, match=rf"^{path} cannot be read: .*(Truncated|end-of-stream)"):
        read(path)


# Files that differ


def test_files_may_differ_in_columns_order_types_and_formats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in" / "a.jsonl", lines([{"prompt": "a", "meta": {"x": 1}, "n": 1}]))
    write(tmp_path / "in" / "b.jsonl", lines([{"extra": [1], "n": 0.5, "meta": "text", "prompt": "b"}]))
    write(tmp_path / "in" / "c.jsonl", "")
    pq.write_table(pa.table({"n": [3], "prompt": ["c"]}), tmp_path / "in" / "d.parquet")
    write(tmp_path / "in" / "e.csv", "meta,prompt\n7,d\n")
    with caplog.at_level(logging.INFO):
        prompts = read(tmp_path / "in" / "*")
    assert texts(prompts) == ["a", "b", "c", "d"]
    assert [row["meta"] for row in columns_of(prompts)] == [{"x": 1}, "text", None, "7"]
    kept = prompts.kept.table(0, 4)
    assert kept.column("n").to_pylist() == [1.0, 0.5, 3.0, None]
    assert kept.column("meta").to_pylist() == ['{"x": 1}', '"text"', None, '"7"']
    assert "1 of 5 files hold no rows: c.jsonl" in caplog.text
    assert "meta" in caplog.text


def test_column_that_is_not_read_is_not_held(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "a", "other": 1}]))
    prompts = read(path, "data.keep_columns=[]", columns=False)
    assert columns_of(prompts) == [{"prompt": "a"}]
    assert prompts.kept.schema.names == []


def test_file_without_the_prompt_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines([{"prompt": "a"}]))
    write(tmp_path / "b.jsonl", lines([{"text": "b"}]))
    with pytest.raises(InputError, match=r"prompt is not a column of .*b\.jsonl, which has text: write"):
        read(tmp_path / "*.jsonl")
    pq.write_table(pa.table({"prompt": [1.5]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"prompt holds double values in .*c\.parquet"):
        read(tmp_path / "c.parquet")


def test_integers_beyond_a_float_are_kept_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines([{"prompt": "a", "n": 2**60 + 1}]))
    write(tmp_path / "b.jsonl", lines([{"prompt": "b", "n": 0.5}]))
    prompts = read(tmp_path / "*.jsonl")
    assert [row["n"] for row in columns_of(prompts)] == [2**60 + 1, 0.5]
    assert prompts.kept.table(0, 2).column("n").to_pylist() == [str(2**60 + 1), "0.5"]


def test_text_of_parquet_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    prompts = read(tmp_path / "a.parquet")
    assert [row.error_class for row in prompts.rows(0, 2)] == ["", "bad_prompt"]
    assert prompts.kept.table(0, 2).column("prompt").to_pylist() == ["ok", "\ufffd"]


# Nested columns


BODY = [{"body": {"messages": [{"role": "user", "content": "hi"}], "id": "007"}}, {"body": None}]


def test_dotted_name_is_a_field_inside_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(BODY))
    prompts = read(path, "data.prompt_column=body.messages")
    assert texts(prompts) == [BODY[0]["body"]["messages"], None]  # type: ignore[index]
    assert read(path, "data.prompt_column=body.messages", "data.id_column=body.id", "data.limit=1").row_ids[:] == [
        "007"
    ]
    with pytest.raises(InputError, match=r"body\.nope holds null in every row, .* column body is"):
        read(path, "data.prompt_column=body.nope")


def test_column_with_a_dot_in_its_name_wins(tmp_path: Path) -> None:
    table = pa.table({"body": [{"x": "no"}], "body.x": ["yes"]})
    pq.write_table(table, tmp_path / "a.parquet")
    overrides = ("data.prompt_column=body.x", "data.keep_columns=[]")
    assert texts(read(tmp_path / "a.parquet", *overrides, columns=False)) == ["yes"]


def test_dotted_name_reads_an_object_that_is_stored_as_json_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'body\n"{""text"": ""hi""}"\nno object\n')
    assert texts(read(path, "data.prompt_column=body.text")) == ["hi", None]


# Error rows and refusals


def test_bad_row_is_one_error_that_names_file_and_line(tmp_path: Path) -> None:
    content = '{"prompt": "fine"}\n\n{"prompt": 5}\n{"other": "\\ud800"}\n'
    rows = list(read(write(tmp_path / "a.jsonl", content)).rows(0, 3))
    assert [row.error_class for row in rows] == ["", "bad_prompt", "bad_prompt"]
    assert rows[1].error.endswith("(a.jsonl line 3).")
    assert rows[2].error.endswith("(a.jsonl line 4).")


def test_lone_surrogate_stays_in_its_row_and_is_replaced_in_the_output(tmp_path: Path) -> None:
    prompts = read(write(tmp_path / "a.jsonl", '{"prompt": "a\\ud800"}\n{"prompt": "b"}\n'))
    bad, fine = prompts.rows(0, 2)
    assert (bad.error_class, bad.error) == ("bad_prompt", "The prompt is not valid Unicode (a.jsonl line 1).")
    assert fine.prompt == "b"
    tools = '{"prompt": [{"role": "user", "content": "\\ud800"}], "tools": [{"type": "function"}]}\n'
    (bad,) = read(write(tmp_path / "b.jsonl", tools)).rows(0, 1)
    assert bad.error_class == "bad_prompt"
    assert prompts.kept.table(0, 2).column("prompt").to_pylist() == ["a\ufffd", "b"]
    with pytest.raises(InputError, match=r"a\.jsonl line 1 .* not valid Unicode"):
        read(tmp_path / "a.jsonl", "data.id_column=prompt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,x\na,1\nb, with a comma,2\n", r"Line 3 of .*a\.csv has 3 fields, but its header has 2"),
        ("a.csv", 'prompt,x\na,1\n"b,2\nc,3\n', r"Line 3 of .*a\.csv begins a row with a broken quoted field"),
        ("a.csv", b"prompt\na\n\xe9\n", r"Line 3 of .*a\.csv cannot be read, as it is not UTF-8"),
        ("a.txt", b"a\n\xe9\n", r"Line 2 of .*a\.txt cannot be read, as it is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"},\n', r"Line 1 of .*a\.jsonl is not a complete JSON object \(Extra data\)"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": "b"}\n', r"Line 3 of .*it ends before its closing bracket"),
        ("a.json", '[{"prompt": "a"}]\n{}', r"Line 2 of .*Extra data"),
        ("a.json", '[{"prompt": "a"}\n{}]', r"Line 2 of .*Expecting ','"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": "\xff"}]', r"Line 2 of .* not UTF-8"),
        ("a.json", '["a"]', r"Line 1 of .*a\.json is \"a\", but must be a JSON object"),
        ("a.parquet", b"PAR1 cut short", r"a\.parquet cannot be read"),
        ("a.arrow", b"cut short", r"a\.arrow cannot be read"),
    ],
)
def test_file_that_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize(("value", "said"), [([1], "the list"), ({"a": 1}, "the dict"), (float("nan"), "no value")])
def test_value_that_is_no_id_is_refused(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl line 1.*{said}"):
        read(write(tmp_path / "a.jsonl", lines([{"prompt": "a", "id": value}])), ID)


def test_length_hints_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    hints = "data.length_hint_column=n"
    prompts = read(write(tmp_path / "a.csv", "prompt,n\na,12\nb,\nc,3.5\n"), hints)
    assert [row.length_hint for row in prompts.rows(0, 3)] == [12.0, None, 3.5]
    with pytest.raises(InputError, match=r"holds the text 'many' in b\.csv line 3"):
        read(write(tmp_path / "b.csv", "prompt,n\na,12\nb,many\n"), hints)


# What is read, and by whom


def test_limit_reads_only_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "a"}, {"prompt": "b"}]) + "not json\n")
    assert texts(read(path, "data.limit=2")) == ["a", "b"]
    write(tmp_path / "b.jsonl", "not json\n")
    assert len(read(tmp_path / "*.jsonl", "data.limit=1")) == 1


def test_processes_read_a_large_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": str(i), "x": i if i % 999 else "s"} for i in range(5000)]))
    in_memory = read(path)
    code = (
        "import datasets, rollout.data.reading as r; from tests.data.test_reading import read; r._IN_MEMORY_BYTES = 0;"
        f"datasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'cache')!r}; print(read({str(path)!r}).content)"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {worker.communicate()[0].strip() for worker in workers}
    monkeypatch.setattr(reading, "_IN_MEMORY_BYTES", 0)
    stored = read(path)
    assert digests == {in_memory.content} == {stored.content}
    assert stored.kept.digest() == in_memory.kept.digest()
    assert columns_of(stored)[997:1001] == columns_of(in_memory)[997:1001]
    assert len(list((tmp_path / "cache" / "rollout").glob("*.rows"))) == 1
    write(path, lines([{"prompt": "new"}]))
    assert texts(read(path)) == ["new"]


def test_broken_store_in_the_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_IN_MEMORY_BYTES", 0)
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "a"}]))
    read(path)
    (store,) = (tmp_path / "cache" / "rollout").glob("*.rows")
    store.write_bytes(b"torn")
    assert texts(read(path)) == ["a"]


# Other file systems


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_files_of_other_file_systems_are_read(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/d/a.jsonl", b'{"prompt": "a"}\n')
    memory.pipe("/d/b.csv.gz", gzip.compress(b"prompt\n007\n"))
    memory.pipe("/hub/data/test-00000-of-00001.jsonl", b'{"prompt": "t"}\n')
    assert texts(read("memory://d/a.jsonl")) == ["a"]
    assert texts(read("memory://d/*")) == ["a", "007"]
    assert texts(read("memory://hub", "data.split=test")) == ["t"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://d/nope.jsonl", "does not exist"),
        ("memory://d/*.jsonl", "matches no file"),
        ("nosuch://bucket/a.jsonl", "no known file system"),
    ],
)
def test_url_that_cannot_be_read_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(path)


def test_hub_dataset_is_streamed_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": str(i), "x": i} for i in range(50)]
    path = write(tmp_path / "a.jsonl", lines(rows))
    builder = datasets.load_dataset_builder("json", data_files={"train": [str(path)]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_args, **_kwargs: builder)
    monkeypatch.setattr(datasets, "load_dataset", None)  # which would download and prepare all of it
    limited = read("org/name", "data.limit=20")
    assert columns_of(limited) == rows[:20]
    streamed = read("org/name", "data.streaming=true")
    assert columns_of(streamed) == rows
    assert streamed.content == read(path).content


def test_types_of_a_hub_dataset_of_csv_files_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.csv", "prompt,x\na,007\n")
    loaded = datasets.load_dataset("csv", data_files=str(path), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_kwargs: loaded)
    assert columns_of(read("org/name")) == [{"prompt": "a", "x": 7}]
    assert "hf://datasets/org/name/*.csv" in caplog.text
