"""Let a worker's heart beat beside its work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rollout.closing import closed_by
from rollout.run_dir.workers import BEATS_PER_LEASE, Heartbeat


@contextmanager
def beating(heartbeat: Heartbeat, lease_seconds: float) -> Iterator[None]:
    """Beat until the block ends, and take the heartbeat away then.

    Raises:
        OSError: a heartbeat could not be written; raised when the block ends, unless it failed itself.
    """
    ended = threading.Event()
    failures: list[OSError] = []

    def beat() -> None:
        while not ended.wait(lease_seconds / BEATS_PER_LEASE):
            try:
                heartbeat.beat()
            except OSError as error:
                # The next one may succeed; what the worker itself writes says if the folder is gone.
                failures.append(error)
            else:
                failures.clear()

    with closed_by(heartbeat.close):
        heartbeat.beat()
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if failures:
            raise failures[-1]
