"""Python processes that begin at once: forks of one that has imported torch and transformers, which takes seconds.

``start("rollout", "seed=1")`` is ``python -m rollout seed=1``: a process with signals, streams and an environment of
its own, which ends as Python ends. Only what it imports was imported before it began.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.support.devices import GPU

ROOT = Path(__file__).parents[2]

#: What jobs import, most of it only when they load a model.
_IMPORTED = ("rollout.cli.run", "rollout.engine.engine", "rollout.job.job", "rollout.models.loading.load", "datasets")
_NUMBER = struct.Struct("i")


class Forked:
    """A process that was started: what tests use of `subprocess.Popen`."""

    def __init__(self, out: int, err: int, status: int) -> None:
        self.stdout, self.stderr = (os.fdopen(stream, encoding="utf-8") for stream in (out, err))
        self._status = status
        self.pid = self._read()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, which is forced after ``timeout`` seconds, and return what it wrote."""
        with ThreadPoolExecutor(2) as readers:
            told, errors = (readers.submit(stream.read) for stream in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            finally:
                self.kill()
        return told.result(), errors.result()

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = self._read()
        return self.returncode

    def _read(self) -> int:
        return int(_NUMBER.unpack(os.read(self._status, _NUMBER.size))[0])


def start(module: str, *arguments: str, **environment: str) -> Forked:
    """Start ``python -m MODULE ARGUMENTS`` in the root folder, with changes of the environment."""
    given = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    pipes = [os.pipe() for _ in range(3)]
    request = json.dumps({"module": module, "arguments": arguments, "environment": given})
    socket.send_fds(_server()[0], [request.encode()], [theirs for _, theirs in pipes])
    for _, theirs in pipes:
        os.close(theirs)
    return Forked(*(ours for ours, _ in pipes))


@contextmanager
def ranks(module: str, *arguments: str, **environment: str) -> Iterator[list[Forked]]:
    """Start two ranks as a script does that sets their variables itself: no launcher passes signals on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if GPU is None:
        place["CUDA_VISIBLE_DEVICES"] = ""
    place |= environment
    processes = [start(module, *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def output_of_ranks(module: str, *arguments: str, **environment: str) -> str:
    """Run two ranks, which must succeed, and return their stdout."""
    with ranks(module, *arguments, **environment) as processes, ThreadPoolExecutor(2) as waiting:
        said = list(waiting.map(lambda process: process.communicate(timeout=300), processes))
        assert [process.returncode for process in processes] == [0, 0], said
    return "".join(told for told, _ in said)


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that forks; it ends when this one does, which holds the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return ours, process


def _serve(requests: socket.socket) -> str | None:
    """Fork for each request; return None at the end, and in a fork the module that it shall run."""
    # Who waits for a fork is not waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        content, streams, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not content:
            return None
        request = json.loads(content)
        importlib.import_module(request["module"])
        gc.freeze()
        if os.fork() == 0:
            requests.close()
            return _fork(request, *streams)
        for stream in streams:
            os.close(stream)


def _fork(request: dict[str, object], out: int, err: int, status: int) -> str:
    """Fork again and tell how the second fork ends; return, in that one alone, the module that it shall run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(status, _NUMBER.pack(pid))
        os.write(status, _NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        os._exit(0)
    os.close(status)
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream, number)
        os.close(stream)
    module, arguments, environment = request.values()
    os.environ.clear()
    os.environ.update(environment)  # type: ignore[call-overload]
    sys.argv[1:] = arguments  # type: ignore[call-overload]
    if not hasattr(sys.modules[str(module)], "__path__"):
        # It is run anew as the main module.
        del sys.modules[str(module)]
    return str(module)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    wanted = _serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        runpy.run_module(wanted, run_name="__main__", alter_sys=True)
