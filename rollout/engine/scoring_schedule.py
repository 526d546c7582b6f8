"""The schedule of a scoring call: which sequences wait and which hold pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from rollout.batcher.types import IntArray
from rollout.engine.kv_memory import KVMemory
from rollout.engine.scoring_sequences import ScoredSequence


class ScoringSchedule:
    """Owns the waiting sequences, those that hold pages, and these pages.

    Sequences are admitted in order and get the pages of all their tokens at once, so every admitted one can be
    finished. The next to wait shares the pages of admitted prefixes only.

    Args:
        kv: the page pool and the memory it may grow into.
        sequences: each after its prefix.
        whole_context: every forward of a sequence begins with its first token, so a preempted one keeps what is done.
        settle: reads pending log-probabilities and ends the sequences that are done; returns whether any were pending.
            Called before a preemption, which is not needed if other sequences have ended.
    """

    def __init__(
        self, kv: KVMemory, sequences: Iterable[ScoredSequence], *, whole_context: bool, settle: Callable[[], bool]
    ) -> None:
        self._kv = kv
        self._whole_context = whole_context
        self._settle = settle
        self._pages_for = kv.pool.layout.pages_for
        self._states = 1 if kv.pool.layout.states else 0
        self.queue = deque(sequences)
        self.live: list[ScoredSequence] = []
        """Sequences that hold pages, in order of admission; prefixes for as long as they are used."""

    def __bool__(self) -> bool:
        return bool(self.queue or self.live)

    def admit(self, tokens: int) -> int | None:
        """Admit waiting sequences until ``tokens`` tokens are to be computed, or memory ends.

        Returns the pages that the next sequence and its prefix need if it does not fit on an empty device, else None.
        """
        planned = self.planned_tokens
        while self.queue and planned < tokens:
            sequence = self.queue[0]
            shared = self._pages_for(sequence.shared)
            own = self._pages_for(len(sequence.ids)) - shared
            if not self._reserve(own):
                return None if planned else own + shared
            sequence.pages = self._kv.pool.allocate(own)
            sequence.states = self._kv.pool.states.allocate(self._states)
            self.live.append(self.queue.popleft())
            planned += sequence.remaining
        return None

    @property
    def planned_tokens(self) -> int:
        """Tokens of admitted sequences that are still to be computed."""
        return sum(sequence.remaining for sequence in self.live)

    def could_hold(self, pages: int) -> bool:
        """Return whether a sequence of so many pages would fit if no other process used the device."""
        return self._kv.could_hold(pages, self._states)

    def end(self, sequence: ScoredSequence, *, scrub: bool) -> None:
        """Let a finished pair leave, and its prefix with the last of its users.

        With ``scrub`` the pages are zeroed, since they hold numbers that are not finite.
        """
        self._leave(sequence, scrub)
        self._drop_user(sequence.prefix, scrub)

    def give_up(self) -> list[int]:
        """Remove the next waiting sequence and, of a prefix, all that share it; return their pairs."""
        sequence = self.queue.popleft()
        self.queue = deque(waiting for waiting in self.queue if waiting.prefix is not sequence)
        self._drop_user(sequence.prefix, scrub=False)
        return list(sequence.pairs)

    def preempt_youngest(self) -> bool:
        """Return the youngest sequence to the queue, dropping its pages. Return False if there is none.

        If log-probabilities were pending, only read them: sequences that end with them may free enough.
        """
        if self._settle():
            return True
        if not self.live:
            return False
        sequence = self.live[-1]
        self._leave(sequence, scrub=sequence.computed > sequence.shared)
        if not self._whole_context:
            sequence.computed = sequence.shared
        self.queue.appendleft(sequence)
        return True

    def shrink(self, excess_bytes: int) -> None:
        """Free at least ``excess_bytes``, preempting only when pages cannot be moved into other slabs."""
        self._kv.free(excess_bytes, self._held_pages, self._held_states, self.preempt_youngest)

    def drop_free_slabs(self) -> bool:
        """Compact pages and free the empty slabs, without preempting. Return whether any slab was freed."""
        return self._kv.shrink_free(self._held_pages(), self._held_states())

    def check_integrity(self) -> None:
        """Check that every page and state is accounted for; for tests."""
        self._kv.pool.check_integrity(self._held_pages())
        self._kv.pool.states.check_integrity(self._held_states())

    def close(self) -> None:
        """Drop all sequences and free all slabs."""
        while self.live:
            self._leave(self.live[-1], scrub=False)
        self.queue.clear()
        self.drop_free_slabs()

    def _reserve(self, pages: int) -> bool:
        """Reserve as `KVMemory.reserve` does, moving free slabs between KV pages and recurrent states if needed."""
        if self._kv.reserve(pages, self._states):
            return True
        return bool(self._states) and self.drop_free_slabs() and self._kv.reserve(pages, self._states)

    def _leave(self, sequence: ScoredSequence, scrub: bool) -> None:
        self.live.remove(sequence)
        self._kv.pool.release(sequence.pages, scrub)
        self._kv.pool.states.release(sequence.states)
        sequence.pages, sequence.states = sequence.pages[:0], sequence.states[:0]

    def _drop_user(self, prefix: ScoredSequence | None, scrub: bool) -> None:
        if prefix is None:
            return
        prefix.users -= 1
        if not prefix.users:
            # Numbers that are not finite may be those of the prefix.
            self._leave(prefix, scrub)

    def _held_pages(self) -> list[IntArray]:
        return [sequence.pages for sequence in self.live]

    def _held_states(self) -> list[IntArray]:
        return [sequence.states for sequence in self.live]
