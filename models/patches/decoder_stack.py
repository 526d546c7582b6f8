"""All decoder layers of a known model in one call of a compiled kernel, in place of one call a module.

When few rows decode, dispatching hundreds of small operations takes longer than their arithmetic. Weights are those
that `PackedLinears` packs and `FusedModules` reads, so the modules stay the trainer's. Forwards that the kernel does
not compute, such as one whose hidden states are wanted, take the modules' way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_void_p
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import BaseModelOutputWithPast

from rollout.models.attention.compiled import CompiledAttention
from rollout.models.attention.compiled_library import DTYPES, Addresses
from rollout.models.attention.interface import current_attention
from rollout.models.csrc import threads
from rollout.models.huge_pages import huge_empty
from rollout.models.patches.decoder_library import CDecoderLayer, CStack, DecoderLibrary, decoder_library
from rollout.models.patches.known_decoders import KnownDecoder, known_decoder
from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.patching import PatchedForward, patched

#: Settings with which a model also returns what is computed between its layers, or no dictionary.
_WANTED = ("output_hidden_states", "output_attentions")
_ALIGNMENT = 64


def decoder_stack(model: nn.Module, fused: FusedModules, linears: PackedLinears) -> DecoderStack | None:
    """Return the stack of a model's decoder layers, None if they are unknown, or the kernel or its threads missing."""
    decoder = known_decoder(model, fused, linears)
    if decoder is None:
        return None
    library = decoder_library()
    if library is None or threads.barrier() is None:
        return None
    return DecoderStack(decoder, library)


class DecoderStack:
    """A base model's forward that runs all layers at once, in force inside `applied`.

    Args:
        decoder: the base model and its patches, which this object reads anew when they have changed.
        library: the kernel.
    """

    def __init__(self, decoder: KnownDecoder, library: DecoderLibrary) -> None:
        self._decoder = decoder
        self._library = library
        self._own = decoder.model.forward
        self._parameters = [linear._parameters for layer in decoder.layers for linear in layer.linears]
        self._weights: list[torch.Tensor | None] = []
        self.products = [product for layer in decoder.layers for product in layer.products]
        """What the layers multiply with, in the order of the products."""
        self._norms = [norm for layer in decoder.layers for norm in (*layer.norms, *(layer.head_norms or ()))]
        self._norms.append(decoder.last_norm)
        self._layers = (CDecoderLayer * len(decoder.layers))()
        self._read: list[object] = []
        self._bound: Addresses | None = None
        self._planned: list[int] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        first = decoder.layers[0]
        self._stack = CStack(
            dtype=DTYPES[decoder.dtype],
            layers=len(decoder.layers),
            hidden=decoder.hidden,
            inner=decoder.inner,
            heads=first.shape.heads,
            kv_heads=first.shape.kv_heads,
            dim=first.shape.dim,
            late=first.norms[0].late,
            heads_late=first.head_norms is not None and first.head_norms[0].late,
            eps=first.norms[0].eps,
            heads_eps=0.0 if first.head_norms is None else first.head_norms[0].eps,
            scale=first.shape.scale,
            layer=addressof(self._layers),
            parallel=threads.parallel(),
            barrier=threads.barrier(),
            **library.functions,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the base model's forward inside the block, for this thread only."""
        # PEFT parametrizes some layers only while it calls them; such a weight is not the one that was packed.
        self._weights = [own.get("weight") for own in self._parameters]
        with patched([PatchedForward.of(self._decoder.model, self.forward)]):
            yield

    def release(self) -> None:
        """Free the working memory; the next forward allocates it again."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute what the base model's own forward does.

        Raises:
            MemoryError: there is no working memory.
        """
        attention, model = current_attention(), self._decoder.model
        others = (attention_mask, past_key_values, use_cache or None, *kwargs.values())
        if (
            not isinstance(attention, CompiledAttention)
            or (input_ids is None) == (inputs_embeds is None)
            or position_ids is None
            or any(value is not None for value in others)
            or not self._is_as_read(attention)
        ):
            return self._own(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cosines, sines = model.rotary_emb(hidden, position_ids=position_ids)
        tokens, dtype = attention.forward.tokens, self._decoder.dtype
        shapes = hidden.shape, cosines.shape, sines.shape
        rotated = (1, tokens, self._stack.dim)
        if (
            shapes != ((1, tokens, self._stack.hidden), rotated, rotated)
            or not hidden.dtype == cosines.dtype == sines.dtype == dtype
            or not tokens
        ):
            return self._own(position_ids=position_ids, inputs_embeds=hidden, use_cache=use_cache)
        out = self.run(attention, hidden.contiguous(), cosines.contiguous(), sines.contiguous())
        return BaseModelOutputWithPast(last_hidden_state=out)

    def _is_as_read(self, attention: CompiledAttention) -> bool:
        """Read the patches and the pool anew if they have changed; return whether the kernel can use them."""
        config = self._decoder.model.config
        if (
            torch.is_autocast_enabled("cpu")
            or _has_any_global_hook()
            or any(getattr(config, name, False) for name in _WANTED)
            or getattr(config, "return_dict", True) is False
            or not all(map(is_, (own.get("weight") for own in self._parameters), self._weights))
        ):
            return False
        read = [*(product.packed for product in self.products), *(norm.factors for norm in self._norms)]
        if len(read) != len(self._read) or not all(map(is_, read, self._read)):
            self._read_patches()
            self._read = read
        addresses = attention.forward.addresses
        if addresses is not self._bound:
            if not self._fits(attention):
                return False
            self._read_pool(attention)
            self._bound = addresses
        return True

    def _read_patches(self) -> None:
        """Take the addresses of the packed weights and of the norms' factors."""
        self._stack.last_norm = self._decoder.last_norm.factors.values.data_ptr()
        for c_layer, layer in zip(self._layers, self._decoder.layers, strict=True):
            weights = [product.packed.address for product in layer.products if product.packed is not None]
            c_layer.heads, c_layer.output, c_layer.gate_up, c_layer.down = weights
            norms = [norm.factors.values.data_ptr() for norm in (*layer.norms, *(layer.head_norms or ()))]
            c_layer.norm, c_layer.mlp_norm = norms[:2]
            c_layer.query_norm, c_layer.key_norm = norms[2:] or (None, None)

    def _fits(self, attention: CompiledAttention) -> bool:
        """Return whether the pool stores what the layers compute."""
        layout, layers = attention.layout, self._decoder.layers
        return (
            layout.dtype == self._decoder.dtype
            and len(layout.layers) == len(layers)
            and all(
                stored.module is layer.attention
                and stored.kv_heads == layer.shape.kv_heads
                and stored.key_dim == stored.value_dim == layer.shape.dim
                for stored, layer in zip(layout.layers, layers, strict=True)
            )
        )

    def _read_pool(self, attention: CompiledAttention) -> None:
        """Take the addresses of the pool's layers, and number the plans that they need."""
        forward, heads = attention.forward, self._stack.heads
        numbers: dict[object, int] = {}
        self._planned = []
        for index, (c_layer, stored) in enumerate(zip(self._layers, attention.layout.layers, strict=True)):
            if stored.mask_kind not in numbers:
                numbers[stored.mask_kind] = len(numbers)
                self._planned.append(index)
            c_layer.attention = addressof(forward.layer(index, heads))
            c_layer.plan = numbers[stored.mask_kind]

    def run(
        self, attention: CompiledAttention, hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        """Run all layers on hidden states [1, T, width] and angles [1, T, dim]; return the normed states."""
        forward, stack = attention.forward, self._stack
        out = torch.empty_like(hidden)
        plans = [forward.plan(index, stack.heads) for index in self._planned]
        c_plans = (c_void_p * len(plans))(*map(addressof, plans))
        stack.tokens = forward.tokens
        stack.threads = forward.threads
        stack.batch = addressof(forward.batch)
        stack.plans = addressof(c_plans)
        stack.embedded, stack.cosines, stack.sines = hidden.data_ptr(), cosines.data_ptr(), sines.data_ptr()
        stack.out = out.data_ptr()
        needed = self._library.bytes_needed(stack) + _ALIGNMENT
        if needed > len(self._memory):
            self.release()
            self._memory = huge_empty(needed)
        stack.memory = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._library.run(stack)
        return out
