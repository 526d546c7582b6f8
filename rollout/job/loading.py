"""Load a job's model: what is read from its files, and the engine on it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from rollout.config.schema import Config, ModelConfig
from rollout.data.prompts import Prompts
from rollout.errors import InputError
from rollout.job.cpu_threads import choose_threads
from rollout.job.hints import hint_at_length, hint_at_prompts
from rollout.job.prompt_encoding import Encoder, make_encoder
from rollout.job.ranks import Topology
from rollout.job.reference import Reference, load_reference, naming_reference
from rollout.models.garbage import without_collections
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.run import RunDir
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import StopConditions

logger = logging.getLogger(__name__)


class Generator(Protocol):
    """The part of the engine that a job uses."""

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        stop: StopConditions | None = None,
        weights_fixed: bool = False,
    ) -> Iterator[Record]: ...

    def check_params(self, params: SamplingParams) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine on a loaded model."""

    engine: Generator
    encoder: Encoder
    """Encodes the prompts; known to serve the first of them."""
    dtype: str
    """The model's dtype."""
    attention: str
    """The value of `Engine.attention`."""
    memory: str
    """The value of `Engine.memory`."""
    reference: Reference | None = None
    """Scores under the reference model, if there is one."""


def load_engine(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
    """Load the job's model and build an engine on it.

    Raises:
        InputError: the model cannot be loaded or served, or lacks the chat template that the prompts need.
    """
    start = time.monotonic()
    logger.info("Loading PyTorch and the model.")
    # Imported here because bad input is refused without them, and they take seconds. They make half a million objects
    # that stay: to look for garbage among these again and again would take a sixth of the time.
    with without_collections():
        import torch

        from rollout.models.csrc.build import begin as begin_compiling

        # Before the imports below, which take as long as the compiler; the device is checked after them.
        if config.model.device == "cpu" or (config.model.device == "auto" and not torch.cuda.is_available()):
            begin_compiling()
        import transformers

        from rollout.engine.engine import Engine
        from rollout.headroom.headroom import headroom_for
        from rollout.headroom.kept_free import KeptFree
        from rollout.models.attention.select import check_available
        from rollout.models.errors import UnsupportedModel
        from rollout.models.loading.load import ModelSource, load_model, load_tokenizer, resolve_device

    transformers.utils.logging.disable_progress_bar()
    named = asdict(config.model)
    attention = named.pop("attention")
    batch_invariant = named.pop("batch_invariant")
    del named["reference"]
    source = ModelSource(**named)
    with _naming_model_keys():
        device = resolve_device(source.device)
        check_available(attention, device)
        if device.type == "cpu" and (count := choose_threads(topology.local_world_size, os.environ)) is not None:
            torch.set_num_threads(count)
        tokenizer = load_tokenizer(source)
        if topology.rank == 0:
            hint_at_prompts(tokenizer, prompts, config.data)
        encoder = make_encoder(config.data, tokenizer, prompts, source.path)
        model = load_model(source, device)
    reference = None
    headroom = None
    if config.model.reference is not None:
        logger.info("Loading the reference model.")
        reference = load_reference(
            source,
            config.model,
            tokenizer,
            device,
            reserve_fraction=config.memory.reserve_fraction,
            attention=attention,
            batch_invariant=batch_invariant,
        )
        headroom = KeptFree(headroom_for(device), reference.working_bytes)
    with _naming_model_keys(UnsupportedModel):
        engine = Engine(
            model,
            tokenizer,
            policy=config.batcher.policy(),
            latency_budget_ms=config.batcher.latency_budget_ms,
            max_rows=config.batcher.max_rows,
            min_rows=config.batcher.min_rows,
            max_kv_bytes=config.memory.max_kv_bytes,
            reserve_fraction=config.memory.reserve_fraction,
            keep_prefixes_bytes=config.memory.keep_prefixes_bytes,
            attention=attention,
            batch_invariant=batch_invariant,
            headroom=headroom,
            skip_special_tokens=config.output.skip_special_tokens,
            split_reasoning=config.output.split_reasoning,
        )
    try:
        engine.check_params(config.sampling.params())
    except InputError as error:
        # The message begins with the name of the parameter.
        raise InputError(f"sampling.{error}") from error
    if topology.rank == 0:
        hint_at_length(config.sampling.max_new_tokens, engine.context_limit)
    logger.info(
        "Loaded the model in %.0f s: %s on %s, attention %s.",
        time.monotonic() - start,
        str(model.dtype).removeprefix("torch."),
        device,
        engine.attention,
    )
    return Loaded(
        engine=engine,
        encoder=encoder,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=engine.attention,
        memory=engine.memory,
        reference=None if reference is None else reference.engine,
    )


Load = Callable[[Config, Prompts, Topology], Loaded]


def model_files(config: Config) -> tuple[Path, Path | None]:
    """Return the local folder or file of the model, and the folder of its adapter."""
    # Imported here because it is slow; to convert the packaged model it also loads torch.
    from rollout.models.loading.checkpoint import locate

    model = config.model
    with _naming_model_keys():
        return locate(model.path, model.revision, model.adapter, code=model.trust_remote_code)


def reference_files(config: Config) -> list[Path]:
    """Return the local folder or file of the reference model and the folder of its adapter; none without one."""
    from rollout.models.loading.checkpoint import locate

    path = config.model.reference
    if path is None:
        return []
    with naming_reference(path):
        files = locate(path, code=config.model.trust_remote_code)
    return [file for file in (files.model, files.adapter) if file is not None]


@contextmanager
def _naming_model_keys(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn errors of rollout.models into input errors that name the configuration key of the parameter at fault."""
    try:
        yield
    except InputError:
        raise
    except kind as error:
        message = str(error)
        # Messages about a parameter begin with its name: "path 'x' does not exist", "attention=triton was requested".
        parameter = message.replace("=", " ").partition(" ")[0]
        named = parameter in {field.name for field in fields(ModelConfig)}
        raise InputError(f"model.{message}" if named else message) from error


def with_run_dtype(config: Config, run: RunDir | None) -> Config:
    """Replace ``model.dtype=auto`` by the dtype that the run began with: ``auto`` depends on the machine."""
    if run is None or config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=run.dtype))
