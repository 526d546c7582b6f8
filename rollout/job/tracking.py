"""Send a job's metrics to a tracker, through accelerate."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollout.config.schema import Config
from rollout.errors import InputError
from rollout.models.errors import clause

logger = logging.getLogger(__name__)

#: What `tracker=` may name, and the package of each.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
PROJECT = "rollout"
#: Lines that may wait for a slow tracker; later ones are left out.
_WAITING_LINES = 256
#: How long a job waits at its end for the tracker.
_FINISH_SECONDS = 60.0
_NO_NUMBERS = ("time", "worker", "attempt")


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        InputError: the package is missing.
    """
    if name != "none" and importlib.util.find_spec(TRACKERS[name]) is None:
        raise InputError(f"tracker={name} needs the package {TRACKERS[name]}: pip install 'rollout[{name}]'.")


class Tracking:
    """Log lines of metrics from a thread of its own, so that no tracker stops or slows the job.

    The first failure is logged, and the rest of the job goes on without the tracker.

    Args:
        name: a key of `TRACKERS`.
        folder: where the tracker writes its files, unless its own environment variables say otherwise.
        run_name: name of the run among those of the project.
    """

    def __init__(self, name: str, folder: Path, run_name: str, config: Config) -> None:
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
            # The file of metrics has them all.
            return

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._lines.put(None, timeout=_FINISH_SECONDS)
        except queue.Full:
            return
        self._thread.join(_FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("tracker=%s did not finish in %.0f s; the job ends without it.", self._name, _FINISH_SECONDS)

    def _work(self) -> None:
        try:
            from accelerate import PartialState

            # Its trackers and its log need one; several ranks have it already.
            PartialState(cpu=True)
            tracker = _STARTS[self._name](self._folder, self._run_name)
            tracker.start()
            tracker.store_init_configuration(dict(_flat(asdict(self._config))))
            step = 0
            while (line := self._lines.get()) is not None:
                step += 1
                tracker.log({name: value for name, value in _flat(line) if _is_metric(name, value)}, step=step)
            tracker.finish()
        except BaseException as error:  # noqa: BLE001  # whatever a tracker does, the job goes on
            logger.warning("tracker=%s failed, and the job goes on without it: %s.", self._name, clause(error))
            while self._lines.get() is not None:
                pass


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


def _tensorboard(folder: Path, run_name: str) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(run_name, str(folder))


def _wandb(folder: Path, run_name: str) -> Any:
    from accelerate.tracking import WandBTracker

    return WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=run_name, dir=str(folder))


def _trackio(folder: Path, run_name: str) -> Any:
    # Read when the package is imported.
    os.environ.setdefault("TRACKIO_DIR", str(folder))
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=run_name)


def _mlflow(folder: Path, run_name: str) -> Any:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(experiment_name=PROJECT, logging_dir=str(folder), run_name=run_name)


_STARTS: Mapping[str, Callable[[Path, str], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
