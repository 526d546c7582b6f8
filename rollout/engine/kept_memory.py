"""Memory that is kept between calls: KV of sessions, and the CUDA graphs of any engine."""

from __future__ import annotations

import logging
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

from rollout.engine.kv_memory import IdleMemory, KVMemory
from rollout.errors import InputError
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.runners.base import Runner

logger = logging.getLogger(__name__)

_SESSION_SLAB_TOKENS = 2048


class KVKey(NamedTuple):
    """What the keys and values of a token depend on, besides the tokens."""

    layout: KVLayout
    autocast: object
    """The caller's, as `LiveModule.autocast` gives it."""
    weights: int
    """Changes of the weights so far."""


class Kept(NamedTuple):
    """What one call leaves to the next."""

    kv: KVMemory
    runner: Runner | None
    """A runner on ``kv`` that has kept what it prepared; None: it had nothing."""


class _Held(NamedTuple):
    kept: Kept
    key: KVKey
    moves: int
    """Changes of the module's structure so far (`rollout.engine.live_module.Seen`)."""


class KeptMemory:
    """The KV memory of one session or engine, and the runner on it.

    A call takes it and puts it back; if the call fails, it is lost. Threads may use it at the same time: of two calls,
    the second finds nothing.

    Args:
        limit: most bytes to keep between calls.
        runner_limit: if that is more, most bytes to keep of what a runner has prepared; it stays with an empty pool.
    """

    def __init__(self, limit: float = math.inf, runner_limit: float = 0) -> None:
        self.limit = limit
        self._runner_limit = max(limit, runner_limit)
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self.closed = False

    @property
    def slab_tokens(self) -> int:
        """Tokens that a slab has at least, memory permitting: the first call may be the smallest.

        A slab that a session keeps should not be much larger than what is in it.
        """
        return _SESSION_SLAB_TOKENS if self.limit else sys.maxsize

    @property
    def bytes_held(self) -> int:
        """Bytes of KV that are kept; 0 while a call has them."""
        held = self._held
        return 0 if held is None else held.kept.kv.bytes_held

    @property
    def runner_bytes(self) -> int:
        """`Runner.bytes_kept` of the runner that is kept; 0 while a call has it."""
        held = self._held
        return 0 if held is None or held.kept.runner is None else held.kept.runner.bytes_kept

    def take(self, key: KVKey, moves: int) -> Kept | None:
        """Return what the session keeps that is of use under ``key``, or None.

        Keys and values of other weights are dropped. A runner stays with their empty pool, unless the module's
        structure has changed, or the pool would grow too coarsely in the memory that is left by now.

        Raises:
            InputError: the session is closed.
        """
        if self.closed:
            raise InputError("The session is closed: open another with engine.session().")
        held = self._swap(None)
        if held is None:
            return None
        kv, runner = held.kept
        if runner is not None and held.moves != moves:
            runner.close()
            runner = None
        if held.key != key:
            if runner is None or held.key._replace(weights=key.weights) != key:
                _free(held)
                return None
            kv.cache.clear()
            kv.shrink_to(0)
        kv.begin_call(0 if runner is None else runner.bytes_kept)
        if not kv.bytes_held and kv.is_coarse:
            _free(held)
            return None
        return Kept(kv, runner)

    def put(self, kv: KVMemory, key: KVKey, runner: Runner, moves: int) -> None:
        """Keep the memory of a call that has ended, within the limit, unless the session has been closed."""
        if self.closed:
            runner.close()
            return
        prepared = runner.rest(self._runner_limit)
        kv.shrink_to(max(0, self.limit - prepared))
        _free(self._swap(_Held(Kept(kv, runner if prepared else None), key, moves)))

    def release(self) -> None:
        """Free all."""
        _free(self._swap(None))

    def _swap(self, held: _Held | None) -> _Held | None:
        """Keep ``held``; return what was kept."""
        with self._lock:
            previous, self._held = self._held, held
        return previous


def _free(held: _Held | None) -> None:
    """Free what was kept; KV goes with its last reference."""
    if held is not None and held.kept.runner is not None:
        held.kept.runner.close()


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

    @property
    def runner_bytes(self) -> int:
        """See `IdleMemory.runner_bytes`."""
        return sum(kept.runner_bytes for kept in self._alive())

    def release(self) -> bool:
        """Free what sessions keep between their calls. Return whether there was any."""
        held = self.bytes_held + self.runner_bytes
        for kept in self._alive():
            kept.release()
        if held:
            logger.info("Freed %d bytes that sessions kept, since other work needs the memory.", held)
        return held > 0
