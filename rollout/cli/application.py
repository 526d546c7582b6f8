"""Compose a job's configuration with Hydra, and run what the command line asks for."""

from __future__ import annotations

import copy
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from rollout.cli.command_line import CommandLine
from rollout.cli.config_errors import COMPOSITION_ERRORS, explain
from rollout.cli.overrides import Known, Words, check_overrides
from rollout.cli.stray_words import refuse_stray_words
from rollout.cli.sweep import Job, LaunchFailed, Outcome, Task, job_folders, job_overrides, outcomes
from rollout.config.compose import CONFIG_NAME, VERSION_BASE, register, validate, with_examples
from rollout.config.key_comments import CONFIG_MODULE, all_keys, groups
from rollout.config.schema import Config
from rollout.errors import InputError


class Application:
    """Hydra for one command line. Use it as a context manager: Hydra's state is global to the process."""

    def __init__(self, command: CommandLine) -> None:
        register()
        version.setbase(VERSION_BASE)
        # A user's file wins over the defaults that it lists, as one expects, with `_self_` among them or without.
        warnings.filterwarnings("ignore", message=".*Defaults list is missing `_self_`")
        path = create_config_search_path(f"pkg://{CONFIG_MODULE}")
        if command.config_dir is not None:
            # Before the package's own, as Hydra has it: a user's file may replace one of the same name.
            path.prepend("command-line", f"file://{os.path.abspath(command.config_dir)}", SearchPathQuery("schema"))
        GlobalHydra.instance().clear()
        self._hydra: Any = Hydra.create_main_hydra2("rollout", path)
        self._command = command
        self._name = command.config_name or CONFIG_NAME
        self._known = Known(keys=all_keys(), groups=[group.name for group in groups()], options=cache(self._options))

    def __enter__(self) -> Application:
        return self

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()

    def _options(self, group: str) -> list[str]:
        """Return the options of a group that can be chosen; schemas and included files are in its folder too."""
        paths = [word for word in self._command.words if word.startswith("hydra.searchpath=")]
        with self._explained():
            found = self._hydra.config_loader.get_group_options(group, ObjectType.CONFIG, self._name, paths)
        return sorted(option for option in found if not option.startswith(("_", "schema")))

    def run(self, task: Task) -> list[Outcome]:
        """Do what the command line asks for; return the outcome of each job that ran.

        Raises:
            InputError: the command line or a configuration file is wrong; nothing has run.
            LaunchFailed: the launcher of a sweep lost a job; others may have run.
        """
        command = self._command
        if command.action == "hydra_help":
            parser = get_args_parser()
            self._hydra.hydra_help(self._name, args_parser=parser, args=parser.parse_args(["--hydra-help"]))
            return []
        if command.action == "shell_completion":
            self._complete(command.words)
            return []
        sweep = command.action == "multirun" or "hydra.mode=MULTIRUN" in command.words
        refuse_stray_words(command.words, self._known)
        overrides = check_overrides(command.words, self._known, sweep=sweep)
        composed = self._compose(overrides, RunMode.MULTIRUN if sweep else RunMode.RUN)
        if sweep or composed.hydra.mode == RunMode.MULTIRUN:
            return self._sweep(overrides, composed, task)
        self._validated(composed, required=command.action == "run")
        if command.action == "cfg":
            self._print(overrides)
        elif command.action == "info":
            self._hydra.show_info(command.show, config_name=self._name, overrides=overrides)
        else:
            result = self._hydra.run(self._name, partial(task, job=Job()), [*overrides, "hydra.mode=RUN"])
            return [result.return_value]
        return []

    def _compose(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        with self._explained():
            composed = self._hydra.compose_config(
                self._name, list(overrides), run_mode=mode, with_log_configuration=False
            )
        if not isinstance(composed, DictConfig) or OmegaConf.get_type(composed) is not Config:
            raise InputError(
                f"The configuration {self._name} lacks keys of a job: begin its defaults list with `- {CONFIG_NAME}`."
            )
        return composed

    def _validated(self, composed: DictConfig, *, required: bool = True) -> Config:
        """Validate a job's configuration; without ``required``, keys that must be given may be missing."""
        HydraConfig.instance().set_config(composed)
        job = copy.deepcopy(composed)
        with self._explained(), open_dict(job):
            del job["hydra"]
            return validate(job if required else with_examples(job))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except COMPOSITION_ERRORS as error:
            raise InputError(explain(error, self._known)) from error

    def _sweep(self, overrides: list[str], composed: DictConfig, task: Task) -> list[Outcome]:
        """Validate every job of a sweep, then run them all."""
        loader = self._hydra.config_loader
        with self._explained():
            jobs = job_overrides(composed, loader)
        folders = []
        for number, job in enumerate(jobs):
            with self._explained():
                swept = loader.load_sweep_config(composed, job)
                HydraConfig.instance().set_config(swept)
                with read_write(swept.hydra), open_dict(swept.hydra):
                    swept.hydra.job.num = number
                    swept.hydra.job.id = str(number)
                    folder = os.path.join(str(swept.hydra.sweep.dir), str(swept.hydra.sweep.subdir))
                    swept.hydra.runtime.output_dir = os.path.abspath(folder)
            folders.append(self._validated(swept).output.dir)
        named = any(Words.of(override).key == "output.dir" for override in overrides)
        plan = Job(folders=tuple(job_folders(jobs, folders, named=named)))
        arguments = [*overrides, "hydra.mode=MULTIRUN"]
        try:
            returned = self._hydra.multirun(self._name, partial(task, job=plan), arguments)
        except Exception as error:
            # The task raises nothing, so this is a launcher's: a job was not taken, or was killed before it could tell.
            words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LaunchFailed(
                f"A job of the sweep was not started or was killed ({words.rstrip('.:')}): the same command resumes "
                f"those that are not complete; their logs are under {composed.hydra.sweep.dir}."
            ) from error
        return outcomes(returned)

    def _print(self, overrides: list[str]) -> None:
        command = self._command
        if command.package not in (None, "_global_", *self._known.groups, "hydra", *self._known.keys):
            raise InputError(
                f"There is no group {command.package}: --package is one of {', '.join(self._known.groups)}."
            )
        with self._explained():
            self._hydra.show_cfg(self._name, overrides, command.show, command.package, command.resolve)

    def _complete(self, words: list[str]) -> None:
        asked = [word.partition("=")[0] for word in words]
        if len(asked) != 1 or asked[0] not in ("install", "uninstall", "query"):
            raise InputError("--shell-completion has no shell: write --shell-completion install=bash.")
        shell = words[0].partition("=")[2]
        shells = sorted(self._hydra.get_shell_to_plugin_map(self._hydra.config_loader))
        if shell not in shells:
            raise InputError(f"There is no completion for {shell or 'no shell'}: write one of {', '.join(shells)}.")
        with redirect_stdout(io.StringIO()) as printed:
            self._hydra.shell_completion(self._name, words)
        text = printed.getvalue()
        if asked == ["query"]:
            # Schemas and files that options include cannot be chosen.
            text = " ".join(word for word in text.split() if not re.search("=(_|schema)", word)) + "\n"
        print(text, end="")
