"""Explain the words of a command line that are neither options nor overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from rollout.batcher.suggestions import near_name
from rollout.cli.command_line import option_names
from rollout.cli.overrides import Known, Words, explain_unknown_key, option_key
from rollout.cli.quoting import parses, shell_word, suggest
from rollout.cli.unread_values import is_data_file
from rollout.errors import InputError

_DASHES = "‐‑‒–—―−﹘﹣－"
#: The begin of a number, as in ``{15: -1.5}`` that the shell took apart.
_NUMBER = re.compile(r"-\.?\d")
#: What others call an option that is written in another way here.
_OTHER_OPTIONS = {"-v": "hydra.verbose=true", "--verbose": "hydra.verbose=true", "--debug": "hydra.verbose=true"}
_OTHER_OPTIONS |= {"-V": "--version", "--dry-run": "--cfg job", "--config": "--config-name NAME"}


def refuse_stray_words(words: Sequence[str], known: Known) -> None:
    """Refuse the first word that is no override, saying what it may have been meant to be.

    Raises:
        InputError: a word is empty, an unknown option, or has no ``=``.
    """
    for at, word in enumerate(words):
        before, after = words[:at], words[at + 1 :]
        if not word.strip():
            raise InputError("One argument is empty: remove it, or check the shell variable that it comes from.")
        if word[0] in _DASHES:
            raise InputError(_other_dash(word))
        if word.startswith("-") and not _NUMBER.match(word):
            raise InputError(_unknown_option(word, after, known))
        if "=" in word and word != "=" and not word.startswith("="):
            continue
        if not word.startswith("~") or before:
            sentence = _described(word, before, after, known)
            if sentence:
                raise InputError(sentence)


def _other_dash(word: str) -> str:
    name = word.lstrip(_DASHES + "-")
    dashes = "-" if f"-{name.partition('=')[0]}" in option_names() and len(name) < 3 else "--"
    return f"{word} begins with {word[0]!a}, which is not the hyphen of the keyboard: write {dashes}{name}."


def _unknown_option(word: str, after: Sequence[str], known: Known) -> str:
    name, equals, value = word.partition("=")
    bare = name.lstrip("-")
    if not equals and after and "=" not in after[0] and not after[0].startswith("-"):
        value = after[0]
    if name in _OTHER_OPTIONS:
        return f"{name} is no option: write {_OTHER_OPTIONS[name]}."
    if near := next((option for option in option_names() if option.lower() == name.lower()), None):
        return f"{name} is no option: write {near}."
    key = option_key(bare, known)
    if key:
        kind = known.keys[key].type if key in known.keys else "str"
        value = value or ("true" if kind == "bool" else "VALUE")
        shown = shell_word(f"{key}={value}") if parses(f"{key}={value}") else suggest(key, value, kind)
        return f"{name} is no option: write {shown}."
    near = near_name(bare, [option.lstrip("-") for option in option_names() if option.startswith("--")])
    if near:
        return f"{name} is no option: write --{near}."
    sentence = explain_unknown_key(bare.replace("-", "_"), None, known)
    if "--help" not in sentence:
        return f"{name} is no option: {sentence[0].lower()}{sentence[1:]}"
    return f"{name} is no option: --help lists the options, and keys are written KEY=VALUE."


def _described(word: str, before: Sequence[str], after: Sequence[str], known: Known) -> str | None:
    """Return the sentence for a word without ``=``; None for a deletion, which `check_overrides` explains."""
    if word.startswith("="):
        return f"{word} names no key: write KEY=VALUE, without spaces around the equals sign."
    named = Words.of(word)
    if named.key in known.keys or named.key in known.groups or named.key == "experiment":
        return None if named.prefix == "~" else _spaced(word, after, known)
    split = re.match(r"[+]*([\w.]+)[:＝](.+)", word, re.DOTALL)
    if split and split[1] == "experiment":
        return f"{word} has no equals sign: write +experiment={split[2]}."
    if split and (split[1] in known.keys or split[1] in known.groups):
        return f"{word} has no equals sign: write {_assigned(split[1], split[2], known)}."
    if word in known.options("experiment"):
        return f"{word} is an experiment: write +experiment={word}."
    if named.prefix == "~":
        return explain_unknown_key(named.key, None, known)
    last = next((i for i, each in reversed(list(enumerate(before))) if _is_key(Words.of(each).key, known)), None)
    text = None if last is None else Words.of(before[last]).text
    is_path = last is not None and Words.of(before[last]).key == "data.path"
    if is_path and text is not None and _is_file(text) and _is_file(word):
        return f"{word} is one path too many: name several files by a glob, as in 'data.path=folder/*.jsonl'."
    whole = re.search(r"\s", word) is not None
    if last is not None and text is not None and not whole and (is_path or not _is_file(word)):
        kind = known.keys.get(Words.of(before[last]).key)
        if text and kind and kind.type.startswith(("int", "float", "bool")):
            return f"{shell_word(word)} is no override: write KEY=VALUE, as `python -m rollout --help` shows."
        return _torn(before[last], [*before[last + 1 :], word, *after], known)
    if _is_file(word):
        return f"{word} is no override: write {suggest('data.path', word)}."
    near = near_name(word, known.options("experiment"))
    if near:
        return f"{word} is no override: did you mean +experiment={near}?"
    return f"{shell_word(word)} is no override: write KEY=VALUE, as `python -m rollout --help` shows."


def _is_file(word: str) -> bool:
    return is_data_file(word) or (re.search("[/.]", word) is not None and os.path.exists(word))


def _spaced(word: str, after: Sequence[str], known: Known) -> str:
    """Return the sentence for ``sampling.n = 3``, ``sampling.n =3`` and ``sampling.n 3``."""
    rest = [*after[:2]]
    value = ""
    if rest and rest[0] == "=":
        value = rest[1] if len(rest) > 1 else ""
    elif rest and rest[0].startswith("="):
        value = rest[0][1:]
    elif rest and "=" not in rest[0] and not rest[0].startswith("-"):
        value = rest[0]
    if rest and f"{word}.{Words.of(rest[0]).key}" in known.keys and "=" in rest[0]:
        return f"{word} has no value: write {shell_word(f'{word}.{rest[0]}')}, without a space."
    word = Words.of(word).key
    key = "+experiment" if word == "experiment" else word
    if not value:
        example = "true" if word in known.keys and known.keys[word].type == "bool" else "VALUE"
        return f"{word} has no value: write {key}={example}."
    return f"{word} has no value: write {_assigned(key, value, known)}, without a space."


def _assigned(key: str, text: str, known: Known) -> str:
    if parses(f"{key}={text}"):
        return shell_word(f"{key}={text}")
    return suggest(key, text, known.keys[key].type if key in known.keys else "str")


def _torn(argument: str, after: Sequence[str], known: Known) -> str:
    """Return the sentence for a value with spaces that the shell took apart."""
    words = Words.of(argument)
    key = words.prefix + words.key
    if words.key in known.groups:
        return f"{words.key} is a group of keys: set each with {words.key}.KEY=VALUE."
    kind = known.keys[words.key].type if words.key in known.keys else "str"
    pieces = [words.text or ""]
    for word in after:
        if (word.startswith("-") and not _NUMBER.match(word)) or ("=" in word and _is_key(Words.of(word).key, known)):
            break
        pieces.append(word)
    if not pieces[0] and len(pieces) == 2:
        return f"{argument} has no value: write {_assigned(key, pieces[1], known)}, without a space."
    text = " ".join(pieces).strip()
    fits = parses(f"{key}={text}") and ("," not in text or text[0] in "[{")
    shown = shell_word(f"{key}={text}") if fits else suggest(key, text, kind)
    return f"The shell splits the value of {words.key} at its spaces: write {shown}."


def _is_key(key: str, known: Known) -> bool:
    return key in known.keys or key.split(".")[0] in (*known.groups, "experiment", "hydra")
