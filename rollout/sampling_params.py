"""Sampling parameters of a prompt, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple

from rollout.errors import InputError, shorten
from rollout.generation_defaults import recommended_sampling


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one prompt; a job's sampling configuration has the same names and defaults.

    ``temperature=0`` is greedy; ``top_k=0``, ``top_p=1`` and ``min_p=0`` are off. A completion ends at an
    end-of-sequence id of the model or the tokenizer, at the end of an assistant's turn in a chat (unless
    ``stop_at_turn_end`` is False), at an id in ``stop_token_ids``, when its text contains a string of ``stop``, or
    after ``max_new_tokens`` tokens; not before ``min_new_tokens``. ``ignore_eos`` turns off the first two.

    The logits are changed in vLLM's order: ``allowed_token_ids``, ``bad_words``, ``logit_bias``, ``min_new_tokens``,
    ``repetition_penalty``, ``frequency_penalty``, ``presence_penalty``, temperature, top-k, top-p, min-p. In
    transformers, the repetition penalty comes before bad words; a banned token stays banned either way.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the completion,
            as in transformers; 1 is off.
        presence_penalty: subtracted from the logits of tokens in the completion, as in vLLM; 0 is off.
        frequency_penalty: subtracted once per occurrence in the completion, as in vLLM; 0 is off.
        min_new_tokens: tokens before which no end-of-sequence id and no stop id is drawn, and no stop string counts.
        logit_bias: added to the logits of token ids; ``-inf`` bans a token.
        bad_words: strings, with and without a space before them, or token-id sequences. The last token of one is never
            drawn after the others. As in transformers, a sequence may begin in the prompt.
        allowed_token_ids: the only ids that may be drawn; None is off. Stop ids must be among them to end a completion.

    Raises:
        InputError: a value is of the wrong type or out of range; the message names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = ()
    """Kept as pairs, sorted by id; None is none."""
    bad_words: tuple[str | tuple[int, ...], ...] | None = ()
    """None is none."""
    allowed_token_ids: tuple[int, ...] | None = None
    stop_at_turn_end: bool = True

    def __post_init__(self) -> None:
        for rule in _RULES:
            given = getattr(self, rule.name)
            if given is not _DEFAULTS[rule.name]:  # most are, in the parameters of each of many prompts
                object.__setattr__(self, rule.name, _converted(rule, given))
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}, but must be at most max_new_tokens={self.max_new_tokens}."
            )

    @classmethod
    def from_generation_config(cls, generation_config: Any, **overrides: Any) -> SamplingParams:
        """Return what a model's ``generation_config`` recommends, with ``overrides`` in place of its values.

        Raises:
            InputError: a value is out of range.
        """
        return cls(**recommended_sampling(generation_config) | overrides)


#: Defaults by name, as the rules leave them.
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
#: Names of the parameters, in order.
PARAMETER_NAMES = tuple(_DEFAULTS)


def unapplied_recommendations(
    generation_config: Any, params: SamplingParams, given: Collection[str] = ()
) -> dict[str, Any]:
    """Return what a ``generation_config`` recommends for parameters that are at their defaults in ``params``.

    Args:
        given: names that somebody has set, perhaps to their defaults.

    Raises:
        InputError: a recommended value is out of range.
    """
    default = SamplingParams()
    recommended = recommended_sampling(generation_config)
    free = [name for name in recommended if name not in given and getattr(params, name) == getattr(default, name)]
    applied = replace(params, **{name: recommended[name] for name in free})
    values = {name: getattr(applied, name) for name in free}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def describe_parameters(values: Mapping[str, Any]) -> str:
    """Format parameters for a sentence, e.g. ``temperature 0.6, top_p 0.95``."""
    return ", ".join(f"{name} {shorten(str(value), longest=60)}" for name, value in values.items())


class _Rule(NamedTuple):
    """How one parameter is read: its conversion, which fails with TypeError or ValueError, and the allowed values."""

    name: str
    convert: Callable[[Any], Any]
    allowed: Callable[[Any], bool]
    wanted: str


def _converted(rule: _Rule, given: object) -> Any:
    try:
        value = rule.convert(given)
        allowed = rule.allowed(value)
    except (TypeError, ValueError, OverflowError):
        allowed = False
    if not allowed:
        raise InputError(f"{rule.name} is {shorten(repr(given), longest=80)}, but must be {rule.wanted}.")
    return value


def _is_number(given: object) -> bool:
    return isinstance(given, Real | Decimal) and not isinstance(given, bool)


def _whole(given: Any) -> int:
    """Return a whole number, also one that a column with nulls has turned into a float."""
    if not _is_number(given) or int(given) != given:
        raise TypeError
    return int(given)


def _real(given: Any) -> float:
    if not _is_number(given):
        raise TypeError
    return float(given)


def _flag(given: object) -> bool:
    # numpy's bool is none of Python's.
    if type(given).__name__ not in ("bool", "bool_"):
        raise TypeError
    return bool(given)


def _several(given: Any) -> Iterable[Any]:
    """Return the items of a list, tuple, set or array, but not of a mapping or of anything that is read only once."""
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
        raise TypeError
    return given.tolist() if hasattr(given, "tolist") else given  # type: ignore[no-any-return]


def _strings(given: object) -> tuple[str, ...]:
    """Return one string or several as a tuple, so that ``stop="\\n"`` is not split into characters."""
    strings = (given,) if isinstance(given, str) else tuple(_several(given))
    if not all(isinstance(string, str) for string in strings):
        raise TypeError
    return strings


def _ids(given: object) -> tuple[int, ...]:
    ids = (given,) if isinstance(given, Integral) else tuple(_several(given))
    return tuple(_whole(item) for item in ids)


def _optional_ids(given: object) -> tuple[int, ...] | None:
    return None if given is None else _ids(given)


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of id and bias; ids may be strings, as the keys of a JSON object are."""
    if given is None:
        return ()
    pairs = given.items() if isinstance(given, Mapping) else _several(given)
    bias = {int(key) if isinstance(key, str) else _whole(key): _real(value) for key, value in pairs}
    return tuple(sorted(bias.items()))


def _words(given: object) -> tuple[str | tuple[int, ...], ...]:
    if given is None:
        return ()
    words = (given,) if isinstance(given, str) else tuple(_several(given))
    return tuple(word if isinstance(word, str) else tuple(_whole(item) for item in _several(word)) for word in words)


def _are_ids(ids: Iterable[int]) -> bool:
    return all(0 <= i < 2**31 for i in ids)


_RULES = (
    _Rule("n", _whole, lambda x: 1 <= x < 2**31, "a whole number of at least 1 and below 2**31"),
    _Rule("temperature", _real, lambda x: 0 <= x < math.inf, "a finite number of at least 0 (0 is greedy)"),
    _Rule("top_p", _real, lambda x: 0 < x <= 1, "above 0 and at most 1 (1 is off)"),
    _Rule("top_k", _whole, lambda x: 0 <= x < 2**63, "a whole number of at least 0 (0 is off)"),
    _Rule("min_p", _real, lambda x: 0 <= x <= 1, "a number from 0 (off) to 1"),
    _Rule("max_new_tokens", _whole, lambda x: 1 <= x < 2**63, "a whole number of at least 1"),
    _Rule("stop", _strings, all, "a list of non-empty strings"),
    _Rule("stop_token_ids", _ids, _are_ids, "a list of token ids"),
    _Rule("ignore_eos", _flag, lambda _: True, "true or false"),
    _Rule("repetition_penalty", _real, lambda x: 0 < x < math.inf, "a finite number above 0 (1 is off)"),
    _Rule("presence_penalty", _real, lambda x: -2 <= x <= 2, "a number from -2 to 2 (0 is off)"),
    _Rule("frequency_penalty", _real, lambda x: -2 <= x <= 2, "a number from -2 to 2 (0 is off)"),
    _Rule("min_new_tokens", _whole, lambda x: 0 <= x < 2**63, "a whole number of at least 0 (0 is off)"),
    _Rule(
        "logit_bias",
        _bias,
        lambda x: _are_ids(i for i, _ in x) and all(value < math.inf for _, value in x),
        "a mapping of token ids to numbers (-inf bans a token)",
    ),
    _Rule(
        "bad_words",
        _words,
        lambda x: all(word.strip() if isinstance(word, str) else word and _are_ids(word) for word in x),
        "a list of non-empty strings or lists of token ids",
    ),
    _Rule(
        "allowed_token_ids",
        _optional_ids,
        lambda x: x is None or (len(x) > 0 and _are_ids(x)),
        "a list of at least one token id (or null, which is off)",
    ),
)
