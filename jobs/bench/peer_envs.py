"""Install the engines that this one is compared with, and convert models to the form they need.

    python -m jobs.bench.peer_envs install openvino

Each peer has an environment of its own, since peers need other versions of torch and transformers: by default
``.peers/NAME`` at the root of the checkout, which git ignores. Converted models are kept beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.bench.lib import engine_spec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".peers"
PEERS = tuple(name for name, engine in engine_spec.ENGINES.items() if engine.peer)
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Removed after installing: peers ask for them, need none of them for text, and fail to start where their build does
not fit that of torch."""
STAMP = "installed.txt"
CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
"""How llama.cpp is compiled: for the machine itself, without what pictures need."""
CONVERTER = Path("source", "vendor", "llama.cpp", "convert_hf_to_gguf.py")
"""In llama.cpp's environment: what comes with its sources, and is not installed."""


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
    environment = {**os.environ, "CMAKE_ARGS": CMAKE}
    subprocess.run([*pip, "install", "--quiet", "-r", str(requirements(name))], env=environment, check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    if name == "llamacpp":
        _unpack_sources(pip, requirements(name), folder / CONVERTER.parts[0])
    (folder / STAMP).write_bytes(requirements(name).read_bytes())
    return python


def _unpack_sources(pip: list[str], pinned: Path, into: Path) -> None:
    """Unpack the sources of llama-cpp-python in its pinned version."""
    wanted = next(line for line in pinned.read_text().splitlines() if line.startswith("llama-cpp-python"))
    with tempfile.TemporaryDirectory() as work:
        only = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", work]
        subprocess.run([*pip, "download", *only, wanted], check=True)
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(work, filter="data")
        shutil.rmtree(into, ignore_errors=True)
        shutil.move(next(path for path in Path(work).iterdir() if path.is_dir()), into)


def find(name: str) -> Path | None:
    """Return the Python of a completely installed peer of the pinned versions, or None."""
    stamp = ROOT / name / STAMP
    current = stamp.is_file() and stamp.read_bytes() == requirements(name).read_bytes()
    return ROOT / name / "bin" / "python" if current else None


def model_for(name: str, python: Path, model: str) -> str:
    """Return what a peer loads: the model's own folder, or an export of it, which is made once.

    Raises:
        ValueError: the export failed; the message ends with its last words.
    """
    if name not in EXPORTS:
        return model
    folder = ROOT / "models" / name / _key(name, Path(model))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # It appears complete or not at all.
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = Path(work) / "export"
            command = EXPORTS[name](python, model, made)
            packages = os.pathsep.join(map(str, python.parents[1].glob("lib/python3*/site-packages")))
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": packages}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise ValueError(f"{name} cannot export {model}: {lines[-1]}")
            made.rename(folder)
    return str(folder)


def _openvino_export(python: Path, model: str, made: Path) -> list[str]:
    tool = [str(python.parent / "optimum-cli"), "export", "openvino", "-m", model, "--weight-format", "fp16"]
    return [*tool, "--task", "text-generation-with-past", str(made)]


def _gguf_export(python: Path, model: str, made: Path) -> list[str]:
    # The converter also needs torch and transformers, which this environment has and the peer's has not.
    return [sys.executable, str(python.parents[1] / CONVERTER), model, "--outtype", "bf16", "--outfile", str(made)]


EXPORTS: dict[str, Callable[[Path, str, Path], list[str]]] = {"openvino": _openvino_export, "llamacpp": _gguf_export}
"""Commands that write a model in a peer's own form."""


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
