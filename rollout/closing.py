"""Close what is open even where some of it fails, and let the first failure be the one that is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


def do_all(*steps: Callable[[], object]) -> None:
    """Take all steps, although some fail, and raise the first failure."""
    failures: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # raised below
            if failures:
                logger.debug("Closing failed once more: %s", error)
            failures.append(error)
    if failures:
        raise failures[0]


@contextmanager
def closed_by(close: Callable[[], object]) -> Iterator[None]:
    """Call ``close`` at the end of the block. What it raises does not replace what the block has raised."""
    try:
        yield
    except BaseException:
        try:
            close()
        except Exception as error:  # noqa: BLE001  # the block's own is raised
            logger.debug("Closing failed as well: %s", error)
        raise
    close()
