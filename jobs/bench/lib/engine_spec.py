"""Parse engines named on the command line, and list the settings to try for each.

``NAME[:CAP][@DTYPE]``: the cap is the most rows in a batch. What is left out of a peer that has settings to choose is
tried out in the first turn: caps and precisions for those below; after that, only the best is run again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

OURS = "ours"
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Engine:
    """A kind of engine."""

    module: str
    """Module in ``jobs.bench.engines``."""
    peer: bool = False
    """Whether the engine runs in an environment of its own."""
    caps: tuple[int, ...] = ()
    """Row caps to try when none is given; empty where the engine chooses by itself."""
    dtypes: tuple[str, ...] = ()
    """Dtypes to try when none is given; empty where ``--dtype`` is used."""


# Try float32 first: on a CPU without bf16 instructions the other one can take an hour and is stopped early.
ENGINES = {
    OURS: Engine("rollout_engine"),
    "openvino": Engine("openvino", peer=True, caps=(128, 64, 256), dtypes=("float32", "bfloat16")),
    "vllm": Engine("vllm", peer=True, caps=(128, 64, 256), dtypes=("float32", "bfloat16")),
    "zentorch": Engine("vllm_zentorch", peer=True, caps=(128, 64, 256), dtypes=("bfloat16",)),
    "llamacpp": Engine("llamacpp", peer=True, caps=(128, 64, 256), dtypes=("bfloat16",)),
    "static": Engine("transformers_static", caps=(32, 8, 128)),
    "continuous": Engine("transformers_continuous"),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One engine with the settings given for it; prints as on the command line."""

    name: str
    cap: int | None = None
    dtype: str | None = None

    def __str__(self) -> str:
        return self.name + (f":{self.cap}" if self.cap else "") + (f"@{self.dtype}" if self.dtype else "")

    @property
    def engine(self) -> Engine:
        return ENGINES[self.name]


def parse(text: str) -> Spec:
    """Parse ``NAME[:CAP][@DTYPE]``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\w+)(?::([1-9]\d*))?(?:@(\w+))?", text)
    name, cap, dtype = match.groups() if match else ("", None, None)
    if name not in ENGINES or dtype not in (None, *DTYPES):
        known, dtypes = ", ".join(ENGINES), " or ".join(DTYPES)
        raise ValueError(f"no engine {text!r}: give NAME[:ROWS][@DTYPE], NAME of {known}, and DTYPE {dtypes}")
    return Spec(name, int(cap) if cap else None, dtype)


def settle(spec: Spec, dtype: str, seconds: Callable[[Spec, float | None], float | None]) -> Spec:
    """Return the setting that is repeated for ``spec``: the fastest of those that it leaves open.

    One setting is varied at a time, the dtype first: all pairs would take twice as long, and the two hardly depend on
    each other.

    Args:
        spec: as given on the command line.
        dtype: for engines that do not choose theirs.
        seconds: runs a candidate, and gives its time; None when it failed or took longer than its second argument,
            the best time so far. It is also called, once and without a limit, where there is nothing to choose.
    """
    dtypes = (spec.dtype,) if spec.dtype else spec.engine.dtypes or (dtype,)
    caps: tuple[int | None, ...] = (spec.cap,) if spec.cap else spec.engine.caps or (None,)
    candidates = [Spec(spec.name, caps[0], choice) for choice in dtypes]
    best, fastest = candidates[0], seconds(candidates[0], None)

    def challenge(candidate: Spec) -> None:
        nonlocal best, fastest
        taken = seconds(candidate, fastest)
        if taken is not None and (fastest is None or taken < fastest):
            best, fastest = candidate, taken

    for candidate in candidates[1:]:
        challenge(candidate)
    for cap in caps[1:]:
        challenge(replace(best, cap=cap))
    return best
