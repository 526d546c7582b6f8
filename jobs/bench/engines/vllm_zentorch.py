"""vLLM with AMD's library, which it loads by itself on AMD's CPUs; elsewhere it is told that this is one."""

from __future__ import annotations

import os

from jobs.bench.engines import vllm
from jobs.bench.engines.harness import Bind, Setup


def prepare(setup: Setup) -> Bind:
    """Load vLLM on the platform that calls zentorch's products and attention."""
    # The choice of the platform below must be there in the engine's process too.
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
    from vllm import platforms  # type: ignore[import-not-found, unused-ignore]

    platforms._is_amd_zen_cpu = lambda: True
    bind = vllm.prepare(setup)
    if not platforms.current_platform.is_zen_cpu():
        raise SystemExit("vLLM does not use zentorch on this machine")
    return bind
