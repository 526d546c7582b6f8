"""What a job says: its log lines, and what it prints."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TextIO


class StderrHandler(logging.StreamHandler[TextIO]):
    """Write each log line to the current ``sys.stderr``.

    While a live progress line runs, ``sys.stderr`` is a stream that prints above that line; a handler that kept the
    original stream would write into the middle of it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        with reader_may_go(self.stream):
            raise


class LineFormatter(logging.Formatter):
    """Format a record as its time and its sentence, after the rank where a launch, or a step of SLURM, has several."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(f"{_rank()}%(asctime)s %(prefix)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)


def _rank() -> str:
    for ranks, rank in (("WORLD_SIZE", "RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        if int(os.environ.get(ranks) or 1) > 1:
            return f"[rank {os.environ.get(rank) or 0}] "
    return ""


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print for the user, on stdout unless another stream is given; its reader may have gone."""
    stream = sys.stdout if stream is None else stream
    with reader_may_go(stream):
        print(text, file=stream, end=end, flush=True)


@contextmanager
def reader_may_go(stream: IO[str]) -> Iterator[None]:
    """Let what is printed go nowhere once its reader has gone, as that of ``| head`` or a closed terminal."""
    try:
        yield
    except OSError:
        # The stream keeps what it could not write, and would fail again when the interpreter flushes it.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
