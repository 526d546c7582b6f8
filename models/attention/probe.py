"""A short forward that records what each attention layer stores and which tokens it sees.

Configuration fields and keyword arguments are unreliable: some families pass a window that they do not use, others use
a window that they do not pass. Masks are reliable. A mask function registered under the attention's own name receives
the predicate that transformers would build the mask from. The probe classifies it at distant positions, and each
attention call shows which mask the layer got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionMaskInterface

from rollout.models.attention import interface
from rollout.models.errors import UnsupportedModel
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.module.attention_choice import use_implementation
from rollout.models.module.inspect import family_name, output_device, refuse_recurrent, vocabulary_size

MaskPredicate = Callable[[Any, Any, Any, Any], Any]

PROBE_TOKENS = 4
PAGE_SIZE = 16


def probe(model: nn.Module) -> KVLayout:
    """Return the KV layout of ``model``, which must be borrowed.

    Raises:
        UnsupportedModel: the model keeps recurrent states, makes no attention call, or has a mask that is not causal,
            causal within a window, or causal within chunks.
    """
    refuse_recurrent(model)
    positions = torch.arange(PROBE_TOKENS, device=output_device(model))[None]
    layers, dtype = attention_layers(model, position_ids=positions, use_cache=False)
    if dtype is None:
        raise UnsupportedModel(f"{family_name(model)} made no call through transformers' attention interface.")
    return KVLayout(layers, dtype, PAGE_SIZE)


def attention_layers(model: nn.Module, **arguments: object) -> tuple[tuple[AttentionLayer, ...], torch.dtype | None]:
    """Record the attention calls of a short forward with ``arguments``; return them and the dtype of all values.

    The dtype is None if the model makes no attention call.

    Raises:
        UnsupportedModel: a mask is not causal, causal within a window or chunks, or values have several dtypes.
    """
    recorder = _Recorder()
    ids = torch.arange(PROBE_TOKENS, device=output_device(model))[None] % vocabulary_size(model)
    with use_implementation(interface.PROBE_NAME), interface.use_attention(recorder):
        model(input_ids=ids, **arguments)
    if len(recorder.dtypes) > 1:
        dtypes = ", ".join(sorted(map(str, recorder.dtypes)))
        raise UnsupportedModel(f"{family_name(model)} has values of several dtypes: {dtypes}.")
    return tuple(recorder.layers), next(iter(recorder.dtypes), None)


class _Recorder:
    """Records every attention call and returns zeros."""

    def __init__(self) -> None:
        self.mask_kinds: list[MaskKind] = []
        self.layers: list[AttentionLayer] = []
        self.dtypes: set[torch.dtype] = set()

    def mask(self, *, q_length: int, kv_length: int, mask_function: MaskPredicate, **kwargs: Any) -> torch.Tensor:
        """Return a stand-in mask whose values are the index of its mask kind."""
        device = kwargs.get("device", "cpu")
        self.mask_kinds.append(classify(mask_function, kwargs.get("local_size")))
        return torch.full((1, 1, q_length, kv_length), float(len(self.mask_kinds) - 1), device=device)

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
        mask_kind = self.mask_kinds[int(attention_mask[0, 0, 0, 0])]
        self.layers.append(
            AttentionLayer(
                module=module,
                kv_heads=key.shape[1],
                key_dim=key.shape[-1],
                value_dim=value.shape[-1],
                mask_kind=mask_kind,
                device=value.device,
                group=query.shape[1] // key.shape[1],
            )
        )
        # Under autocast, rotary embeddings may return queries and keys in float32; values have the compute dtype.
        self.dtypes.add(value.dtype)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


def _record_mask(*_args: Any, **kwargs: Any) -> torch.Tensor:
    """Implement transformers' mask interface by this thread's recorder."""
    recorder = interface.current_attention()
    assert isinstance(recorder, _Recorder)
    return recorder.mask(**kwargs)


AttentionMaskInterface.register(interface.PROBE_NAME, _record_mask)


def classify(sees: MaskPredicate, size: int | None) -> MaskKind:
    """Return the mask kind of a predicate ``sees(batch, head, query, key)`` by evaluating it at distant positions.

    ``size`` is the window or chunk size that the model declares for it.

    Raises:
        UnsupportedModel: the mask is neither full nor a window or chunk of ``size`` tokens.
    """

    def agrees(mask_kind: MaskKind, query: int) -> bool:
        first = int(mask_kind.first_keys(np.array([query]))[0])
        inside = {first, (first + query) // 2, query}
        outside = {key for key in (first - 1, first // 2, query + 1) if key < first or key > query}
        return all(_sees(sees, query, key) for key in inside) and not any(
            _sees(sees, query, key) for key in outside if key >= 0
        )

    unit = size or 1024
    queries = [0, 1, unit - 1, unit, unit + 1, 3 * unit + unit // 2, 1000 * unit + 7]
    mask_kinds = [MaskKind(), MaskKind("window", size), MaskKind("chunk", size)] if size else [MaskKind()]
    for mask_kind in mask_kinds:
        if all(agrees(mask_kind, query) for query in queries):
            return mask_kind
    declared = f" of {size} tokens" if size else ""
    raise UnsupportedModel(f"A layer's attention mask is neither causal nor a window or chunk{declared}.")


def _sees(predicate: MaskPredicate, query: int, key: int) -> bool:
    zero = torch.zeros((), dtype=torch.int64)
    return bool(predicate(zero, zero, torch.tensor(query), torch.tensor(key)))
