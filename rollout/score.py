"""Add a model's log-probabilities to given completions: ``python -m rollout.score SOURCE --model PATH``."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.argument_parser import SentenceParser
from rollout.cli.ending import ending
from rollout.config.schema import DataConfig
from rollout.data.prompts import read_prompts
from rollout.errors import Exit, InputError
from rollout.job.stop_signals import stop_signals
from rollout.logs import say
from rollout.run_dir.file_system import LOCAL, contents, put
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.model_digests import weights_digest
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run, read_run_json
from rollout.run_dir.shards import read_manifest, read_shard

if TYPE_CHECKING:
    from rollout.engine.engine import Engine
    from rollout.models.loading.load import ModelSource

_EPILOG = (
    "SOURCE is the output.dir of a complete run, or a file that a job can read (Parquet, JSON, CSV) with a prompt "
    "and a completion in each row. DIR gets its rows with two more columns, and the same command resumes. "
    "Exit status: 0 all is scored; 4 some rows have an error; 2 the input cannot be used; 1 crashed; 75 stopped."
)
_PIECE_ROWS = 1024
"""Rows of a file that are scored and written together."""
_DESCRIPTION = "score.json"
"""The file that says what an output folder holds."""


class Rows(NamedTuple):
    """Rows that are scored together."""

    table: pa.Table
    """Their columns."""
    prompts: Sequence[Any]
    completions: Sequence[Any]
    errors: Sequence[str]
    """Why a row has no prompt or no completion; empty where it has both."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that become one file."""

    name: str
    read: Callable[[], Rows]


@dataclass(frozen=True, slots=True)
class Source:
    """What is scored."""

    digest: str
    """Of its content."""
    pieces: Iterable[Piece]
    temperature: float
    columns: tuple[str, str]
    """Of prompts and completions."""
    names: Sequence[str]
    """All columns of the rows."""


def run_source(folder: Path, temperature: float | None) -> Source:
    """Return the shards of a complete run.

    Raises:
        InputError: it is not complete, a shard differs from its manifest, or its rows have temperatures of their own.
    """
    paths = RunPaths(folder)
    run = read_run(paths)
    if not run.complete():
        raise InputError(f"{folder} holds a run that is not complete: resume it first.")
    config: Any = read_run_json(paths)["config"]
    if temperature is None and "temperature" in (config["data"].get("sampling_columns") or {}):
        raise InputError(f"The rows of {folder} have temperatures of their own: give one with --temperature.")

    def read(shard: int) -> Rows:
        path = paths.shard(shard, run.format)
        if file_sha256(path) != read_manifest(paths.manifest(shard)).sha256:
            raise InputError(f"{path} differs from its manifest: see python -m rollout.verify {folder}.")
        table = read_shard(path)
        columns = ("prompt_ids", "completion_ids", "finish_reason", "error")
        prompts, completions, reasons, errors = (table.column(name).to_pylist() for name in columns)
        failed = [error if reason == "error" else "" for reason, error in zip(reasons, errors, strict=True)]
        return Rows(table, prompts, completions, failed)

    pieces = [Piece(f"{shard:05d}.parquet", partial(read, shard)) for shard in range(run.shards)]
    sampled = float(config["sampling"]["temperature"])
    return Source(
        run.fingerprint.digest,
        pieces,
        sampled if temperature is None else temperature,
        columns=("prompt_ids", "completion_ids"),
        names=read_shard(paths.shard(0, run.format)).column_names,
    )


def file_source(
    path: Path, prompt_column: str, completion_column: str, column: str, temperature: float | None
) -> Source:
    """Return the rows of a file that a job could read, in pieces.

    Args:
        column: name of the new column.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give the output.dir of a run, or a file.")
    config = DataConfig(
        path=str(path),
        name=None,
        split="train",
        prompt_column=prompt_column,
        id_column=None,
        length_hint_column=None,
        lengths_from=None,
        limit=None,
        streaming=False,
        as_chat=False,
        system_prompt=None,
        keep_columns="all",
        sampling_columns=None,
        chat_template=None,
        chat_template_kwargs=None,
        tools=None,
        add_special_tokens="auto",
    )
    try:
        prompts = read_prompts(config, with_columns=True, record_columns=_added(column))
    except InputError as error:
        # The sentences are those of a job, which names its keys.
        message = str(error).replace("data.prompt_column=", "--prompt-column ").replace("data.path=", "")
        raise InputError(message) from error
    if completion_column not in prompts.kept.names:
        listed = ", ".join(prompts.kept.names)
        raise InputError(f"{path} has no column {completion_column!r}, but {listed}: give --completion-column.")

    def read(start: int) -> Rows:
        stop = min(start + _PIECE_ROWS, len(prompts))
        rows = list(prompts.rows(start, stop))
        return Rows(
            prompts.kept.table(start, stop).rename_columns(list(prompts.kept.names)),
            [row.prompt for row in rows],
            [row.columns[completion_column] for row in rows],
            [row.error for row in rows],
        )

    pieces = [
        Piece(f"{number:05d}.parquet", partial(read, start))
        for number, start in enumerate(range(0, len(prompts), _PIECE_ROWS))
    ]
    return Source(
        prompts.content,
        pieces,
        1.0 if temperature is None else temperature,
        columns=(prompt_column, completion_column),
        names=list(prompts.kept.names),
    )


def _added(column: str) -> tuple[str, str]:
    """Return the names of the columns that are added to rows."""
    return column, f"{column}_error"


def scored(rows: Rows, engine: Engine, temperature: float, column: str) -> pa.Table:
    """Return the rows with their log-probabilities and why they are missing, null and empty where they are not."""
    logprobs: list[list[float] | None] = [None] * len(rows.errors)
    errors = list(rows.errors)
    usable = [index for index, error in enumerate(errors) if not error]
    if usable:
        prompts, completions = ([values[index] for index in usable] for values in (rows.prompts, rows.completions))
        scores = engine.score(prompts, completions, temperature=temperature)
        for index, found, score in zip(usable, scores.logprobs, scores, strict=True):
            logprobs[index], errors[index] = found, score.error
    name, error_name = _added(column)
    table = rows.table.append_column(name, pa.array(logprobs, pa.list_(pa.float32())))
    return table.append_column(error_name, pa.array(errors, pa.string()))


def score_source(source: Source, engine: Engine, folder: Path, column: str) -> Iterator[pa.Table]:
    """Score the pieces that are not written yet, and yield the scored columns of all."""
    for piece in source.pieces:
        path = folder / piece.name
        if not path.exists():
            rows = piece.read()
            table = scored(rows, engine, source.temperature, column)
            put(LOCAL, path, folder / f".{piece.name}.tmp", partial(pq.write_table, table))
        yield pq.read_table(path, columns=list(_added(column)))


def check_output(folder: Path, description: dict[str, Any]) -> bool:
    """Return whether the output folder holds this work already.

    Raises:
        InputError: it holds something else, or cannot be read.
    """
    path = folder / _DESCRIPTION
    try:
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != description:
                raise InputError(f"{folder} holds the scores of another model or source: choose another --output.")
            return True
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise InputError(f"{folder} has files, but no {_DESCRIPTION}: choose another --output.")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return False


def begin_output(folder: Path, description: dict[str, Any]) -> None:
    """Create the output folder, and say there what it is going to hold.

    Raises:
        InputError: it cannot be written.
    """
    text = json.dumps(description, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        put(LOCAL, folder / _DESCRIPTION, folder / f".{_DESCRIPTION}.tmp", contents(text.encode()))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder} cannot be written ({error.strerror}): choose another --output.")


def weights_of(model: ModelSource) -> str:
    """Return the digest of a model's weights.

    Raises:
        InputError: there is no such model.
    """
    # Imported here because bad input is refused without it, and it takes seconds.
    from rollout.models.loading.checkpoint import locate

    with _naming_model(model.path):
        files = locate(model.path)
    weights = [weights_digest(file) for file in (files.model, files.adapter) if file is not None]
    return hashlib.sha256("".join(weights).encode()).hexdigest()


def load(model: ModelSource) -> Engine:
    """Load a model.

    Raises:
        InputError: it cannot be loaded or served.
    """
    from rollout.engine.engine import Engine
    from rollout.models.loading.checkpoint import has_tokenizer, locate
    from rollout.models.loading.load import load_model, load_tokenizer, resolve_device

    with _naming_model(model.path):
        files = locate(model.path)
        found = files.tokenizer.is_file() or has_tokenizer(files.tokenizer)
        return Engine(load_model(model, resolve_device(model.device)), load_tokenizer(model) if found else None)


@contextmanager
def _naming_model(path: str) -> Iterator[None]:
    """Turn errors of rollout.models into input errors that name the option of the parameter at fault."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        # Messages about a parameter begin with its name: "path 'x' does not exist".
        parameter, _, rest = str(error).partition(" ")
        options = {"path": "--model", "dtype": "--dtype", "device": "--device"}
        named = f"{options[parameter]} {rest}" if parameter in options else f"--model {path}: {error}"
        raise InputError(named) from error


def score(options: Any) -> Exit:
    """Score what the options name, and print a summary."""
    if options.temperature is not None and not 0 <= options.temperature < math.inf:
        raise InputError(f"--temperature is {options.temperature}, but must be a finite number of at least 0.")
    output = options.output.resolve()
    if options.source.resolve() in (output, *output.parents):
        raise InputError("--output lies in the source, which is never changed: choose another folder.")
    if options.source.is_dir():
        source = run_source(options.source, options.temperature)
    else:
        columns = (options.prompt_column, options.completion_column)
        source = file_source(options.source, *columns, options.column, options.temperature)
    if taken := set(_added(options.column)) & set(source.names):
        raise InputError(f"The rows have a column {taken.pop()!r} already: choose another name with --column.")
    from rollout.models.loading.load import ModelSource

    model = ModelSource(path=options.model, dtype=options.dtype, device=options.device)
    description = {
        "source": source.digest,
        "weights": weights_of(model),
        "dtype": options.dtype,
        "temperature": source.temperature,
        "columns": [*source.columns, options.column],
    }
    # Before the model is loaded, which takes minutes; what cannot be loaded is not written down.
    begun = check_output(options.output, description)
    engine = load(model)
    if not begun:
        begin_output(options.output, description)
    rows = errors = tokens = 0
    total = 0.0
    for table in score_source(source, engine, options.output, options.column):
        for logprobs in table.column(options.column).to_pylist():
            rows += 1
            errors += logprobs is None
            tokens += len(logprobs or ())
            total += math.fsum(logprobs or ())
    say(f"rows:       {rows:,}, {errors:,} with an error")
    say(f"tokens:     {tokens:,}")
    if tokens:
        say(f"perplexity: {math.exp(-total / tokens):.4g}")
    say(f"files:      {options.output}/*.parquet")
    return Exit.ERROR_ROWS if errors else Exit.COMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """Score and return the exit status."""
    parser = SentenceParser("python -m rollout.score", description=__doc__, epilog=_EPILOG)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the output.dir of a run, or a file")
    parser.add_argument("--model", metavar="PATH", required=True, help="folder, hub id or GGUF file of the model")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="a new folder, or one to resume")
    parser.add_argument("--temperature", type=float, help="default: the run's; 1 for a file")
    parser.add_argument("--column", default="ref_logprobs", help="name of the new column (default: %(default)s)")
    parser.add_argument("--prompt-column", default="prompt", help="of a file (default: %(default)s)")
    parser.add_argument("--completion-column", default="completion", help="of a file (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as model.dtype of a job (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as model.device of a job (default: %(default)s)")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folders = ["--output"]
    try:
        with stop_signals():
            options = parser.parse_args(arguments)
            folders = [str(options.output), str(options.source)]
            return score(options)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # whatever it is, the user is told what it means
        sentence, status = ending(error, *folders)
    say(sentence, sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
