"""C sources compiled at first use on a machine, cached in the user's cache directory, and loaded with ctypes.

Who knows early that kernels will be needed calls `begin`: they are then compiled side by side, and beside what the
process does meanwhile. A lock lets one of several processes that start together compile, and the others wait for it. A
library is moved to its place when it is whole.

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
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from filelock import FileLock, Timeout

from rollout.models.cache_dir import cache_root

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

#: Sources promise results that do not depend on the batch composition, so the compiler must not fuse operations.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
_HERE = Path(__file__).parent
#: All kernels, in the order in which `begin` takes them: first what the others' tests need, then what takes longest.
KERNELS = tuple(
    _HERE / f"{name}.c"
    for name in ("threads", "paged_attention", "products", "decoder_layers", "pointwise", "gumbel_max")
)
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
    reason = ""
    for flags in ((*FLAGS, _native()), FLAGS):
        try:
            return build_with(flags, source, load)
        except KernelUnavailable as error:
            reason = reason or str(error)
    raise KernelUnavailable(reason)


def build_with(flags: Iterable[str], source: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    """Load the library that is built with some flags, and build it first if it is missing or broken.

    Raises:
        KernelUnavailable: the library cannot be built or used.
    """
    library = _library(source, flags)
    with _guard:
        begun = _begun.pop(library, None)
    built = _built(library) if begun is None else begun.result()
    try:
        return _loaded(built.file, load)
    except KernelUnavailable as error:
        with suppress(OSError):
            built.file.unlink()
        if built.anew:
            raise
        logger.info("Rebuilding %s, which cannot be used: %s", built.file.name, error)
    built = _built(library)
    try:
        return _loaded(built.file, load)
    except KernelUnavailable:
        with suppress(OSError):
            built.file.unlink()
        raise


def address_of(function: ctypes._NamedFuncPointer) -> int | None:
    """Return the address of a library's function, for calls from another library."""
    return ctypes.cast(function, ctypes.c_void_p).value


def begin(sources: Iterable[Path] = KERNELS) -> None:
    """Begin to build the libraries that are not in the cache, as many at once as there are cores; do not wait.

    Whoever loads them later finds them, or waits, and learns then what has failed.
    """
    try:
        libraries = [_library(source, (*FLAGS, _native())) for source in sources]
    except KernelUnavailable:
        return
    waiting: SimpleQueue[tuple[_Library, Future[_Built]]] = SimpleQueue()
    with _guard:
        for library in libraries:
            if library not in _begun and not library.file.exists():
                _begun[library] = Future()
                waiting.put((library, _begun[library]))
    for _ in range(min(waiting.qsize(), os.cpu_count() or 1)):
        # Daemons: a process that ends early does not wait for the compiler.
        threading.Thread(target=_build_waiting, args=(waiting,), name="compile", daemon=True).start()


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


@dataclass(frozen=True, slots=True)
class _Library:
    """What a library is made of, and where it is kept."""

    source: Path
    command: tuple[str, ...]
    """The compiler and its flags."""
    file: Path
    """Its place in the cache."""


@dataclass(frozen=True, slots=True)
class _Built:
    """A library that stands on a disk."""

    file: Path
    anew: bool
    """Whether this process has just compiled it."""
    folder: tempfile.TemporaryDirectory[str] | None = None
    """What holds it where the cache cannot be written; a loaded library stays mapped after its file is deleted."""


_guard = threading.Lock()
_begun: dict[_Library, Future[_Built]] = {}
"""Libraries that `begin` has had built, and nobody has loaded yet."""
# The threads that build do not live on in a forked child.
os.register_at_fork(after_in_child=_begun.clear)


def _native() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _library(source: Path, flags: Iterable[str]) -> _Library:
    """Return the library of a source.

    Raises:
        KernelUnavailable: there is no compiler.
    """
    own = compiler()
    command = (*own, *flags)
    name = f"{source.stem.replace('_', '-')}-{_key(source, command, _version(tuple(own)))}.so"
    return _Library(source, command, cache_root().parent / "kernels" / name)


@cache
def _version(command: tuple[str, ...]) -> str:
    return _output([*command, "--version"])


def _build_waiting(waiting: SimpleQueue[tuple[_Library, Future[_Built]]]) -> None:
    """Build libraries until none is left."""
    while not waiting.empty():
        with suppress(Empty):
            library, future = waiting.get_nowait()
            try:
                future.set_result(_built(library))
            except BaseException as error:  # noqa: BLE001 - raised where the library is loaded
                future.set_exception(error)


def _built(library: _Library) -> _Built:
    """Return a library of the cache, compiled first if it is missing; else one for this process alone.

    Raises:
        KernelUnavailable: it cannot be compiled.
    """
    file = library.file
    if file.exists():
        return _Built(file, anew=False)
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Without locks, processes that start together each compile; whichever is moved last stays.
            with suppress(OSError, NotImplementedError, Timeout):
                stack.enter_context(FileLock(f"{file}.lock", timeout=_COMPILE_SECONDS))
                # Whoever still waits for this file gets its lock, and then finds the library.
                stack.callback(Path(f"{file}.lock").unlink, missing_ok=True)
            if file.exists():
                return _Built(file, anew=False)
            directory = tempfile.TemporaryDirectory(prefix=".build-", dir=file.parent)
        except OSError:
            directory = tempfile.TemporaryDirectory(prefix="rollout-kernel-")
        new = Path(directory.name) / file.name
        try:
            _output([*library.command, "-o", str(new), str(library.source), "-lm"])
            if not new.exists():
                raise KernelUnavailable(f"the compiled library cannot be loaded ({new.name} was not written).")
        except BaseException:
            directory.cleanup()
            raise
        try:
            new.replace(file)
        except OSError:
            return _Built(new, anew=True, folder=directory)
        directory.cleanup()
        return _Built(file, anew=True)


def _loaded(file: Path, load: Callable[[ctypes.CDLL], Loaded]) -> Loaded:
    try:
        return load(ctypes.CDLL(str(file)))
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"the compiled library cannot be loaded ({error}).") from error


def _key(source: Path, command: Iterable[str], version: str) -> str:
    """Return a hash that identifies a build; machines that share a home directory may have different CPUs."""
    sources = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*sources, shlex.join(command).encode(), version.encode(), _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


@cache
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
