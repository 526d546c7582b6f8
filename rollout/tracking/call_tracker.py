"""The tracker of a library's engine: one that is named, or one of the caller's own."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollout.errors import InputError, shorten
from rollout.models.errors import clause
from rollout.tracking.trackers import PROJECT, TRACKERS, check_tracker
from rollout.tracking.tracking import Tracking, numbers_of

logger = logging.getLogger(__name__)

FOLDER = Path("trackers")
"""Where a named tracker writes its files, unless its own environment variables say otherwise."""
_PREFIX = "rollout/"

LogLine = Callable[[Mapping[str, Any]], None]


def start_tracker(tracker: Any, owner: object, config: Mapping[str, Any]) -> LogLine | None:
    """Return what logs lines of metrics; None if nothing does.

    A named tracker has one run, which ends with its owner or the process. Of several ranks, only the first has one.

    Args:
        tracker: a name of `TRACKERS`, ``none``, None, or a tracker of accelerate's.
        config: logged as hyperparameters by a named tracker.

    Raises:
        InputError: there is no such tracker, its package is missing, or accelerate knows nothing of the other ranks.
    """
    if tracker is None or tracker == "none":
        return None
    if not isinstance(tracker, str):
        return _GivenTracker(tracker).log
    if tracker not in TRACKERS:
        raise InputError(f"tracker is {tracker!r}, but must be one of none, {', '.join(TRACKERS)}.")
    check_tracker(tracker)
    if int(os.environ.get("RANK") or 0):
        return None
    _prepare_accelerate()
    tracking = Tracking(tracker, FOLDER, f"{PROJECT}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", config)
    tracking.start()
    weakref.finalize(owner, tracking.close)
    return tracking.log


def _prepare_accelerate() -> None:
    """Give accelerate's trackers the state that they need, as an ``Accelerator`` made later would.

    Raises:
        InputError: this process is one of several that have not met yet; only all of them together can.
    """
    from accelerate import PartialState
    from torch import distributed

    known = PartialState._shared_state or distributed.is_initialized()
    if not known and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError("tracker needs accelerate's state: make an Accelerator or a PartialState before the engine.")
    PartialState()


class _GivenTracker:
    """Logs to a tracker of the caller's, from the caller's thread, because some trackers' runs belong to a thread.

    Names begin with ``rollout/``, and steps count the lines.

    Raises:
        InputError: the object is no tracker of accelerate's.
    """

    def __init__(self, tracker: Any) -> None:
        from accelerate.tracking import GeneralTracker

        if not isinstance(tracker, GeneralTracker):
            raise InputError(
                f"tracker is {shorten(repr(tracker), 60)}, but must be none, {', '.join(TRACKERS)}, or a tracker "
                "of accelerate's, such as Accelerator.get_tracker returns."
            )
        self._tracker: Any = tracker
        self._lines = 0

    def log(self, line: Mapping[str, Any]) -> None:
        """Log the numbers of a line of metrics; after a failure, none any more."""
        if self._tracker is None:
            return
        self._lines += 1
        try:
            self._tracker.log({f"{_PREFIX}{name}": value for name, value in numbers_of(line).items()}, step=self._lines)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a tracker does, the call goes on
            logger.warning("The tracker failed, and generation goes on without it: %s.", clause(error))
            self._tracker = None
