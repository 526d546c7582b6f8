"""Failures of a run's directory: which errors are its, and what its user is to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

from rollout.run_dir.paths import RunPaths

_HERE = str(Path(__file__).parent)
_RESUMES = "the same command resumes the run"
#: What has happened to ``{path}``, and what to do.
_SENTENCES = {
    errno.ENOSPC: f"No space is left for {{path}}: free some, and {_RESUMES}.",
    errno.EDQUOT: f"The disk quota is used up at {{path}}: free some of it, and {_RESUMES}.",
    errno.EROFS: f"{{path}} is on a file system that can only be read: make it writable, and {_RESUMES}.",
    errno.EACCES: f"{{path}} may not be used: give back the permission, and {_RESUMES}.",
    errno.EPERM: f"{{path}} may not be used: give back the permission, and {_RESUMES}.",
    errno.ENOENT: f"{{path}} is gone: put the run's folder back, and {_RESUMES}.",
    errno.ENOTDIR: f"{{path}} is gone: put the run's folder back, and {_RESUMES}.",
}
_OTHER = "{path} failed ({why}): see to its file system, and " + _RESUMES + "."


def describe_fault(error: OSError, folder: Path) -> str | None:
    """Return what a failure of a run's directory means for its user, None if the error is of something else.

    An error that names a file is the run's if the file is inside the folder; writing and flushing name none.
    """
    root = os.path.abspath(folder)
    named = [os.path.abspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    paths = [os.fsdecode(name) for name in named]
    inside = [path for path in paths if path == root or path.startswith(root + os.sep)]
    if paths and not inside:
        return None
    if not paths and not _raised_here(error.__traceback__):
        return None
    path = inside[0] if inside else root
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        # Whichever file was missed first, the whole folder may be gone.
        run = RunPaths(Path(root)).run
        path = path if run.exists() else str(run)
    return _SENTENCES.get(error.errno or 0, _OTHER).format(path=path, why=error.strerror or error)


def _raised_here(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.startswith(_HERE):
            return True
        traceback = traceback.tb_next
    return False
