"""The command line of scripts that run engines on one model, in their own process."""

from __future__ import annotations

import argparse
from typing import Any

from jobs.bench.engines.harness import Setup
from jobs.bench.engines.loading import load
from jobs.bench.lib import random_models


def options(description: str, device: str = "cuda") -> argparse.ArgumentParser:
    """Return a parser with the arguments that such scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="model folder, Hub id, packaged:NAME, or random:NAME")
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser


def folder(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """Return the model's folder; exit with status 2 if there is none."""
    try:
        return random_models.resolve(given.model)
    except ValueError as error:
        parser.error(str(error))


def model(folder: str, given: argparse.Namespace) -> Any:
    """Load the model onto its device."""
    return load(Setup(folder, given.dtype, given.device))
