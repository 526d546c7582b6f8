"""Check the options that an engine is made with, beside those that a job's configuration has as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from rollout.batcher.registry import bounded, make_policy
from rollout.batcher.types import Bounds, Decision, Observation, Policy
from rollout.errors import Check, InputError, check_all, shorten


def check_options(
    *,
    headroom: Any,
    chat_template: Any,
    chat_template_kwargs: Any,
    tools: Any,
    has_tokenizer: bool,
    flags: Mapping[str, Any],
) -> None:
    """Refuse options of another type, and options of chats where no tokenizer encodes them.

    Args:
        flags: options that are True or False, by name.

    Raises:
        InputError: the message names the option and says what to give.
    """
    follows = not isinstance(headroom, type) and callable(getattr(headroom, "free_bytes", None))
    check_all(
        [
            Check(
                "headroom",
                headroom,
                headroom is None or (follows and hasattr(headroom, "total_bytes")),
                "None, or an object with total_bytes and a method free_bytes()",
            ),
            Check(
                "chat_template",
                chat_template,
                chat_template is None or isinstance(chat_template, str),
                "None, or a text: a Jinja template, its file, or the name of one of the tokenizer's",
            ),
            Check(
                "chat_template_kwargs",
                chat_template_kwargs,
                chat_template_kwargs is None or isinstance(chat_template_kwargs, Mapping),
                "None, or a mapping of the template's variables",
            ),
            Check("tools", tools, tools is None or _are_tools(tools), "None, or a list of JSON schemas or functions"),
            *flag_checks(flags),
        ]
    )
    chats = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs, "tools": tools}
    for name, given in chats.items():
        if given and not has_tokenizer:
            raise InputError(f"{name} needs a tokenizer: create the engine with one.")


def flag_checks(flags: Mapping[str, Any]) -> Iterable[Check]:
    """Return one check for each option that is True or False."""
    return [
        Check(name, given, type(given).__name__ in ("bool", "bool_"), "True or False") for name, given in flags.items()
    ]


def _are_tools(tools: Any) -> bool:
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        return False
    return all(isinstance(tool, Mapping) or callable(tool) for tool in tools)


def given_policy(policy: Any, bounds: Bounds) -> Policy:
    """Return a policy by its name, or the caller's own, held to the bounds on rows.

    Raises:
        InputError: it is no policy; or, when it decides, a decision cannot be read.
    """
    try:
        own = make_policy(policy, bounds) if isinstance(policy, str) else bounded(policy, bounds)
    except ValueError as error:
        raise InputError(str(error)) from error
    return own if isinstance(policy, str) or own is policy else bounded(_CheckedPolicy(policy), bounds)


class _CheckedPolicy:
    """Refuses what is no decision; what the policy raises itself ends the call."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def decide(self, observation: Observation) -> Decision:
        decision: Any = self._policy.decide(observation)
        if not isinstance(decision, Decision):
            raise InputError(
                f"policy returned {shorten(repr(decision), 60)} from decide, but must return a Decision "
                "(rollout.batcher.types)."
            )
        for name in ("rows", "prefill_tokens", "decode_rows"):
            value = getattr(decision, name)
            if not _is_whole(value) and not (value is None and name == "decode_rows"):
                raise InputError(
                    f"policy returned a Decision with {name}={shorten(repr(value), 60)}, but must return whole numbers."
                )
        return decision


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
