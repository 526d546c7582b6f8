"""Read the command line: options, and the words that are overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from rollout.batcher.suggestions import near_name
from rollout.errors import InputError

Action = Literal["run", "multirun", "cfg", "info", "hydra_help", "shell_completion", "help", "version"]

#: Options without a value, and what each does.
FLAGS: dict[tuple[str, ...], str] = {
    ("--help", "-h"): "print this text",
    ("--version",): "print the version",
    ("--multirun", "-m"): "run a job for each combination of values: sampling.n=1,2 seed=0,1",
    ("--run", "-r"): "run one job; the default",
    ("--resolve",): "with --cfg, replace interpolations by their values",
    ("--hydra-help",): "print the help of Hydra, which composes the configuration",
    ("--shell-completion", "-sc"): "with install=bash, print what turns completion on; also zsh and fish",
}
#: Options with a value: its name, and what each does.
VALUED: dict[tuple[str, ...], tuple[str, str]] = {
    ("--cfg", "-c"): ("job|hydra|all", "print the composed values instead of running"),
    ("--package", "-p"): ("GROUP", "with --cfg, print one group only"),
    ("--config-dir", "-cd"): ("DIR", "look for options and experiments in this folder too: DIR/experiment/mine.yaml"),
    ("--config-name", "-cn"): ("NAME", "start from DIR/NAME.yaml, whose defaults list begins with `config`"),
    ("--info", "-i"): ("TOPIC", "print what Hydra found: all, config, defaults, defaults-tree, plugins, searchpath"),
}
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_REFUSED = {
    ("--config-path", "-cp"): "--config-path is not offered, because it would hide the keys of a job: "
    "add a folder with --config-dir DIR.",
    ("--experimental-rerun",): "--experimental-rerun is not offered: the command that started a run resumes it.",
}
HELP_WORDS = ("-help", "--h", "-?", "/?", "/h", "help", "-H", "--usage", "--hlep", "--HELP", "usage", "?")


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the command line asks for."""

    action: Action
    words: list[str]
    """All arguments that are no options of `FLAGS` or `VALUED`."""
    show: str = ""
    """What ``--cfg`` or ``--info`` prints."""
    package: str | None = None
    resolve: bool = False
    config_dir: str | None = None
    config_name: str | None = None

    def of_one_run(self, usage: str, called: str) -> tuple[str, CommandLine]:
        """Return the folder that the command line names beside overrides, and the command line without it.

        Args:
            usage: how the command is written.
            called: what it does, as the subject of a sentence.

        Raises:
            InputError: there is not one folder, or there is an option of another command.
        """
        folders = [word for word in self.words if "=" not in word and not word.startswith(("+", "~"))]
        if len(folders) != 1:
            given = "no run" if not folders else f"several runs ({', '.join(folders)})"
            raise InputError(f"The command names {given}: write {usage}.")
        if self.action != "run":
            raise InputError(f"{called} has no such option: write {usage}.")
        (folder,) = folders
        return folder, replace(self, words=[word for word in self.words if word != folder])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if valued := re.match(r"argument ([^:/]+).*: ignored explicit argument", message):
            raise InputError(f"{valued[1]} takes no value: write {valued[1]}.")
        raise InputError(f"The options cannot be read ({message}); --help lists them.")


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Split the command line into options and words.

    Raises:
        InputError: an option has no value, a wrong one, or contradicts another.
    """
    if mistaken := next((word for word in arguments if word in HELP_WORDS), None):
        raise InputError(f"{mistaken} is no option: write --help for help.")
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names in (*FLAGS, *_REFUSED):
        parser.add_argument(*names, action="store_true" if names in FLAGS else "append", **_nargs(names))  # type: ignore[arg-type]
    for names in VALUED:
        parser.add_argument(*names, action="append", nargs="?", const="")
    parsed, words = parser.parse_known_args(list(arguments))
    given = vars(parsed)
    for names, sentence in _REFUSED.items():
        if given[_name(names)] is not None:
            raise InputError(sentence)
    values = {names[0]: _value(names[0], given[_name(names)], hint) for names, (hint, _) in VALUED.items()}
    action = _action(given, values)
    if given["resolve"] and action != "cfg":
        raise InputError("--resolve belongs to --cfg: write --cfg job --resolve.")
    if values["--package"] is not None and action != "cfg":
        raise InputError("--package belongs to --cfg: write --cfg job --package sampling.")
    folder = values["--config-dir"]
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise InputError(f"--config-dir {folder} is not a folder: name one that exists.")
    return CommandLine(
        action=action,
        words=[word for word in words if word != "--"],
        show=values["--cfg"] or values["--info"] or "",
        package=values["--package"],
        resolve=given["resolve"],
        config_dir=None if folder is None else str(Path(folder).expanduser()),
        config_name=values["--config-name"],
    )


def _nargs(names: tuple[str, ...]) -> dict[str, str]:
    return {"nargs": "?", "const": ""} if names in _REFUSED else {}


def _name(names: tuple[str, ...]) -> str:
    return names[0].removeprefix("--").replace("-", "_")


def _value(option: str, given: list[str] | None, hint: str) -> str | None:
    if given is None:
        return None
    if len(given) > 1:
        raise InputError(f"{option} is given {len(given)} times: leave all but one out.")
    value = given[0]
    choices = _CHOICES.get(option)
    if option == "--info" and not value:
        return "all"
    if not value:
        raise InputError(f"{option} has no value: write {option} {choices[0] if choices else hint}.")
    if choices and value not in choices:
        near = near_name(value, choices) or choices[0]
        raise InputError(f"{option} is {value}, but must be one of {', '.join(choices)}: write {option} {near}.")
    return value


def _action(given: dict[str, object], values: dict[str, str | None]) -> Action:
    if given["help"]:
        return "help"
    if given["version"]:
        return "version"
    asked: dict[Action, bool] = {
        "run": bool(given["run"]),
        "multirun": bool(given["multirun"]),
        "cfg": values["--cfg"] is not None,
        "info": values["--info"] is not None,
        "hydra_help": bool(given["hydra_help"]),
        "shell_completion": bool(given["shell_completion"]),
    }
    chosen = [action for action, is_asked in asked.items() if is_asked]
    if len(chosen) > 1:
        names = " and ".join(f"--{action.replace('_', '-')}" for action in chosen)
        raise InputError(f"{names} exclude each other: leave all but one out.")
    return chosen[0] if chosen else "run"


def option_names() -> list[str]:
    """Return all options, long and short."""
    return [name for names in (*FLAGS, *VALUED) for name in names]
