"""The forms in which a caller may give sampling parameters, as one value per prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields
from itertools import repeat
from typing import Any

from rollout.batcher.suggestions import describe_names
from rollout.errors import InputError, shorten
from rollout.generation_defaults import not_offered, recommended_sampling
from rollout.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_NAMES = [field.name for field in fields(SamplingParams)]


def given_params(params: Any, prompts: Iterable[Any]) -> Iterator[SamplingParams]:
    """Return the parameters of each prompt.

    Args:
        params: `SamplingParams`, a mapping of its fields, a transformers ``GenerationConfig``, or one of these for each
            prompt; None: the defaults.
        prompts: a sequence if their number is known.

    Raises:
        InputError: the argument is none of these, names other parameters, or has another number of entries.
    """
    if params is None:
        return repeat(SamplingParams())
    if isinstance(params, SamplingParams | Mapping) or _is_generation_config(params):
        return repeat(_one(params))
    if isinstance(params, str) or not isinstance(params, Iterable):
        raise InputError(
            f"params is {shorten(repr(params), 60)}, but must be SamplingParams, or one SamplingParams per prompt."
        )
    if isinstance(params, Sized):
        if isinstance(prompts, Sequence) and len(params) != len(prompts):
            raise InputError(f"params has {len(params)} entries, but there are {len(prompts)} prompts.")
        return _counted([_one(entry) for entry in params])
    return _counted(_one(entry) for entry in params)


def _counted(entries: Iterable[SamplingParams]) -> Iterator[SamplingParams]:
    count = 0
    for entry in entries:
        count += 1
        yield entry
    raise InputError(f"params ends after {count} entries, but there are more prompts.")


def _one(given: Any) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    if _is_generation_config(given):
        return params_of_generation_config(given, "params is a GenerationConfig that")
    if not isinstance(given, Mapping):
        raise InputError(f"params has {shorten(repr(given), 60)}, but must have SamplingParams.")
    for name in given:
        if name not in _NAMES:
            raise InputError(
                f"params names {name!r}, which is no sampling parameter; {describe_names(str(name), _NAMES)}."
            )
    return SamplingParams(**given)


def _is_generation_config(given: Any) -> bool:
    return any(kind.__name__ == "GenerationConfig" for kind in type(given).__mro__)


#: Fields of a ``GenerationConfig`` that are taken, or that change no completion here.
_HONOURED = {
    *("transformers_version", "_from_model_config", "pad_token_id", "bos_token_id", "max_length", "max_new_tokens"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config"),
    *("disable_compile", "continuous_batching_config", "low_memory", "return_dict_in_generate", "output_scores"),
    *("output_logits", "output_attentions", "output_hidden_states", "do_sample", "num_return_sequences"),
    *("eos_token_id", "stop_strings"),
    *("suppress_tokens", "sequence_bias", "bad_words_ids"),
}
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
_TOP_K = 50
"""What ``generate`` takes if it samples and ``top_k`` is not set."""


def params_of_generation_config(config: Any, subject: str) -> SamplingParams:
    """Return the parameters that a transformers ``GenerationConfig`` means to ``generate``.

    Args:
        config: the configuration.
        subject: how the sentence of an error begins; a verb follows it.

    Raises:
        InputError: it sets what this engine does not offer, or no ``max_new_tokens``.
    """
    off = config._get_default_generation_params()
    given = recommended_sampling(config)
    # Fields that only describe the output, or the speed, change no completion here.
    set_fields = {name: value for name, value in config.to_diff_dict().items() if value not in (None, off.get(name))}
    unknown = not_offered(config) | {n: v for n, v in set_fields.items() if n not in _HONOURED and n not in given}
    unknown.pop("stop_strings", None)
    if unknown:
        shown = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise InputError(f"{subject} sets {shown}, which this engine does not offer: unset it.")
    if not config.max_new_tokens:
        raise InputError(f"{subject} sets no max_new_tokens: set it.")
    filters = {name: given.pop(name) for name in _FILTERS if name in given}
    if config.do_sample:
        filters = {"top_k": _TOP_K} | filters
    else:
        if changed := [f"{name}={value!r}" for name, value in set_fields.items() if name in _FILTERS]:
            logger.warning(
                "The GenerationConfig sets %s, but not do_sample=True: completions are greedy, as with generate.",
                ", ".join(changed),
            )
        filters = {"temperature": 0.0}
    # The ids of the configuration take the place of the model's.
    eos = config.eos_token_id
    ends: dict[str, Any] = (
        {} if eos is None else {"ignore_eos": True, "stop_token_ids": eos if isinstance(eos, list | tuple) else [eos]}
    )
    return SamplingParams(
        n=config.num_return_sequences or 1,
        stop=config.stop_strings or (),
        **ends,
        **filters,
        **given,
    )
