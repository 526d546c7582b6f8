"""KV memory that sessions keep between their calls."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

from rollout.engine.kv_memory import IdleMemory, KVMemory
from rollout.errors import InputError
from rollout.models.kv_cache.layout import KVLayout

logger = logging.getLogger(__name__)


class KVKey(NamedTuple):
    """What the keys and values of a token depend on, besides the tokens."""

    layout: KVLayout
    autocast: object
    """The caller's, as `LiveModule.autocast` gives it."""
    weights: int
    """Changes of the weights so far."""


class KeptMemory:
    """The KV memory of one session, or of an engine that keeps prefixes.

    A call takes it and puts it back; if the call fails, it is lost. Threads may use it at the same time: of two calls,
    the second finds nothing.

    Args:
        limit: most bytes to keep between calls.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: tuple[KVMemory, KVKey] | None = None
        self.closed = False

    @property
    def bytes_held(self) -> int:
        """Bytes that are kept; 0 while a call has them."""
        held = self._held
        return 0 if held is None else held[0].bytes_held

    def take(self, key: KVKey) -> KVMemory | None:
        """Return what the session keeps, or None if it keeps nothing that was computed under ``key``.

        Raises:
            InputError: the session is closed.
        """
        if self.closed:
            raise InputError("The session is closed: open another with engine.session().")
        held = self._swap(None)
        if held is None or held[1] != key:
            return None
        kv, _ = held
        kv.begin_call()
        return kv

    def put(self, kv: KVMemory, key: KVKey) -> None:
        """Keep the memory of a call that has ended, within the limit, unless the session has been closed."""
        kv.shrink_to(self.limit)
        if not self.closed:
            self._swap((kv, key))

    def release(self) -> None:
        """Free all."""
        self._swap(None)

    def _swap(self, held: tuple[KVMemory, KVKey] | None) -> tuple[KVMemory, KVKey] | None:
        """Keep ``held``; return what was kept."""
        with self._lock:
            previous, self._held = self._held, held
        return previous


class OpenSessions(IdleMemory):
    """The memory of an engine's sessions; knows them only as long as they exist.

    What a session keeps is idle: while one of its calls runs, the call has it.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[KeptMemory], ...] = ()
        """Replaced as a whole, since other threads may be reading it."""

    def add(self, kept: KeptMemory) -> None:
        """Add a session's memory."""
        self._kept = (*(reference for reference in self._kept if reference() is not None), weakref.ref(kept))

    def _alive(self) -> Iterator[KeptMemory]:
        return (kept for reference in self._kept if (kept := reference()) is not None)

    @property
    def bytes_held(self) -> int:
        """Bytes that sessions keep between their calls."""
        return sum(kept.bytes_held for kept in self._alive())

    def release(self) -> bool:
        """Free what sessions keep between their calls. Return whether there was any."""
        held = self.bytes_held
        for kept in self._alive():
            kept.release()
        if held:
            logger.info("Freed %d bytes of KV that sessions kept, since other work needs the memory.", held)
        return held > 0
