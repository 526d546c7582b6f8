"""What a model's generation_config recommends, in this engine's sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

#: Fields with the same name and meaning, and the value that turns each off in transformers.
_SAME = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "max_new_tokens": None,
    "min_new_tokens": 0,
}
#: Fields that ``generate`` applies and no sampling parameter expresses, and the values that turn each off.
_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "min_length": (0,),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "watermarking_config": (),
    "renormalize_logits": (False,),
    "stop_strings": (),
}


def recommended_sampling(generation_config: Any) -> dict[str, Any]:
    """Return the sampling parameters that a generation_config sets, by our names.

    ``do_sample=False`` recommends temperature 0; ``suppress_tokens`` and biases of single tokens become ``logit_bias``;
    ``bad_words_ids`` become ``bad_words``, without the end-of-sequence ids, which ``generate`` does not ban either.

    Args:
        generation_config: transformers' `GenerationConfig`, or None.
    """
    found: dict[str, Any] = {}
    for name, off in _SAME.items():
        value = getattr(generation_config, name, None)
        if value is not None and value != off:
            found[name] = value
    if getattr(generation_config, "do_sample", None) is False:
        found["temperature"] = 0.0
    bias = {ids[0]: value for ids, value in _sequence_bias(generation_config) if len(ids) == 1}
    bias |= dict.fromkeys(getattr(generation_config, "suppress_tokens", None) or (), -math.inf)
    if bias:
        found["logit_bias"] = bias
    eos = eos_ids(generation_config)
    words = [list(ids) for ids in getattr(generation_config, "bad_words_ids", None) or ()]
    words = [ids for ids in words if ids not in [[i] for i in eos]]
    if words:
        found["bad_words"] = words
    return found


def not_offered(generation_config: Any) -> dict[str, Any]:
    """Return the fields of a generation_config that ``generate`` applies and this engine cannot, with their values."""
    found = {
        name: value
        for name, off in _NOT_OFFERED.items()
        if (value := getattr(generation_config, name, None)) is not None and value not in off
    }
    if any(len(ids) > 1 for ids, _ in _sequence_bias(generation_config)):
        found["sequence_bias"] = generation_config.sequence_bias
    return found


def eos_ids(generation_config: Any) -> list[int]:
    """Return the end-of-sequence ids, of which a model may have several."""
    eos = getattr(generation_config, "eos_token_id", None)
    return [] if eos is None else [int(i) for i in (eos if isinstance(eos, list | tuple) else [eos])]


def _sequence_bias(generation_config: Any) -> list[tuple[tuple[int, ...], float]]:
    """Return the entries of ``sequence_bias``, which is a mapping, or a list of pairs in a JSON file."""
    given = getattr(generation_config, "sequence_bias", None) or {}
    pairs: Iterable[Any] = given.items() if isinstance(given, dict) else given
    return [(tuple(ids), float(bias)) for ids, bias in pairs]
