"""How many tokens a model can take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def context_limit(config: Any) -> int | None:
    """Most tokens of a sequence, from a transformers configuration; None when it states none.

    With dynamic rotary scaling, what a token stores depends on how long the batch was when it came, once that is
    beyond the original length, so rows end there: their results must not depend on company.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope.get("rope_type") == "dynamic":
            original = rope.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", None))
    stated = [int(limit) for limit in limits if limit]
    return min(stated) if stated else None


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters; some configurations nest them by layer type."""
    if isinstance(parameters, Mapping):
        yield parameters
        yield from (value for value in parameters.values() if isinstance(value, Mapping))
