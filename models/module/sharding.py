"""Modules that several processes share: take off what synchronises processes, and gather sharded weights for a call.

Ranks generate different amounts, so a forward of the engine must not wait for other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from rollout.models.errors import UnsupportedModel


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, data parallelism and torch.compile, whose forward runs in this process alone."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's; its class is slow to import
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class ShardedWeights:
    """The weights of a module under FSDP, gathered on every rank for as long as a call takes.

    Nothing is sharded, and nothing done, in a module without FSDP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fsdp2: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._fsdp1 = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
        for module in self._fsdp2:
            _refuse_unknown_state(module._get_fsdp_state())

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._fsdp1 or self._fsdp2)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all weights inside the block. Every rank must enter it; each may leave it when it likes.

        Raises:
            UnsupportedModel: FSDP1 holds weights in a form that cannot be served.
        """
        if any(not module._use_orig_params for module in self._fsdp1):
            raise UnsupportedModel(
                "The module's weights are flattened by FSDP: wrap it with use_orig_params=True "
                "(accelerate: fsdp_use_orig_params), or use FSDP2."
            )
        sharded = [module for module in self._fsdp2 if _is_sharded(module)]
        with ExitStack() as stack:
            if self._fsdp1:
                # Every outermost one gathers those inside it.
                inner = {id(part) for module in self._fsdp1 for part in list(module.modules())[1:]}
                for module in self._fsdp1:
                    if id(module) not in inner:
                        stack.enter_context(FullyShardedDataParallel.summon_full_params(module, writeback=False))
            for fsdp in sharded:
                stack.callback(fsdp.reshard)  # before it is gathered, which may be interrupted
                fsdp.unshard()
            yield

    def refuse_sharded(self) -> None:
        """Refuse a module whose weights should be gathered, but are not.

        Raises:
            UnsupportedModel: weights are sharded.
        """
        if any(map(_is_sharded, self._fsdp2)):
            raise UnsupportedModel(
                "The module's FSDP weights are sharded at this point of the call, so a training step or the end of "
                "another call came in between: let a stream end before the module is used otherwise."
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep forwards inside the block from gathering and sharding weights.

        Raises:
            UnsupportedModel: weights are sharded.
        """
        self.refuse_sharded()
        states: list[Any] = list(dict.fromkeys(module._get_fsdp_state() for module in self._fsdp2))
        before = [state._training_state for state in states]
        try:
            for state in states:
                # With this, its forward hooks cast inputs and outputs as always, and do nothing else.
                state._training_state = type(state._training_state).PRE_BACKWARD
            for module in self._fsdp1:
                vars(module)["forward"] = module._fsdp_wrapped_module.forward
            yield
        finally:
            for module in self._fsdp1:
                vars(module).pop("forward", None)
            for state, own in zip(states, before, strict=True):
                state._training_state = own


def _is_sharded(module: FSDPModule) -> bool:
    """Return whether FSDP2 has sharded the weights that a module holds itself."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.12 and later
        groups = state._fsdp_param_groups
    else:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return any(not group.is_unsharded for group in groups)


def _refuse_unknown_state(state: object) -> None:
    """Refuse a module under a version of FSDP2 that keeps its state in other attributes, which are private.

    Raises:
        UnsupportedModel: they are missing.
    """
    groups = hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group")
    if not groups or not hasattr(type(getattr(state, "_training_state", None)), "PRE_BACKWARD"):
        raise UnsupportedModel(
            f"FSDP2 of torch {torch.__version__} is not served, since it keeps its state in another way than the "
            "versions that are known: gather the weights into a module without FSDP, or use another version of torch."
        )


def refuse_missing_weights(model: nn.Module) -> None:
    """Refuse a module some of whose weights have no values in this process.

    Raises:
        UnsupportedModel: weights are on the meta device, empty, or on devices that nothing connects.
    """
    offloaded = any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())
    connected = any(hasattr(module, "_hf_hook") for module in model.modules())
    devices = set()
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id") and not weight.numel():
            raise UnsupportedModel(
                f"Weight {name} is empty, since DeepSpeed ZeRO-3 has sharded it: create and call the engine inside "
                "TRL's unwrap_model_for_generation(model, accelerator), which gathers the weights."
            )
        if not weight.numel():
            raise UnsupportedModel(f"Weight {name} is empty: gather or load the module's weights first.")
        if weight.is_meta and not offloaded:
            raise UnsupportedModel(
                f"Weight {name} is on the meta device and has no values: load the module's weights first."
            )
        if not weight.is_meta and not isinstance(weight, DTensor):
            devices.add(str(weight.device))
    if len(devices) > 1 and not connected:
        raise UnsupportedModel(
            f"The module's weights are on {', '.join(sorted(devices))}, and nothing moves data between them: place "
            "the module on one device, or on several with accelerate's dispatch_model or device_map."
        )
