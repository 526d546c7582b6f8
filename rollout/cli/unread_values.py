"""Explain values that Hydra's grammar cannot read, or reads as those of several jobs."""

from __future__ import annotations

import re

from hydra.core.override_parser.types import Override, ValueType

from rollout.cli.quoting import shell_word, suggest
from rollout.cli.values import check_value
from rollout.config.key_comments import Key
from rollout.errors import InputError

#: Keys of text that take one of a few words.
_CHOICES = {"tracker", "output.format", "output.logprobs", "sampling.defaults"}
_CHOICES |= {"model.dtype", "model.device", "model.attention"}
_DATA_FILE = re.compile(r".*\.(jsonl?|ndjson|parquet|csv|tsv|txt|gz|zst|bz2|xz)")
_DICTIONARIES = {"data.chat_template_kwargs", "data.sampling_columns", "sampling.logit_bias"}


def several_values(parsed: Override, key: str, text: str, kind: Key | None) -> str:
    """Return the sentence for a value that Hydra takes for those of several jobs."""
    jobs = "add -m for a job with each value"
    type_ = kind.type if kind else "str"
    if parsed.value_type != ValueType.SIMPLE_CHOICE_SWEEP:
        return f"{shell_word(f'{key}={text}')} has several values: {jobs}."
    if type_.startswith("float") and re.fullmatch(r"\d+,\d+", text):
        return f"{key}={text} has a comma: write {key}={text.replace(',', '.')}, or {jobs}."
    if type_.startswith("int") and re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return f"{key}={text} has a comma: write {key}={text.replace(',', '')}, or {jobs}."
    if type_.startswith(("int", "float", "bool")):
        return f"{key}={text} has several values: write one of them, or {jobs}."
    if type_.startswith(("list of", "Any")):
        type_ = type_ if type_.startswith("list") else "list of str"
        shown = suggest(key, f"[{text}]", type_)
        return f"{shell_word(f'{key}={text}')} has a comma outside a list: write {shown}, or {jobs}."
    if key in _CHOICES or key == "data.path":
        pieces = text.split(",")
        one = "a glob, as in 'data.path=folder/*.jsonl'" if key == "data.path" else f"one, as in {key}={pieces[0]}"
        if key in _CHOICES or all(map(is_data_file, pieces)):
            return f"{key} takes one value, but {text} has several: write {one}, or {jobs}."
    return f"The comma in {key} separates the values of several jobs: write {suggest(key, text, type_)}, or {jobs}."


def cannot_be_read(key: str, text: str, kind: Key | None) -> str:
    """Return the sentence for a value that is outside Hydra's grammar, with what to write instead."""
    type_ = kind.type if kind else "str"
    if kind is not None and type_.startswith(("int", "float", "bool")):
        try:
            check_value(kind, text, text)
        except InputError as wrong:
            return str(wrong)
    if key.lstrip("+") in _DICTIONARIES and (pair := re.fullmatch(r"([A-Za-z_]\w*)[=:]([\w.+-]+)", text)):
        return f"{key} takes a dictionary: write {shell_word(f'{key}={{{pair[1]}: {pair[2]}}}')}."
    if re.search(r"\$\{[\w.]+:[^{}]*$", text):
        return f"The value of {key} has ${{ without its partner: write {shell_word(f'{key}={text}}}')}."
    return f"The value of {key} {_reason(text, type_)}: write {suggest(key, text, type_)}."


def _reason(text: str, type_: str) -> str:
    """Return what in a value Hydra's grammar reads otherwise."""
    if type_.startswith("list"):
        text = re.sub(r"""[\[\],"' ]""", "", text) or text
    unbalanced = any(text.count(a) != text.count(b) for a, b in ("[]", "{}", "()"))
    if unbalanced:
        return "has a bracket without its partner, so it must be quoted"
    found = [character for character in dict.fromkeys(text) if character in "'\"[](){}=,#!;<>`&^:"]
    if not found:
        found = [character for character in dict.fromkeys(text) if not (character.isascii() and character.isalnum())]
    names = {"\n": "a line break", "\t": "a tab", ",": "a comma", "=": "an equals sign", "'": "an apostrophe"}
    shown = [
        names.get(character, character if character.isprintable() else ascii(character))
        for character in found
        if character != " "
    ] or ["a space"]
    return f"has {' and '.join(shown[:3])}, so it must be quoted"


def is_data_file(word: str) -> bool:
    """Return whether a word has the name of a data file."""
    return bool(_DATA_FILE.fullmatch(word))
