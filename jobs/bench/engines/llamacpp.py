"""llama.cpp with continuous batching over several sequences, through its C interface; greedy, which costs it least.

llama.cpp's programs have a server and fixed-length benchmarks, but no offline call over a list of requests, so the loop
is here: a row is a sequence, free sequences take waiting prompts, and one decode holds a token of every live row and
as much of the prompts as fits. A prompt that begins like one already computed starts from a copy of its keys and
values.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from jobs.bench.engines.harness import Bind, Generate, Setup
from jobs.bench.lib.workload import Request

BATCH = 2048
"""Most tokens of one decode."""
UBATCH = 512
"""Most tokens of one pass over the weights."""
ROWS = 128
CELLS = 65_536
"""Most tokens with keys and values: 1.5 GB for SmolLM2-135M."""
WORTH = 32
"""Tokens that a common beginning must have to be copied."""


@dataclass(slots=True)
class Row:
    """A live request in its sequence."""

    request: Request
    done: int = 0
    """Prompt tokens with keys and values."""
    output: int = 0
    token: int = -1
    """The last one, whose keys and values are still missing."""

    @property
    def prefilling(self) -> bool:
        return self.done < len(self.request.ids)


def prepare(setup: Setup) -> Bind:
    """Load the model; the cap is the number of sequences. Each workload gets a context of its size."""
    if setup.device != "cpu":
        raise SystemExit("this runs llama.cpp on a CPU only")
    llama.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings: Any = llama.llama_model_default_params()
    model: Any = llama.llama_model_load_from_file(setup.model.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp does not load {setup.model}")
    batching: Batching | None = None

    def bind(requests: Sequence[Request]) -> Generate:
        nonlocal batching
        if batching is not None:
            batching.close()
        batching = Batching(model, requests, setup.cap or ROWS)
        return batching.run

    return bind


@llama.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _SILENT(level: int, text: bytes, data: Any) -> None:
    pass


class Batching:
    """One run over requests, in their order.

    Args:
        model: pointer to a loaded model.
        requests: each gets exactly its number of tokens.
        cap: most sequences.
    """

    def __init__(self, model: Any, requests: Sequence[Request], cap: int) -> None:
        longest = max(len(request.ids) + request.n for request in requests)
        each = -(-longest // 256) * 256
        rows = max(1, min(cap, len(requests), CELLS // each))
        threads = len(os.sched_getaffinity(0))
        params: Any = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = each * rows, rows
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context: Any = llama.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp makes no context of this size")
        self._memory: Any = llama.llama_get_memory(self._context)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch: Any = llama.llama_batch_init(BATCH, 0, 1)
        self._waiting = list(requests)
        self._live: dict[int, Row] = {}
        self._free = list(range(rows))
        self._cached: dict[int, tuple[int, ...]] = {}
        """Prompt tokens that a sequence, live or finished, has keys and values of."""

    def close(self) -> None:
        """Free the context."""
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)

    def run(self) -> int:
        """Generate; return the number of tokens."""
        tokens = 0
        while self._waiting or self._live:
            self._admit()
            tokens += self._step()
        return tokens

    def _admit(self) -> None:
        """Give free sequences to waiting requests; one that begins like a prompt in work waits for it."""
        still = list[Request]()
        for request in self._waiting:
            if not self._free:
                still.append(request)
                continue
            source, common = max(
                ((sequence, _common(request.ids, ids)) for sequence, ids in self._cached.items()),
                key=lambda pair: pair[1],
                default=(-1, 0),
            )
            coming = max(
                (_common(request.ids, row.request.ids) for row in self._live.values() if row.prefilling), default=0
            )
            if coming >= common + WORTH:
                still.append(request)
                continue
            # At least one token must be computed, for its logits.
            common = min(common, len(request.ids) - 1)
            sequence = source if source in self._free and common >= WORTH else self._free[0]
            self._free.remove(sequence)
            if common < WORTH:
                common = 0
                llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            else:
                if sequence != source:
                    llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    llama.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)
                llama.llama_memory_seq_rm(self._memory, sequence, common, -1)
            self._cached[sequence] = request.ids[:common]
            self._live[sequence] = Row(request, done=common)
        self._waiting = still

    def _step(self) -> int:
        """Decode one batch; return the number of tokens that came out."""
        batch, asked = self._batch, list[int]()
        batch.n_tokens = 0
        for sequence, row in self._live.items():
            if not row.prefilling:
                self._put(row.token, len(row.request.ids) + row.output - 1, sequence, True)
                asked.append(sequence)
        for sequence, row in self._live.items():
            if not row.prefilling:
                continue
            ids = row.request.ids
            for token in ids[row.done : row.done + BATCH - batch.n_tokens]:
                row.done += 1
                self._put(token, row.done - 1, sequence, row.done == len(ids))
            self._cached[sequence] = ids[: row.done]
            if row.done == len(ids):
                asked.append(sequence)
        status = llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gives {status}")
        if not asked:
            return 0
        at = ctypes.cast(llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        drawn = np.ctypeslib.as_array(at, (len(asked), self._vocabulary)).argmax(axis=1)
        for sequence, token in zip(asked, drawn.tolist(), strict=True):
            row = self._live[sequence]
            row.token, row.output = token, row.output + 1
            if row.output == row.request.n:
                del self._live[sequence]
                self._free.append(sequence)
        return len(asked)

    def _put(self, token: int, position: int, sequence: int, logits: bool) -> None:
        batch = self._batch
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.n_tokens = i + 1


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
