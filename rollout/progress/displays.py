"""Where progress is drawn: a bar on a terminal, text that changes in a notebook, or plain lines."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rollout.logs import reader_may_go

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.25
_NOTEBOOK_WIDTH = 100


@dataclass(frozen=True, slots=True)
class View:
    """What is drawn."""

    share: float
    """Done share of the work, from 0 to 1."""
    line: str


class Display(Protocol):
    """Draws views from `start` to `stop`."""

    seconds: float
    """Time between two views."""

    def start(self) -> None: ...

    def draw(self, view: View) -> None: ...

    def stop(self) -> None: ...


def display_on(console: Console) -> Display:
    """Return the display for a console."""
    if console.is_jupyter:
        return _Notebook()
    return _WhileRead(_Terminal(console) if console.is_terminal else _Lines(console), console)


class StderrConsole(Console):
    """Stderr; where its reader has gone, printing raises an `OSError`."""

    def __init__(self, **others: Any) -> None:
        super().__init__(stderr=True, **others)

    def on_broken_pipe(self) -> None:
        """Raise the error on: rich would end the process, and with it the job."""
        raise


class _WhileRead:
    """A display whose reader may go, which is no failure of what it shows."""

    def __init__(self, display: Display, console: Console) -> None:
        self._display = display
        self._console = console
        self.seconds = display.seconds

    def start(self) -> None:
        with reader_may_go(self._console.file):
            self._display.start()

    def draw(self, view: View) -> None:
        with reader_may_go(self._console.file):
            self._display.draw(view)

    def stop(self) -> None:
        with reader_may_go(self._console.file):
            self._display.stop()


class _Lines:
    """A line every few seconds, for logs."""

    seconds = PLAIN_SECONDS

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self) -> None:
        pass

    def draw(self, view: View) -> None:
        self._console.print(view.line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        pass


class _Terminal:
    """A bar below everything else that is printed."""

    seconds = LIVE_SECONDS

    def __init__(self, console: Console) -> None:
        # Output that is piped elsewhere must not be printed above the bar.
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=1.0)
        self._redirected = ExitStack()

    def start(self) -> None:
        stderr = sys.stderr
        self._bar.start()
        self._redirected.enter_context(_log_handlers_follow(stderr))

    def draw(self, view: View) -> None:
        self._bar.update(self._task, completed=view.share, description=view.line)
        self._bar.refresh()

    def stop(self) -> None:
        self._redirected.close()
        self._bar.stop()


class _Notebook:
    """Text below a cell. Every notebook can replace text; rich's own display needs ipywidgets."""

    seconds = LIVE_SECONDS

    def __init__(self) -> None:
        self._handle: Any = None

    def start(self) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def draw(self, view: View) -> None:
        console = Console(file=io.StringIO(), width=_NOTEBOOK_WIDTH, force_jupyter=False, force_terminal=False)
        bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=console)
        bar.update(bar.add_task(view.line, total=100), completed=round(100 * view.share))
        with console.capture() as text:
            console.print(bar.get_renderable())
        self._handle.update({"text/plain": text.get().rstrip()}, raw=True)

    def stop(self) -> None:
        pass


@contextmanager
def _log_handlers_follow(stderr: object) -> Iterator[None]:
    """Let log handlers that hold the original stderr print above the bar, as ``sys.stderr`` does meanwhile."""
    loggers = [
        logging.root,
        *(log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)),
    ]
    held = {
        handler: handler.stream
        for log in loggers
        for handler in log.handlers
        if type(handler) is logging.StreamHandler and handler.stream is stderr
    }
    for handler in held:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in held.items():
            handler.setStream(stream)
