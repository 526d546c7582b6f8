"""Run the rows of a run that are in error again: ``python -m rollout.retry DIR [key=value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rollout.cli.ending import ending
from rollout.cli.retry import run_retry
from rollout.errors import Exit, InputError
from rollout.job.stop_signals import stop_signals
from rollout.logs import say

_USAGE = """\
Run the rows of a run that are in error again, and nothing else of it.

Usage:
  python -m rollout.retry DIR [error_class=NAME[,NAME ...]] [KEY=VALUE ...]

DIR is the output.dir of a run. The job is the one that run.json describes, on the same data. Samples in error are
generated again; where the reward alone failed, the completion stays and only the reward is computed again. What is in
error afterwards stands as an error record again.

  error_class=NAME,NAME   only errors of these classes
  batcher, memory, job, model.device, model.device_map, model.tensor_parallel, model.attention, tracker, output.check
                          how the job is run, as on any resume
  data.path, model.path, model.revision, model.adapter, model.reference
                          where the same data and models are now

If it is stopped or killed, the same command, or that of the run itself, goes on. Other workers join with the command
of the run.

Exit status: 0 complete; 1 crashed; 2 wrong configuration or input; 4 complete, with rows in error; 75 stopped early.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Retry what the arguments name and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        say(_USAGE, end="")
        return Exit.COMPLETE
    folder = next((word for word in words if "=" not in word and not word.startswith("-")), "DIR")
    try:
        with stop_signals():
            return run_retry(words)
    except (InputError, KeyboardInterrupt) as error:
        sentence, status = ending(error, folder)
    say(sentence, sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
