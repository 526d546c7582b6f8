"""How a command ended that worked on a folder: its exit status, and what its user is told."""

from __future__ import annotations

import traceback
from pathlib import Path

from rollout.errors import Exit, InputError
from rollout.job.stop_signals import Stopped
from rollout.models.errors import UnsupportedModel
from rollout.run_dir.faults import describe_fault


def ending(error: BaseException, *folders: str) -> tuple[str, Exit]:
    """Return what an error means for the user, which may be nothing, and the status; print a crash's traceback.

    Args:
        folders: those that the command works in; the first is the one that the same command resumes.
    """
    folder = folders[0]
    if isinstance(error, InputError | UnsupportedModel):
        return " ".join(str(error).split()), Exit.BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        if isinstance(error, Stopped) and error.sentence is not None:
            return error.sentence, Exit.RESUMABLE
        return f"Stopped: the same command resumes the run in {folder}.", Exit.RESUMABLE
    if isinstance(error, OSError):
        for place in folders:
            if (fault := describe_fault(error, Path(place).expanduser())) is not None:
                return fault, Exit.RESUMABLE
    traceback.print_exception(error)
    sentence = (
        f"The job crashed ({type(error).__name__}): what {folder} holds is kept, and the same command resumes it; "
        "if it crashes again, report the lines above."
    )
    return sentence, Exit.CRASHED
