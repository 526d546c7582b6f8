"""Run a job from the command line: ``python -m rollout [+experiment=NAME] [key=value ...]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from rollout.cli.command_line import parse_command_line
from rollout.errors import Exit, InputError
from rollout.job.stop_signals import stop_signals
from rollout.logs import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes and return its exit status, the worst one of a sweep."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        # As `python -m rollout` has it: a reward function may stand in the working directory.
        sys.path.insert(0, os.getcwd())
    try:
        command = parse_command_line(list(sys.argv[1:] if arguments is None else arguments))
        if command.action == "version":
            say(f"rollout {metadata.version('rollout')}")
        elif command.action == "help":
            from rollout.cli.help import help_text

            say(help_text())
        else:
            # Before the imports, which take a second.
            with stop_signals():
                from rollout.cli.run import run

                return run(command)
    except KeyboardInterrupt:
        say("Stopped: the same command goes on.", sys.stderr)
        return Exit.RESUMABLE
    except InputError as error:
        say(str(error), sys.stderr)
        return Exit.BAD_INPUT
    return Exit.COMPLETE


def command() -> NoReturn:
    """Run `main`, and end the process with its status."""
    status = main()
    if status == Exit.RESUMABLE:
        # At once: to unload the libraries takes seconds, in which a signal that is sent again would end the process.
        say("", end="")
        say("", sys.stderr, end="")
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    command()
