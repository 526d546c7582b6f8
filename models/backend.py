"""Which attention reads the pages: a kernel where one serves them, else gathering."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch

from rollout.models.attention import Scores
from rollout.models.compiled import CompiledAttention, Kernel, kernel
from rollout.models.gather import GatherStep
from rollout.models.packed import Packed
from rollout.models.paged import PagedStep
from rollout.models.pages import PagePool
from rollout.models.spread import SpreadSteps

logger = logging.getLogger(__name__)


class CompiledStep(PagedStep):
    """The compiled kernel writes new keys and values and attends to all, page by page, in place."""

    name: ClassVar[str] = "compiled"

    def __init__(self, pool: PagePool, packed: Packed, compiled: Kernel) -> None:
        super().__init__(pool, packed)
        self._attention = CompiledAttention(compiled, pool, packed.tables, packed.starts, packed.lengths)

    def compute(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """See `PagedStep.compute`."""
        return self._attention(index, q, k, v, scores)


class Steps(Protocol):
    """Makes the step that answers the attention calls of one forward."""

    @property
    def name(self) -> str:
        """See `PagedStep.name`."""
        ...

    def __call__(self, pool: PagePool, packed: Packed) -> PagedStep: ...


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """Makes steps by the compiled kernel."""

    compiled: Kernel
    name: ClassVar[str] = CompiledStep.name

    def __call__(self, pool: PagePool, packed: Packed) -> CompiledStep:
        return CompiledStep(pool, packed, self.compiled)


def fastest(pool: PagePool) -> Steps:
    """The fastest attention for the layout and device of ``pool``; of several devices, each has its own."""
    if len(pool.parts) > 1:
        return SpreadSteps([fastest(part) for part in pool.parts])
    layout, device = pool.layout, pool.device
    if device.type == "cuda" and layout.sites:
        dims = frozenset((site.key_dim, site.value_dim) for site in layout.sites)
        if _triton_serves(dims, layout.dtype, device):
            from rollout.models.triton_attention import TritonSteps

            return TritonSteps(pool)
    compiled = kernel() if device.type == "cpu" else None
    if compiled is not None and compiled.supports(layout, device):
        return CompiledSteps(compiled)
    return GatherStep


@cache
def _triton_serves(dims: frozenset[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton's kernels serve keys and values of such sizes on a GPU; where they do not, a warning says why.

    Found out once, by trying: whether Triton can compile on a machine cannot be known otherwise.

    Raises:
        torch.OutOfMemoryError: there is no room to try.
    """
    try:
        # Comes with torch's builds for GPUs, and with no other.
        from rollout.models.triton_attention import check

        check(dims, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of Triton, its compilers and drivers, each with their own
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        logger.warning(
            "Triton's attention is not used on %s, pages are gathered instead, which is slower: %s: %s.",
            torch.cuda.get_device_name(device),
            type(error).__name__,
            first_line,
        )
        return False
    return True
