"""The trackers that can be named, made through accelerate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollout.errors import InputError

#: What `tracker=` may name, and the package of each.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
PROJECT = "rollout"


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        InputError: the package is missing.
    """
    if name != "none" and importlib.util.find_spec(TRACKERS[name]) is None:
        raise InputError(f"tracker={name} needs the package {TRACKERS[name]}: pip install 'rollout[{name}]'.")


def _tensorboard(folder: Path, run_name: str) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(run_name, str(folder))


def _wandb(folder: Path, run_name: str) -> Any:
    from accelerate.tracking import WandBTracker

    return WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=run_name, dir=str(folder))


def _trackio(folder: Path, run_name: str) -> Any:
    # Read when the package is imported.
    os.environ.setdefault("TRACKIO_DIR", str(folder))
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=run_name)


def _mlflow(folder: Path, run_name: str) -> Any:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(experiment_name=PROJECT, logging_dir=str(folder), run_name=run_name)


STARTS: Mapping[str, Callable[[Path, str], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
