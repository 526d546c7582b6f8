"""Send metrics to a tracker, through accelerate."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollout.models.errors import clause
from rollout.tracking.trackers import STARTS

logger = logging.getLogger(__name__)

#: Lines that may wait for a slow tracker; later ones are left out.
_WAITING_LINES = 256
#: How long the process waits at its end for the tracker.
_FINISH_SECONDS = 60.0
_NO_NUMBERS = ("time", "worker", "attempt")
#: Counts by step time are for sums over a run: each would be a chart of its own, of a few points.
_NO_CHARTS = ("step_ms_counts",)


class Tracking:
    """Log lines of metrics from a thread of its own, so that no tracker stops or slows the work.

    The first failure is logged, and the work goes on without the tracker.

    Args:
        name: a key of `TRACKERS`.
        folder: where the tracker writes its files, unless its own environment variables say otherwise.
        run_name: name of the run among those of the project.
        config: logged as hyperparameters.
    """

    def __init__(self, name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._folder = folder
        self._run_name = run_name
        self._config = config
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING_LINES)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log the numbers of a line of metrics."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            # A job's file of metrics has them all.
            return

    def start(self) -> None:
        """Start the tracker's run."""
        self._thread.start()

    def close(self) -> None:
        """Finish the tracker's run, and wait for it."""
        try:
            self._lines.put(None, timeout=_FINISH_SECONDS)
        except queue.Full:
            return
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "tracker=%s did not finish in %.0f s; the process ends without it.", self._name, _FINISH_SECONDS
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        lines = iter(self._lines.get, None)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            from accelerate import PartialState

            # Its trackers and its log need one; several ranks have it already.
            PartialState(cpu=True)
            tracker = STARTS[self._name](self._folder, self._run_name)
            tracker.start()
            tracker.store_init_configuration(dict(_flat(self._config)))
            for step, line in enumerate(lines, 1):
                tracker.log(numbers_of(line), step=step)
            tracker.finish()
        except BaseException as error:  # noqa: BLE001  # whatever a tracker does, the work goes on
            logger.warning("tracker=%s failed, and the work goes on without it: %s.", self._name, clause(error))
            # Those to come; none where it failed at its end.
            for _ in lines:
                pass


def numbers_of(line: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the metrics of a line by their names."""
    line = {name: value for name, value in line.items() if name not in _NO_CHARTS}
    return {name: value for name, value in _flat(line) if _is_metric(name, value)}


def _is_metric(name: str, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_NUMBERS


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, named ``outer/inner``; what is no number or text, as text."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value if isinstance(value, str | int | float) else str(value)
