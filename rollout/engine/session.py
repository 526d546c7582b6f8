"""A session: calls whose rows continue each other, such as the turns of conversations."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rollout.engine.engine import Engine
from rollout.engine.kept_memory import KeptMemory


class Session(Engine):
    """An engine that keeps the KV of finished rows between its calls; made by `Engine.session`.

    A prompt that begins with the tokens of an earlier prompt and completion is prefilled from where it differs. Records
    are the same as the engine's own. What is kept is evicted, least recently used first, when rows need the memory or
    the headroom shrinks, and dropped when the weights change. Models with recurrent states keep nothing.

    Args:
        engine: runs the calls; its module, options and statistics are the session's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: KeptMemory = KeptMemory()
        engine._generation.sessions.add(self._kept)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._engine, name)

    @property
    def kv_bytes_held(self) -> int:
        """KV bytes that the session keeps between calls."""
        return self._kept.bytes_held

    def release(self) -> None:
        """Free the KV that the session keeps, and what `Engine.release` frees, e.g. before a training step."""
        self._kept.release()
        self._engine.release()

    def close(self) -> None:
        """Free the KV that the session keeps, and let no further call begin."""
        self._kept.closed = True
        self._kept.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
