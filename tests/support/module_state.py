"""All that a trainer could notice of a call on its module: the module's own state and that of the process."""

from __future__ import annotations

import random
import signal
import sys
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.support.devices import DEVICE, GPU

_PLAIN = (bool, int, float, str, type(None))


def module_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a module and of the process, to be compared with that after a call."""
    return _module(model) | _process() | _code(model)


def _module(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "training": [module.training for module in modules],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in modules],
        "attention": [module.config._attn_implementation for module in modules if hasattr(module, "config")],
        "configurations": [dict(vars(module.config)) for module in modules if hasattr(module, "config")],
        "parameters": [
            (name, p.dtype, p.requires_grad, id(p), p.data_ptr(), p._version, _gradient(p))
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, b.dtype, b.sum().item(), b.is_inference()) for name, b in model.named_buffers()],
        "instance attributes": [
            {name: value if isinstance(value, _PLAIN) else id(value) for name, value in vars(module).items()}
            for module in modules
        ],
        "hooks": [
            {name: dict(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}
            for module in modules
        ],
    }


def _gradient(parameter: nn.Parameter) -> tuple[int, float] | None:
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad.sum().item())


def _process() -> dict[str, Any]:
    stance = sys.modules["torch._dynamo.eval_frame"]._stance if "torch._dynamo.eval_frame" in sys.modules else None
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "device rng": torch.cuda.get_rng_state(DEVICE).tolist() if GPU is not None else None,
        "numpy rng": str(np.random.get_state()),
        "python rng": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled(DEVICE.type), torch.get_autocast_dtype(DEVICE.type)),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark),
        "compiler": getattr(stance, "stance", "default"),
        "context": {variable.name: id(value) for variable, value in copy_context().items()},
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }


def _code(model: nn.Module) -> dict[str, Any]:
    """Return what a call replaces in classes and Python modules."""
    sources = sorted({type(module).__module__ for module in model.modules()})
    return {
        "attention property": vars(PreTrainedConfig)["_attn_implementation"],
        "rotary functions": [getattr(sys.modules[name], "apply_rotary_pos_emb", None) for name in sources],
    }
