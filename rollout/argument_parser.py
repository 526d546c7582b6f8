"""The argument parser of the tools beside the job: ``rollout.verify``, ``rollout.report``, ``rollout.simulate``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rollout.batcher.suggestions import near_name
from rollout.errors import InputError


class SentenceParser(argparse.ArgumentParser):
    """Report a mistake in one sentence that says what to do, instead of exiting after the usage text."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse the arguments.

        Raises:
            InputError: an argument is unknown, missing or wrong.
        """
        options = [name for action in self._actions for name in action.option_strings]
        for argument in sys.argv[1:] if args is None else args:
            name = argument.partition("=")[0]
            if name.startswith("-") and not name[1:2].isdigit() and name not in options:
                raise InputError(self._unknown(argument))
        parsed: argparse.Namespace
        parsed, others = self.parse_known_args(args, namespace)
        if others:
            raise InputError(self._unknown(others[0]))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise ``InputError`` with argparse's message as a sentence."""
        if missing := re.match(r"the following arguments are required: (.*)", message):
            names = missing[1].split(", ")
            shown = " ".join(self._written(name) for name in names)
            raise InputError(f"{' and '.join(names)} must be given: write {self.prog} {shown}.")
        if argument := re.match(r"argument (\S+): expected one argument", message):
            name = argument[1].split("/")[0]
            raise InputError(f"{name} has no value: write {name} VALUE, as {self.prog} --help shows.")
        message = message.removeprefix("argument ").rstrip(".")
        raise InputError(f"{message[:1].upper()}{message[1:]}: {self.prog} --help shows what can be written.")

    def _written(self, name: str) -> str:
        """Return how an argument is written: ``DIR``, ``--lengths FILE.csv|NAME``."""
        named = {n: action for action in self._actions for n in (*action.option_strings, action.dest, action.metavar)}
        action = named[name]
        value = str(action.metavar or action.dest.upper())
        return f"{name} {value}" if action.option_strings else value

    def _unknown(self, argument: str) -> str:
        name = argument.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        if not name.startswith("-"):
            return f"{argument!r} is one argument too many (a path with spaces needs quotes): see {self.prog} --help."
        near = near_name(name.lstrip("-"), [option.lstrip("-") for option in known if option.startswith("--")])
        if near:
            return f"{name} is no option: write --{near}."
        return f"{name} is no option: {self.prog} --help lists them."
