"""The command line of scripts that run engines on one model, in their own process."""

from __future__ import annotations

import argparse
from typing import Any

from jobs.bench.engines.harness import Task
from jobs.bench.engines.loading import load
from jobs.bench.lib import random_models


def options(description: str, device: str = "cuda") -> argparse.ArgumentParser:
    """A parser of what such scripts have in common; on ``device`` if none is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="model folder, Hub id, packaged:NAME, or random:NAME")
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser


def folder(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """Of the model that was given; ends the process, with status 2, where there is none."""
    try:
        return random_models.resolve(given.model)
    except ValueError as error:
        parser.error(str(error))


def model(folder: str, given: argparse.Namespace) -> Any:
    """The model on its device."""
    return load(Task(folder, given.dtype, given.device, None, []))
