"""Rotary embeddings that depend on sequence length: each token follows the length of its own sequence.

With longrope, transformers switches a whole forward to other frequencies once its largest position passes the length
that the model was first trained on. Here sequences of all lengths share a forward, and a token's embedding must not
depend on batch composition. While a module is borrowed, its rotary embeddings are computed once for each side of that
length, each time from positions of that side only.

With dynamic scaling the frequencies depend on the length itself and stay in the module. Sequences end before they would
change (`rollout.models.module.inspect.context_limit`), and frequencies left by a longer sequence of the caller are
reset while the module is borrowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from rollout.models.arrays import IntArray, uploaded
from rollout.models.errors import UnsupportedModel

_ORIGINAL = "original_max_position_embeddings"

_lengths: ContextVar[IntArray | None] = ContextVar("rollout_sequence_lengths", default=None)


@contextmanager
def use_sequence_lengths(lengths: IntArray) -> Iterator[None]:
    """Set the sequence length of each token for rotary embeddings inside this block.

    Args:
        lengths: known tokens of each sequence, in a shape that broadcasts to that of the position ids, [b, t].
    """
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


class Rotary:
    """The rotary embeddings of a model that depend on length."""

    def __init__(self, model: nn.Module) -> None:
        self._longrope = [module for module in model.modules() if "longrope" in _kinds(module).values()]
        self._dynamic = [module for module in model.modules() if "dynamic" in _kinds(module).values()]

    @property
    def depends_on_length(self) -> bool:
        """True if any rotary embedding of the model depends on length."""
        return bool(self._longrope or self._dynamic)

    @property
    def boundary(self) -> int | None:
        """Sequence length above which longrope switches frequencies for all tokens; None without longrope.

        Raises:
            UnsupportedModel: the model has several such lengths.
        """
        boundaries = {limit for module in self._longrope for limit in _boundaries(module).values()}
        if len(boundaries) > 1:
            raise UnsupportedModel(f"Rotary embeddings change at several lengths: {sorted(boundaries)}.")
        return next(iter(boundaries), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the embeddings follow `use_sequence_lengths` inside this block, and restore them after it."""
        with ExitStack() as stack:
            for module in (*self._longrope, *self._dynamic):
                stack.enter_context(_restored(module))
            for module in self._dynamic:
                _reset_dynamic(module)
            for module in self._longrope:
                module.forward = _length_aware(module.forward, _boundaries(module))
            yield


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Return the kind of rotary embedding by layer type, under None if all layers share one."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return dict(kind)
    return {None: kind} if isinstance(kind, str) else {}


def _boundaries(module: nn.Module) -> dict[str | None, int]:
    """Return the length above which longrope switches frequencies, by layer type."""
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    return {
        layer_type: int((parameters if layer_type is None else parameters[layer_type])[_ORIGINAL])
        for layer_type, kind in _kinds(module).items()
        if kind == "longrope"
    }


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Restore a module's attributes and the contents of its buffers after the block."""
    attributes = dict(vars(module))
    buffers = dict(module._buffers)
    contents = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
    try:
        yield
    finally:
        for name in vars(module).keys() - attributes.keys():
            del vars(module)[name]
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
        with torch.no_grad():
            for name, content in contents.items():
                buffer = buffers[name]
                if buffer is not None and not torch.equal(buffer, content):
                    buffer.copy_(content)


def _reset_dynamic(module: nn.Module) -> None:
    """Reset dynamic frequencies to the original ones, by a forward within the original length."""
    for layer_type, kind in _kinds(module).items():
        if kind == "dynamic":
            device = next(module.buffers()).device
            position = torch.zeros(1, 1, dtype=torch.int64, device=device)
            module(position.float(), position, **({} if layer_type is None else {"layer_type": layer_type}))


def _length_aware(own: Callable[..., Any], boundaries: dict[str | None, int]) -> Callable[..., Any]:
    """Return a forward of a longrope embedding that follows `use_sequence_lengths`.

    Like the module's own forward, it takes position ids [b, t] and returns cosines and sines [b, t, dim].
    """

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        def embed(positions: torch.Tensor) -> Any:
            return own(x, positions) if layer_type is None else own(x, positions, layer_type)

        lengths, boundary = _lengths.get(), boundaries.get(layer_type)
        if lengths is None or boundary is None:
            return embed(position_ids)
        long = lengths > boundary
        if not long.any():
            return embed(position_ids)
        # One extra position past the boundary makes the module use the long frequencies for all positions.
        last = position_ids.new_full((position_ids.shape[0], 1), boundary)
        cos, sin = (tensor[:, :-1] for tensor in embed(torch.cat([position_ids, last], 1)))
        if long.all():
            return cos, sin
        mask = uploaded(long, position_ids.device).expand(position_ids.shape)
        short_cos, short_sin = embed(position_ids.masked_fill(mask, 0))
        return torch.where(mask[..., None], cos, short_cos), torch.where(mask[..., None], sin, short_sin)

    return forward
