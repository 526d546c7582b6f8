"""The log handler of a job, and how its lines look."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


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


class LineFormatter(logging.Formatter):
    """Format a record as its time and its sentence, after the rank where a launch has several."""

    def __init__(self, *_: object, **__: object) -> None:
        several = int(os.environ.get("WORLD_SIZE") or 1) > 1
        rank = f"[rank {os.environ.get('RANK') or 0}] " if several else ""
        super().__init__(f"{rank}%(asctime)s %(prefix)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)
