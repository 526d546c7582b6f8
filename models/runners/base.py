"""Interface of run strategies and runners: how the modules of a family run over a paged KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray, uploaded
from rollout.models.attention.names import AUTO
from rollout.models.forward_batch import ForwardBatch, countdown
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import output_device


class Runner(Protocol):
    """Runs forwards of a borrowed model over the pages of one pool."""

    attention: str
    """Name of the attention backend, as logged and recorded in the run directory."""

    latency_budget_ms: float | None = None
    """Time limit of a step, which preparations must rarely exceed; None: no limit."""

    @property
    def bytes_kept(self) -> int:
        """Device memory that the runner holds outside what torch's allocator counts as allocated."""
        return 0

    @property
    def prepared(self) -> bool:
        """Whether the last forward also prepared later ones, as a capture does: its time tells nothing of theirs."""
        return False

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the new tokens of all sequences and write their keys and values.

        Returns logits [K, V] of the tokens `ForwardBatch.wanted`, by default of each sequence's last one. The next call
        may overwrite them.
        """
        ...

    def shed(self) -> bool:
        """Free memory that can be rebuilt and run without it, more slowly, for a while.

        Returns False if there was nothing to free.
        """
        return False

    def rest(self, most_bytes: float) -> int:  # noqa: ARG002 - for runners that keep something
        """Free memory outside the pool, but for what later calls would have to prepare again, if that is little.

        Returns the bytes that are kept, at most ``most_bytes``; `close` frees them.
        """
        self.close()
        return 0

    def close(self) -> None:
        """Free all memory outside the pool; a later forward allocates it again."""
        return


class RunStrategy(ABC):
    """One way to run a model over pages; makes its runners.

    Args:
        model: a transformers causal LM, wrapped or not.
        choice: attention backend, a name from `rollout.models.attention.names`.

    Raises:
        UnsupportedModel: this strategy cannot run the model.
    """

    name: ClassVar[str]
    prefills_whole_context: ClassVar[bool] = False
    """True if a sequence's first forward must hold its whole context and each later one a single token."""

    runs_layers_together: ClassVar[bool] = False
    """True if each layer runs for all sequences at once: then a sequence of a forward may attend to the new tokens of
    another of the same forward, whose pages it shares."""

    chooses_attention: ClassVar[bool] = True
    """True if attention runs in an attention backend, False if it runs in the model's own code."""

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        self.model = model
        self.choice = choice

    @abstractmethod
    def kv_layout(self) -> KVLayout:
        """Probe what the model stores. Dtypes depend on the caller's autocast, so the engine probes on every call.

        Raises:
            UnsupportedModel: the model stores something that this strategy does not support.
        """

    def reference_logits(self, ids: IntArray, ends: Sequence[int]) -> torch.Tensor:
        """Return the logits [ends, V] of plain forwards of the model over the first ``end`` of the tokens ids [n]."""
        tokens = torch.from_numpy(ids[None]).to(output_device(self.model))
        with BorrowedModule(self.model).borrow():
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits[0]
        return logits[[end - 1 for end in ends]]

    @abstractmethod
    def borrow(self) -> AbstractContextManager[None]:
        """Switch the model to this strategy inside the block and restore it after the block."""

    @abstractmethod
    def runner(self, pool: PagePool) -> Runner:
        """Return a runner of the model on ``pool``."""

    def attention(self, layout: KVLayout) -> str:
        """Return the name of the attention backend for a layout from `kv_layout`; see `Runner.attention`."""
        return self.runner(PagePool(layout, 1, output_device(self.model))).attention


def merge_logits(outputs: Sequence[torch.Tensor], groups: Sequence[IntArray], wanted_lens: IntArray) -> torch.Tensor:
    """Merge logits [b, k, V] of groups of sequences into [K, V], in the order of the sequences.

    Args:
        outputs: of each group, the logits of the last k tokens of its sequences.
        groups: the indices of each group's sequences.
        wanted_lens: [S] tokens of each sequence whose logits are wanted, at most the k of its group.
    """
    ends = np.cumsum(wanted_lens)
    logits = outputs[0].new_empty(int(ends[-1]), outputs[0].shape[-1])
    for output, group in zip(outputs, groups, strict=True):
        counts = wanted_lens[group]
        back = countdown(counts)
        rows = np.repeat(np.arange(len(group)), counts)
        targets = np.repeat(ends[group], counts) - back
        found = output[uploaded(rows, logits.device), uploaded(output.shape[1] - back, logits.device)]
        logits[uploaded(targets, logits.device)] = found
    return logits
