"""The command line that a message suggests gives the value that was meant, through the shell and Hydra's grammar."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rollout.cli.quoting import shell_word, suggest
from tests.cli.conftest import Ask


def arguments_of(line: str) -> list[str]:
    """Return the arguments that a shell makes of a line."""
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    return printed.decode().split("\0")[:-1]


TEXTS = [
    "You are helpful, honest",
    "Don't lie",
    'Say "no", don\'t say `yes`',
    "Reply (in JSON)!",
    "train[:1]",
    "date=2024-01-01/*.jsonl",
    "###",
    "[INST]",
    "{x: 1}",
    "a: b # c; d & e | f < g > h",
    "Cost $5, or ${6",
    "Über, naïve",
    "tab\tand, comma",
    "ends with a backslash, \\",
    'backslash quote \\", here',
    "line one,\nline two",
    "\r\n, ends of lines \n",
    "$HOME, `id`, $(id), !!",
    "a,b,c",
    "{{ messages }}, {% if x %}",
    "*?.[ab]",
]


def suggested(message: str) -> list[str]:
    """The arguments of the command line behind ``write``."""
    found = re.search(r"write (.*?)(?:, or add -m| for the text itself)?[^'\"]*\Z", message, re.DOTALL)
    assert found, message
    return arguments_of(found[1])


@pytest.mark.parametrize("text", TEXTS)
def test_suggested_word_is_read_as_the_text(text: str) -> None:
    (argument,) = arguments_of(suggest("data.system_prompt", text))
    parsed = OverridesParser.create().parse_override(argument).value()
    assert OmegaConf.create({"text": parsed}).text == text


@pytest.mark.parametrize("text", TEXTS[:8])
def test_suggested_text_is_the_text_that_was_meant(ask: Ask, sentence: Callable[[list[str]], str], text: str) -> None:
    said = sentence(["output.dir=out", f"data.system_prompt={text}"])
    run = ask(["output.dir=out", *suggested(said)])
    assert run.status == 0, run.err
    assert run.configs[0].data.system_prompt == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("###", ["###"]),
        ("[<|im_end|>,###]", ["<|im_end|>", "###"]),
        ('["a, b", <x>]', ["a, b", "<x>"]),
        ("[a;b, c]", ["a;b", "c"]),
        ("a,b", ["a", "b"]),
        ("User:", ["User:"]),
        ("[don't]", ["don't"]),
        ("[1e5]", ["1e5"]),
        ("[true]", ["true"]),
        ("\n\n", ["\n\n"]),
    ],
)
def test_suggested_list_is_the_list_that_was_meant(ask: Ask, text: str, meant: list[str]) -> None:
    said = ask(["output.dir=out", f"sampling.stop={text}"])
    if said.status == 2:
        said = ask(["output.dir=out", *suggested(said.err.removesuffix("\n"))])
    assert said.status == 0, said.err
    assert said.configs[0].sampling.stop == meant


@pytest.mark.parametrize("word", [*TEXTS, "plain", "a.b=c", "!", "it's $HOME"])
def test_shell_word_is_one_argument(word: str) -> None:
    assert arguments_of(shell_word(word)) == [word]


def test_json_dictionary_is_written_in_hydras_grammar() -> None:
    word = suggest("data.chat_template_kwargs", '{"enable_thinking": false, "style": "a, b"}', "dict[str, Any]")
    assert arguments_of(word) == ['data.chat_template_kwargs={enable_thinking: false, style: "a, b"}']
