"""Run a job from the command line: ``python -m rollout [+experiment=NAME] [key=value ...]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata

from rollout.cli.command_line import parse_command_line
from rollout.errors import Exit, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes and return its exit status, the worst one of a sweep."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        # As `python -m rollout` has it: a reward function may stand in the working directory.
        sys.path.insert(0, os.getcwd())
    try:
        command = parse_command_line(list(sys.argv[1:] if arguments is None else arguments))
        if command.action == "version":
            print(f"rollout {metadata.version('rollout')}")
        elif command.action == "help":
            from rollout.cli.help import help_text

            try:
                print(help_text(), flush=True)
            except BrokenPipeError:
                # `--help | head`: nothing is left to say, and the interpreter would complain when it flushes.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            from rollout.cli.run import run

            return run(command)
    except InputError as error:
        print(error, file=sys.stderr)
        return Exit.BAD_INPUT
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
