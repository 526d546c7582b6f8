"""C sources compiled at first use on a machine, kept in the user's cache, and loaded with ctypes.

A source needs a C compiler (``CC``, else cc, gcc or clang), and no headers but the compiler's own and those beside it.
Where it cannot be built or does not pass its check, that is said once, and a slower way is taken.

Threads are those of torch: sources call ``GOMP_parallel`` of the OpenMP runtime that torch itself is linked with
(GNU's, LLVM's and Intel's all have it), so that one pool of threads serves both. They are not linked with OpenMP, so
no second runtime is ever loaded; where torch has none, they run in one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_void_p
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from rollout.models.cache_dir import cache_root

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

#: What sources promise (the same bits in any company) rests on the compiler making no fused operations itself.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
#: A compiler that hangs must not hang the job.
_COMPILE_SECONDS = 120


class KernelUnavailable(Exception):
    """Why a source has no kernel on this machine."""


def try_build(source: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded | None:
    """Like `build`, but None, with a warning, where there is no kernel to be had."""
    try:
        return build(source, load)
    except KernelUnavailable as error:
        logger.warning("%s is not compiled on this CPU, a slower way is used instead: %s", source.name, error)
        return None


def build(source: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    """Loads the library of a source from the cache, where it is built first if need be.

    Args:
        source: a C file.
        load: makes of the library what is wanted of it, and checks what it computes; may raise `KernelUnavailable`,
            OSError or AttributeError.

    Raises:
        KernelUnavailable: no compiler, or what it built cannot be loaded or computes something else.
    """
    command = compiler()
    version = _output([*command, "--version"])
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    why = ""
    for flags in ((*FLAGS, native), FLAGS):
        try:
            return _build_with(source, [*command, *flags], version, load)
        except KernelUnavailable as error:
            why = why or str(error)
    raise KernelUnavailable(why)


def compiler() -> list[str]:
    """The command of a C compiler.

    Raises:
        KernelUnavailable: there is none.
    """
    chosen = os.environ.get("CC", "")
    try:
        named = shlex.split(chosen)
    except ValueError as error:
        raise KernelUnavailable(f"CC is not a command: {chosen!r}.") from error
    if named:
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise KernelUnavailable("no C compiler was found (cc, gcc, clang, or the variable CC).")


def _output(command: list[str]) -> str:
    """What a command prints.

    Raises:
        KernelUnavailable: it fails.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{shlex.join(command[:1])} does not run ({error}).") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = next((line for line in said if "error" in line), said[-1] if said else f"status {done.returncode}")
        raise KernelUnavailable(f"{shlex.join(command[:1])} failed ({reason[:300]}).")
    return done.stdout


def _build_with(source: Path, command: list[str], version: str, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    """With one set of flags: from the cache, or anew if it is not there or no good.

    Raises:
        KernelUnavailable: what is built cannot be used.
    """
    folder = cache_root().parent / "kernels"
    file = folder / f"{source.stem.replace('_', '-')}-{_key(source, command, version)}.so"
    if file.exists():
        try:
            return _loaded(file, load)
        except KernelUnavailable as error:
            logger.info("Building %s again: %s", file.name, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=".build-", dir=folder)
    except OSError:  # built for this process alone: what is loaded stays when its file goes
        place = tempfile.TemporaryDirectory(prefix="rollout-kernel-")
    with place as work:
        new = Path(work) / file.name
        _output([*command, "-o", str(new), str(source), "-lm"])
        kernel = _loaded(new, load)
        # Processes that start together each build their own, and any of them will do.
        with suppress(OSError):
            new.replace(file)
    return kernel


def _loaded(file: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    try:
        return load(ctypes.CDLL(str(file)))
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"what the compiler built cannot be loaded ({error}).") from error


def _key(source: Path, command: list[str], version: str) -> str:
    """Names a build: machines that share a home folder must not load what was built for another CPU."""
    text = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    about = [*text, shlex.join(command).encode(), version.encode(), _cpu().encode()]
    return hashlib.sha256(b"\0".join(about)).hexdigest()[:24]


def _cpu() -> str:
    """What tells this CPU's instructions."""
    about = [platform.system(), platform.machine(), platform.processor(), platform.libc_ver()[0]]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    # The cores of a machine may differ, and the order in which they are listed says nothing.
    return "\n".join([*about, *sorted({line for line in lines if line.split(":")[0].strip() in names})])


@cache
def gomp_parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch is linked with; None where it has none."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        # Long loaded: a name is looked up in this library and in those that it is linked with.
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        logger.info("torch's OpenMP has no GOMP_parallel: compiled kernels run in one thread.")
        return None
