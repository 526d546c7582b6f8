"""Rotary embeddings that depend on a text's length: each token of a forward follows its own text.

With longrope, transformers takes other frequencies for a whole forward once its largest position passes the length that
the model was first trained on. Here texts of all lengths share a forward, and a token's embedding must not depend on
its company: while a module is on loan, its rotary embeddings are computed for either side of that length where both
occur, by giving them positions of that side alone.

With dynamic scaling the frequencies depend on the length itself, and stay behind in the module. Texts end before
they would change (`rollout.models.module.context_limit`), and what an owner's longer text has left is taken out for
the loan.
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

_lengths: ContextVar[IntArray | None] = ContextVar("rollout_text_lengths", default=None)


@contextmanager
def use_sequence_lengths(lengths: IntArray) -> Iterator[None]:
    """Tells rotary embeddings, inside this block, how long the text of each token is.

    Args:
        lengths: known tokens of each text, in a shape that broadcasts to that of the position ids, [b, t].
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
        """Whether there are any."""
        return bool(self._longrope or self._dynamic)

    @property
    def boundary(self) -> int | None:
        """Texts longer than this are computed otherwise, from their first token on; None where length does not matter.

        Raises:
            UnsupportedModel: there are several such lengths.
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
                stack.enter_context(_kept(module))
            for module in self._dynamic:
                _forget_longer_texts(module)
            for module in self._longrope:
                module.forward = _following(module.forward, _boundaries(module))
            yield


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of rotary embedding by layer type; by None where there is one for all."""
    kind = getattr(module, "rope_type", None)
    return dict(kind) if isinstance(kind, dict) else {None: kind} if isinstance(kind, str) else {}


def _boundaries(module: nn.Module) -> dict[str | None, int]:
    """The length beyond which longrope takes other frequencies, by layer type."""
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    return {
        layer_type: int((parameters if layer_type is None else parameters[layer_type])[_ORIGINAL])
        for layer_type, kind in _kinds(module).items()
        if kind == "longrope"
    }


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Whatever a module keeps inside this block, attributes and contents of buffers, is undone after it."""
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


def _forget_longer_texts(module: nn.Module) -> None:
    """Dynamic frequencies go back to the original ones when a text within the original length comes."""
    for layer_type, kind in _kinds(module).items():
        if kind == "dynamic":
            device = next(module.buffers()).device
            position = torch.zeros(1, 1, dtype=torch.int64, device=device)
            module(position.float(), position, **({} if layer_type is None else {"layer_type": layer_type}))


def _following(own: Callable[..., Any], boundaries: dict[str | None, int]) -> Callable[..., Any]:
    """A rotary embedding's forward that follows `use_sequence_lengths`.

    As its own, it takes position ids [b, t] and returns cosines and sines [b, t, dim].
    """

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        def of(positions: torch.Tensor) -> Any:
            return own(x, positions) if layer_type is None else own(x, positions, layer_type)

        lengths, boundary = _lengths.get(), boundaries.get(layer_type)
        if lengths is None or boundary is None:
            return of(position_ids)
        long = lengths > boundary
        if not long.any():
            return of(position_ids)
        # One position more, beyond the boundary, decides for all.
        last = position_ids.new_full((position_ids.shape[0], 1), boundary)
        cos, sin = (tensor[:, :-1] for tensor in of(torch.cat([position_ids, last], 1)))
        if long.all():
            return cos, sin
        mask = uploaded(long, position_ids.device).expand(position_ids.shape)
        short_cos, short_sin = of(position_ids.masked_fill(mask, 0))
        return torch.where(mask[..., None], cos, short_cos), torch.where(mask[..., None], sin, short_sin)

    return forward
