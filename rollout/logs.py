"""The log handler of a job."""

from __future__ import annotations

import logging
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
