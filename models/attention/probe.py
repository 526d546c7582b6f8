"""A short forward that learns the truth about a model's attention, layer by layer.

Configuration fields and keyword arguments do not tell reliably which tokens a layer sees: some families
pass a window that they do not use, others use one that they do not pass. Their masks tell. A mask
function registered under the attention's own name receives the predicate that transformers would build
the mask from; it is classified at far positions, and each layer's attention call shows which one it got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionMaskInterface

from rollout.models.attention import interface
from rollout.models.errors import UnsupportedModel
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.module.inspect import family_name, output_device, refuse_recurrent, vocabulary_size

MaskPredicate = Callable[[Any, Any, Any, Any], Any]

PROBE_TOKENS = 4
PAGE_SIZE = 16


def probe(model: nn.Module) -> KVLayout:
    """The KV layout of ``model``, which must be on loan.

    Raises:
        UnsupportedModel: the model keeps state besides keys and values, calls no attention, or masks it
            in a way that is not causal, causal in a window, or causal in chunks.
    """
    refuse_recurrent(model)
    positions = torch.arange(PROBE_TOKENS, device=output_device(model))[None]
    sites, dtype = attention_layers(model, position_ids=positions, use_cache=False)
    if dtype is None:
        raise UnsupportedModel(f"{family_name(model)} made no call through transformers' attention interface.")
    return KVLayout(sites, dtype, PAGE_SIZE)


def attention_layers(model: nn.Module, **arguments: object) -> tuple[tuple[AttentionLayer, ...], torch.dtype | None]:
    """The attention calls of a forward of a few tokens with ``arguments``, and the dtype of all values; or none.

    Raises:
        UnsupportedModel: a mask is not causal, causal in a window, or causal in chunks, or values differ in dtype.
    """
    step = _Probe()
    ids = torch.arange(PROBE_TOKENS, device=output_device(model))[None] % vocabulary_size(model)
    with _masks(step), interface.use_attention(step):
        model(input_ids=ids, **arguments)
    if len(step.dtypes) > 1:
        raise UnsupportedModel(f"{family_name(model)} has values of several dtypes: {sorted(map(str, step.dtypes))}.")
    return tuple(step.sites), next(iter(step.dtypes), None)


class _Probe:
    """Records every attention call; answers with zeros."""

    def __init__(self) -> None:
        self.spans: list[MaskKind] = []
        self.sites: list[AttentionLayer] = []
        self.dtypes: set[torch.dtype] = set()

    def mask(self, *, q_length: int, kv_length: int, mask_function: MaskPredicate, **kwargs: Any) -> torch.Tensor:
        """Stands in for a mask: its values say which span it was asked for."""
        device = kwargs.get("device", "cpu")
        self.spans.append(classify(mask_function, kwargs.get("local_size")))
        return torch.full((1, 1, q_length, kv_length), float(len(self.spans) - 1), device=device)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scores: interface.ScoreParams,  # noqa: ARG002 - part of the interface
    ) -> torch.Tensor:
        if not isinstance(attention_mask, torch.Tensor):
            raise UnsupportedModel(f"{type(module).__name__} attends without a causal mask.")
        span = self.spans[int(attention_mask[0, 0, 0, 0])]
        self.sites.append(AttentionLayer(module, key.shape[1], key.shape[-1], value.shape[-1], span, value.device))
        # Under autocast, queries and keys may come out of the rotary embedding in fp32: values tell.
        self.dtypes.add(value.dtype)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


@contextmanager
def _masks(step: _Probe) -> Iterator[None]:
    AttentionMaskInterface.register(interface.NAME, lambda *_args, **kwargs: step.mask(**kwargs))
    try:
        yield
    finally:
        del AttentionMaskInterface._global_mapping[interface.NAME]


def classify(sees: MaskPredicate, size: int | None) -> MaskKind:
    """The span of a mask predicate ``sees(batch, head, query, key)``, tried at far positions.

    ``size`` is the window or chunk size that the model states for it.

    Raises:
        UnsupportedModel: the predicate is none of full, window and chunk.
    """

    def agrees(span: MaskKind, query: int) -> bool:
        first = int(span.first_keys(np.array([query]))[0])
        inside = {first, (first + query) // 2, query}
        outside = {key for key in (first - 1, first // 2, query + 1) if key < first or key > query}
        return all(_true(sees, query, key) for key in inside) and not any(
            _true(sees, query, key) for key in outside if key >= 0
        )

    unit = size or 1024
    queries = [0, 1, unit - 1, unit, unit + 1, 3 * unit + unit // 2, 1000 * unit + 7]
    spans = [MaskKind(), MaskKind("window", size), MaskKind("chunk", size)] if size else [MaskKind()]
    for span in spans:
        if all(agrees(span, query) for query in queries):
            return span
    stated = f" of {size} tokens" if size else ""
    raise UnsupportedModel(f"A layer's attention mask is neither causal nor a window or chunk{stated}.")


def _true(sees: MaskPredicate, query: int, key: int) -> bool:
    zero = torch.zeros((), dtype=torch.int64)
    return bool(sees(zero, zero, torch.tensor(query), torch.tensor(key)))
