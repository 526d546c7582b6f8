"""Check the overrides of a command line one by one, before Hydra composes them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rollout.batcher.suggestions import near_name
from rollout.cli.other_names import MAIN_KEYS, explain_other_name, key_of
from rollout.cli.quoting import interpolations, literal, shell_word, suggest
from rollout.cli.reward_target import refuse_file_as_target
from rollout.cli.unread_values import cannot_be_read, several_values
from rollout.cli.values import check_value
from rollout.config.key_comments import Key
from rollout.config.keys import unknown_key
from rollout.errors import InputError

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[\w./@$-]+", re.ASCII)
_HOME = re.compile(r"(^|[,\[] ?)~(?=/|$|,|\])")


@dataclass(frozen=True, slots=True)
class Known:
    """What an override can name."""

    keys: Mapping[str, Key]
    groups: Sequence[str]
    """The groups that a job's configuration is composed of."""
    options: Callable[[str], Sequence[str]]
    """Returns the options of any group: a job's, Hydra's or one of the user's own; none if there is no such group."""


@dataclass(frozen=True, slots=True)
class Words:
    """An override taken apart as it stands: ``+``, ``sampling.n``, ``3``."""

    prefix: str
    key: str
    text: str | None
    """What stands behind ``=``; None without one."""

    @classmethod
    def of(cls, argument: str) -> Words:
        """Take an argument apart."""
        name, equals, text = argument.partition("=")
        key = name.lstrip("+~")
        return cls(name[: len(name) - len(key)], key, text if equals else None)


def check_overrides(arguments: Sequence[str], known: Known, *, sweep: bool) -> list[str]:
    """Return the overrides as Hydra is to read them.

    Hydra's grammar would change some values that it can read: text that looks like a number, a home folder, one string
    for a list. Those are rewritten.

    Raises:
        InputError: an override is wrong; the message names it and what to write instead.
    """
    chosen: dict[str, str] = {}
    for argument in arguments:
        key = Words.of(argument).key
        earlier = chosen.pop(key, argument)
        if earlier != argument and (key == "experiment" or "+" in Words.of(earlier).prefix):
            raise InputError(
                f"{key} is given twice, in {shell_word(earlier)} and in {shell_word(argument)}: leave one of them out."
            )
        if earlier != argument:
            # Scripts append what their caller gives, and Hydra takes the last as well.
            logger.warning("%s is given twice: %s is used.", key, shell_word(argument))
        chosen[key] = argument
    return [_check(argument, Words.of(argument), known, sweep) for argument in chosen.values()]


def _check(argument: str, words: Words, known: Known, sweep: bool) -> str:
    prefix, key, text = words.prefix, words.key, words.text
    if not _KEY.fullmatch(key):
        raise InputError(_no_key(argument, words, known))
    if "@" in key and not key.startswith("hydra"):
        raise InputError(f"{argument} moves a group, which is not offered: write {key.partition('@')[0]}={text or ''}.")
    if prefix not in ("", "+", "++", "~"):
        raise InputError(f"{argument} begins with {prefix}: write {shell_word(argument.lstrip('+~'))}.")
    if key in ("reward", "reward._target_"):
        refuse_file_as_target(text or "")
    if key == "experiment":
        _check_experiment(words, known, sweep)
    elif key in known.groups:
        return _check_group(argument, words, known, sweep)
    elif key.split("@")[0].split("/")[0] == "hydra" or key.startswith("hydra."):
        _check_hydra(argument, words, known)
    elif not (key in known.keys or _is_free(key, known) or known.options(key.split("@")[0])):
        raise InputError(explain_unknown_key(key, text, known))
    if "~" in prefix:
        raise InputError(_cannot_remove(key, known))
    if key in known.keys and prefix == "+":
        raise InputError(f"{key} is a key already: write {shell_word(argument[1:])}.")
    if text is None:
        value = "true" if key in known.keys and known.keys[key].type == "bool" else "VALUE"
        raise InputError(f"{key} has no value: write {'' if key in known.keys else prefix}{key}={value}.")
    kind = known.keys.get(key)
    if text.startswith("="):
        shown = suggest(prefix + key, text[1:], kind.type if kind else "str")
        raise InputError(f"{argument} has two equals signs: write {shown}.")
    _check_interpolations(words, known)
    return _check_value(words, known, sweep)


def explain_unknown_key(key: str, text: str | None, known: Known) -> str:
    """Return the sentence for a key that does not exist."""
    if key == "batcher.name":
        return f"A policy is chosen with its keys: write batcher={text or 'NAME'}."
    if near_name(key, ["experiment"]):
        return f"There is no key {key}; here it is experiment: write +experiment={text or 'NAME'}."
    other = explain_other_name(key, text, dict(known.keys))
    return other or str(unknown_key(key, [*known.keys, *known.groups]))


def _no_key(argument: str, words: Words, known: Known) -> str:
    key = words.key
    meant = re.sub(r"\W+", ".", key.strip(), flags=re.ASCII).strip(".")
    if meant in known.keys and words.text and key.isprintable():
        shown = suggest(meant, words.text.strip(), known.keys[meant].type)
        if meant == key.strip():
            return f"{shell_word(argument)} has a space beside the key: write {shown}."
        return f"{argument!a} has another character than a dot in its key: write {shown}."
    strange = next((character for character in key if not _KEY.fullmatch(character)), "")
    if not key:
        return f"{shell_word(argument)} names no key: write KEY=VALUE, without spaces around the equals sign."
    if strange.isascii() and strange.isprintable():
        return f"{shell_word(argument)} is no override ({strange!r} cannot stand in a key): write KEY=VALUE."
    return f"{argument!a} has the character {strange!a} in its key: type {key.encode('ascii', 'ignore').decode()} anew."


def _is_free(key: str, known: Known) -> bool:
    """Return whether a key stands inside one that holds names of the user's choice."""
    if key.startswith("reward."):
        # Its other keys are the arguments of the user's function.
        return True
    return any(key.startswith(f"{name}.") and _holds_names(kind) for name, kind in known.keys.items())


def _holds_names(key: Key) -> bool:
    return key.type.startswith("dict") or key.type == "Any"


def _cannot_remove(key: str, known: Known) -> str:
    if key in known.keys and known.keys[key].default != "???":
        return f"~{key} cannot remove a key that every job has: leave it out, and it is {known.keys[key].default}."
    return f"~{key} cannot remove a key that every job has: write {key}=VALUE."


def _check_experiment(words: Words, known: Known, sweep: bool) -> None:
    if words.prefix == "~" or not words.text:
        raise InputError(
            f"An experiment is added to the defaults: write +experiment=NAME{_one_of(known.options('experiment'))}."
        )
    if words.prefix != "+":
        raise InputError(f"An experiment is added to the defaults: write +experiment={words.text}.")
    _check_options("experiment", words.text, known.options("experiment"))
    if re.match(r"[^\[(]+,", words.text) and not sweep:
        raise InputError(f"+experiment={words.text} names several: choose one, or add -m for a job with each.")


def _one_of(names: Sequence[str]) -> str:
    return f", one of {', '.join(names)}" if names else ""


def _check_options(group: str, text: str, options: Sequence[str]) -> None:
    """Refuse what is no option of a group; lists and sweeps of options are Hydra's."""
    names = [text] if not re.search(r"[,(\[{$]", text) else re.findall(r"[\w/.-]+", text.strip("[]"))
    for name in names if "(" not in text and "$" not in text else ():
        if name not in options and name.removesuffix(".yaml") not in options:
            near = near_name(name.rpartition("/")[2].removesuffix(".yaml"), options)
            hint = f"; did you mean {near}" if near else ""
            raise InputError(f"There is no {group}={name}{hint}; {group} is one of {', '.join(options)}.")


def _check_group(argument: str, words: Words, known: Known, sweep: bool) -> str:
    group, text, options = words.key, words.text, known.options(words.key)
    if group == "reward" and (words.prefix == "~" or text in ("null", "")):
        return "reward=none"
    if words.prefix == "~":
        raise InputError(f"~{group} would remove what every job needs: leave it out, or choose {group}={options[0]}.")
    if words.prefix:
        raise InputError(f"{group} is part of every job: write {shell_word(argument.lstrip('+'))}.")
    if not text:
        raise InputError(f"{group} has no value: write {group}=NAME{_one_of(options)}.")
    if text.startswith("{"):
        raise InputError(f"{group} is a group of keys: set each with {group}.KEY=VALUE.")
    main = MAIN_KEYS.get(group)
    if main and text not in options and near_name(text, options) is None and not (sweep and "," in text):
        raise InputError(
            f"There is no {group}={text}: write {suggest(main, text)} ({group}= takes {', '.join(options)})."
        )
    _check_options(group, text, options)
    if "," in text and not sweep:
        raise InputError(f"{argument} names several options: choose one, or add -m for a job with each.")
    return argument


def _check_hydra(argument: str, words: Words, known: Known) -> None:
    if words.key == "hydra.verbose" and (words.text or "").startswith("{"):
        raise InputError(f"{argument} is a dictionary: write hydra.verbose=true, or the name of a logger.")
    if "/" not in words.key or not words.text:
        return
    options = known.options(words.key)
    if not options:
        raise InputError(f"There is no {words.key}: `python -m rollout --hydra-help` lists Hydra's groups.")
    if words.key == "hydra/sweeper" and words.text != "basic":
        raise InputError(
            f"{argument} is not offered, because only the basic sweeper returns its jobs' exit statuses: leave it out."
        )
    if words.key == "hydra/launcher" and words.text.startswith(("slurm", "submitit")) and find_spec("submitit") is None:
        raise InputError(f"{argument} needs a package: install rollout[slurm].")
    _check_options(words.key, words.text, options)


def _check_interpolations(words: Words, known: Known) -> None:
    """Refuse ``${name}`` where no key and no resolver has this name."""
    for inner in interpolations(words.text or ""):
        name, colon, _ = inner.partition(":")
        known_key = name in known.keys or name.split(".")[0] in (*known.groups, "hydra") or name.startswith(".")
        if not (OmegaConf.has_resolver(name) if colon else known_key):
            what = f"there is no resolver {name}" if colon else f"there is no key {name}"
            shown = shell_word(f"{words.prefix}{words.key}={literal(words.text or '', interpolations=False)}")
            raise InputError(f"{words.key} has ${{{inner}}}, but {what}: write {shown} for the text itself.")


def _check_value(words: Words, known: Known, sweep: bool) -> str:
    """Return the override with a value that Hydra reads as it was meant."""
    text = words.text or ""
    kind = known.keys.get(words.key)
    type_ = kind.type if kind else ""
    key = words.prefix + words.key
    if type_.startswith(("str", "list of str")):
        text = _HOME.sub(lambda match: match[1] + os.path.expanduser("~"), text)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise InputError(cannot_be_read(key, text, kind)) from error
    if parsed.is_sweep_override():
        _check_sweep(parsed, key, text, kind, sweep)
        return f"++{words.key}={text}" if kind and _holds_names(kind) else f"{key}={text}"
    value = parsed.value()
    if kind is None:
        # Inside a key that holds names of the user's choice, Hydra takes new names only if they are added.
        inside = any(words.key.startswith(f"{name}.") for name in known.keys)
        return f"++{words.key}={text}" if inside else f"{key}={text}"
    if isinstance(value, dict) and _holds_names(kind):
        return f"++{words.key}={text}"
    if type_.startswith("list of") and not isinstance(value, list | dict) and text.strip() and value is not None:
        item = literal(text) if type_ == "list of str" and _changes(text, value) else text
        text, value = f"[{item}]", [text if item != text else value]
    if type_.startswith("str") and _changes(text, value):
        return f"{key}={literal(text)}"
    check_value(kind, value, text)
    return f"{key}={text}"


def _changes(text: str, value: object) -> bool:
    """Return whether a text would become another one: a number spelled anew, or its outer spaces cut off."""
    if isinstance(value, bool | int | float):
        return str(value) != text
    return value == text.strip() and value != text


def _check_sweep(parsed: Override, key: str, text: str, kind: Key | None, sweep: bool) -> None:
    if parsed.value_type == ValueType.INTERVAL_SWEEP:
        raise InputError(f"{key}={text} has no list of values: write range(START,STOP,STEP) or VALUE,VALUE with -m.")
    if not sweep:
        raise InputError(several_values(parsed, key, text, kind))
    if kind is not None and parsed.value_type != ValueType.GLOB_CHOICE_SWEEP:
        for value in parsed.sweep_iterator(transformer=Override._convert_value):
            check_value(kind, value, str(value))


def option_key(name: str, known: Known) -> str | None:
    """Return the key that an option such as ``--output-dir`` or ``--max_tokens`` of another tool means."""
    plain = re.sub(r"\W|_", "", name).lower()
    if plain == "experiment":
        return "+experiment"
    for key in known.keys:
        if plain == re.sub(r"\W|_", "", key).lower():
            return key
    if name in MAIN_KEYS:
        return MAIN_KEYS[name]
    if other := key_of(name, known.keys):
        return other
    last = [key for key in known.keys if key.rpartition(".")[2] == name.replace("-", "_")]
    return last[0] if len(last) == 1 else None
