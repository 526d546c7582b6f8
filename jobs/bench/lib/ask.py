"""Tell an engine's process to do one thing, wait for it, and measure the noise of other work meanwhile.

    python -m jobs.bench.lib.ask SOCKET '{"do": "run", "workload": "w1.json"}' REPLY.json --pid 123

The reply is the engine's, and the noise; the noise alone if the engine's process ended before it answered.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

from jobs.bench.lib.hardware import Watch

LISTENING = 60.0
"""Seconds in which a process must listen after it was started."""


def connect(path: str) -> socket.socket:
    """Connect to a process that may only just have been started.

    Raises:
        TimeoutError: it did not listen in time.
    """
    until = time.monotonic() + LISTENING
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > until:
                raise TimeoutError(f"no process listens at {path}") from None
            time.sleep(0.02)


def ask(path: str, command: str) -> str:
    """Send one line; return the line that comes back, empty if the process ended instead."""
    try:
        with connect(path) as connection, connection.makefile("rw", encoding="utf-8") as line:
            line.write(command + "\n")
            line.flush()
            return line.readline()
    except (ConnectionResetError, BrokenPipeError):
        return ""


def main() -> None:
    """Ask, and write the reply."""
    parser = argparse.ArgumentParser(description="Tells an engine's process to do one thing.")
    parser.add_argument("socket")
    parser.add_argument("command")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pid", type=int, help="of the engine's process, whose CPU time is no noise")
    given = parser.parse_args()
    watch = Watch(given.pid)
    reply = ask(given.socket, given.command)
    found = json.loads(reply) if reply else {}
    # It appears complete or not at all.
    part = given.out.with_suffix(".part")
    part.write_text(json.dumps({**found, "noise": asdict(watch.noise())}), encoding="utf-8")
    os.replace(part, given.out)


if __name__ == "__main__":
    main()
