"""Install the engines that this one is compared with, and convert models to the form they need.

    python -m jobs.bench.peer_envs install openvino

Each peer has an environment of its own, since peers need other versions of torch and transformers: by default
``.peers/NAME`` at the root of the checkout, which git ignores. Converted models are kept beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs.bench.lib import engine_spec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".peers"
PEERS = tuple(name for name, engine in engine_spec.ENGINES.items() if engine.peer)
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Removed after installing: peers ask for them, need none of them for text, and fail to start where their build does
not fit that of torch."""
STAMP = "installed.txt"


def requirements(name: str) -> Path:
    """Return the file with the pinned versions of a peer."""
    return HERE / "peer_requirements" / f"{name}.txt"


def hint(name: str) -> str:
    """Return the command that installs a peer."""
    return f"python -m jobs.bench.peer_envs install {name}"


def install(name: str, folder: Path) -> Path:
    """Make the environment of a peer; return its Python."""
    python = folder / "bin" / "python"
    (folder / STAMP).unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "-r", str(requirements(name))], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    (folder / STAMP).write_bytes(requirements(name).read_bytes())
    return python


def find(name: str) -> Path | None:
    """Return the Python of a completely installed peer of the pinned versions, or None."""
    stamp = ROOT / name / STAMP
    current = stamp.is_file() and stamp.read_bytes() == requirements(name).read_bytes()
    return ROOT / name / "bin" / "python" if current else None


def model_for(name: str, python: Path, model: str) -> str:
    """Return the folder that a peer loads: the model's own, or its export, which is made once.

    Raises:
        ValueError: the export failed; the message ends with its last words.
    """
    if name != "openvino":
        return model
    folder = ROOT / "models" / name / _key(name, Path(model))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # It appears complete or not at all.
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = Path(work) / "export"
            tool = [str(python.parent / "optimum-cli"), "export", "openvino", "-m", model, "--weight-format", "fp16"]
            command = [*tool, "--task", "text-generation-with-past", str(made)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise ValueError(f"{name} cannot export {model}: {lines[-1]}")
            made.rename(folder)
    return str(folder)


def _key(name: str, model: Path) -> str:
    """Return a name that depends on the weights and the exporter's versions."""
    digest = hashlib.sha256(requirements(name).read_bytes())
    for file in sorted(model.iterdir()) if model.is_dir() else [model]:
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return f"{model.name}-{digest.hexdigest()[:16]}"


def main() -> None:
    """Install a peer."""
    parser = argparse.ArgumentParser(description="Installs the engines that are compared with.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("install", help="make the environment of an engine")
    command.add_argument("name", choices=PEERS)
    command.add_argument("--into", type=Path, metavar="DIR", help=f"default: {ROOT.name}/NAME at the repository's root")
    given = parser.parse_args()
    python = install(given.name, (given.into or ROOT / given.name).resolve())
    print(f"{given.name} is installed" if given.into is None else f"use it with --peer {given.name}={python}")


if __name__ == "__main__":
    main()
