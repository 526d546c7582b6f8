"""C sources compiled at first use on a machine, cached in the user's cache directory, and loaded with ctypes.

A source needs a C compiler (``CC``, else cc, gcc or clang), the compiler's own headers and those beside the source. If
it cannot be built or fails its self-test, the engine warns once and uses a slower PyTorch path.

Sources are not linked with a threading library: `rollout.models.csrc.threads` has the threads that run them.
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
from pathlib import Path
from typing import TypeVar

from rollout.models.cache_dir import cache_root

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

#: Sources promise results that do not depend on the batch composition, so the compiler must not fuse operations.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
#: Limit for one compiler run, so that a compiler that hangs does not hang the job.
_COMPILE_SECONDS = 120


class KernelUnavailable(Exception):
    """A kernel cannot be built or used on this machine; the message is the reason."""


def try_build(source: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded | None:
    """Build and load like `build`, but warn and return None if the kernel is unavailable."""
    try:
        return build(source, load)
    except KernelUnavailable as error:
        logger.warning("Could not compile %s; falling back to the slower PyTorch path: %s", source.name, error)
        return None


def build(source: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    """Load the library of a C source from the cache, and build it first if needed.

    Args:
        source: a C file.
        load: wraps the library and tests its results; may raise `KernelUnavailable`, OSError or AttributeError.

    Raises:
        KernelUnavailable: there is no compiler, or the library cannot be loaded or fails its test.
    """
    command = compiler()
    version = _output([*command, "--version"])
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    reason = ""
    for flags in ((*FLAGS, native), FLAGS):
        try:
            return _build_with(source, [*command, *flags], version, load)
        except KernelUnavailable as error:
            reason = reason or str(error)
    raise KernelUnavailable(reason)


def compiler() -> list[str]:
    """Return the command of the C compiler.

    Raises:
        KernelUnavailable: no compiler was found.
    """
    variable = os.environ.get("CC", "")
    try:
        command = shlex.split(variable)
    except ValueError as error:
        raise KernelUnavailable(f"CC is not a command: {variable!r}.") from error
    if command:
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise KernelUnavailable("no C compiler was found (cc, gcc, clang, or the variable CC).")


def _output(command: list[str]) -> str:
    """Run a command and return what it prints.

    Raises:
        KernelUnavailable: the command fails.
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
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {done.returncode}")
        raise KernelUnavailable(f"{shlex.join(command[:1])} failed ({reason[:300]}).")
    return done.stdout


def _build_with(source: Path, command: list[str], version: str, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    """Load the library built with one set of flags from the cache, or build it if it is missing or broken.

    Raises:
        KernelUnavailable: the library cannot be built or used.
    """
    folder = cache_root().parent / "kernels"
    file = folder / f"{source.stem.replace('_', '-')}-{_key(source, command, version)}.so"
    if file.exists():
        try:
            return _loaded(file, load)
        except KernelUnavailable as error:
            logger.info("Rebuilding %s, which cannot be used: %s", file.name, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix=".build-", dir=folder)
    except OSError:  # built for this process alone: a loaded library stays mapped after its file is deleted
        directory = tempfile.TemporaryDirectory(prefix="rollout-kernel-")
    with directory as name:
        new = Path(name) / file.name
        _output([*command, "-o", str(new), str(source), "-lm"])
        kernel = _loaded(new, load)
        # Processes that start together each build a library; whichever is moved last stays.
        with suppress(OSError):
            new.replace(file)
    return kernel


def _loaded(file: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    try:
        return load(ctypes.CDLL(str(file)))
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"the compiled library cannot be loaded ({error}).") from error


def _key(source: Path, command: list[str], version: str) -> str:
    """Return a hash that identifies a build; machines that share a home directory may have different CPUs."""
    sources = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*sources, shlex.join(command).encode(), version.encode(), _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """Return a text that identifies the CPU's instruction set."""
    system = [platform.system(), platform.machine(), platform.processor(), platform.libc_ver()[0]]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    # Cores of a machine may differ, and their order in the file is arbitrary.
    return "\n".join([*system, *sorted({line for line in lines if line.split(":")[0].strip() in names})])
