"""Score the completions of a run anew: ``python -m rollout.rescore DIR reward._target_=NAME output.dir=NEW``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from rollout.cli.application import Application
from rollout.cli.command_line import CommandLine, parse_command_line
from rollout.cli.ending import ending
from rollout.cli.overrides import Words
from rollout.cli.sweep import Outcome
from rollout.config.compose import validate
from rollout.config.schema import Config
from rollout.errors import Exit, InputError
from rollout.job.rescoring import Rescoring, rescore
from rollout.job.stop_signals import stop_signals
from rollout.logs import say

_USAGE = """\
Score the completions of a run anew; nothing is generated, and no model is loaded.

Usage:
  python -m rollout.rescore DIR reward._target_=MODULE.FUNCTION output.dir=NEW [+reward.NAME=VALUE ...]

DIR is the output.dir of a complete run, which stays as it is. NEW gets its records with the new rewards; all else in
them stays the same. The keys of a job that count here:
  reward=NAME, reward._target_=MODULE.FUNCTION, reward._batch_=64, +reward.NAME=VALUE
  output.dir=NEW           a new folder; the same command on the same folder resumes
  data.path=PATH           where the run's dataset is now, if it is elsewhere: a reward gets its rows
  output.check, job.lease_seconds

Several processes with the same command share the work.

Exit status: 0 complete; 1 crashed; 2 wrong configuration or input; 4 complete, with rows in error; 75 stopped early.
"""
_COMMAND = "python -m rollout.rescore DIR reward._target_=MODULE.FUNCTION output.dir=NEW"


_KEYS = ("reward", "output.dir", "output.check", "data.path", "job.lease_seconds")
"""The keys that count, besides those of the reward."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what the arguments name and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        say(_USAGE, end="")
        return Exit.COMPLETE
    folders = ["output.dir"]
    try:
        with stop_signals():
            asked = _asked(words)
            folders = [asked.config.output.dir, asked.source]
            return rescore(asked)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # whatever it is, the user is told what it means
        sentence, status = ending(error, *folders)
    say(sentence, sys.stderr)
    return status


def _asked(words: Sequence[str]) -> Rescoring:
    """Read the command line.

    Raises:
        InputError: it is wrong.
    """
    source, command = parse_command_line(words).of_one_run(_COMMAND, "Rescoring")
    overrides = command.words
    for key in (Words.of(word).key for word in overrides):
        if key not in _KEYS and not key.startswith(("reward.", "hydra.")):
            raise InputError(
                f"{key} changes nothing here, since the completions stay as {source} has them: give the keys of "
                f"reward, and {', '.join(_KEYS[1:])}, alone."
            )
    config = _composed(command)
    if config.reward is None:
        raise InputError(f"No reward is named: write {_COMMAND}.")
    moved = any(Words.of(word).key == "data.path" for word in overrides)
    return Rescoring(source, config, config.data.path if moved else None)


def _composed(command: CommandLine) -> Config:
    """Return the configuration that a job with these words would have."""
    configs: list[Config] = []

    def keep(composed: DictConfig, **_: object) -> Outcome:
        configs.append(validate(composed))
        return Outcome(Exit.COMPLETE)

    with Application(command) as application:
        application.run(keep)
    return configs[0]


if __name__ == "__main__":
    sys.exit(main())
