"""Tensor parallelism over two processes: the numbers of one process, one worker, equal decisions."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout import Engine
from rollout.config.compose import load_config
from rollout.engine.kv_memory import KVMemory
from rollout.engine.tp_sync import SingleProcess, TensorParallelSync, sync_for
from rollout.errors import InputError
from rollout.headroom.fake import FakeHeadroom
from rollout.job.job import run_job
from rollout.job.ranks import Topology
from rollout.models.errors import UnsupportedModel
from rollout.models.loading.load import ModelSource, load_model
from rollout.models.module.tensor_parallel import tensor_parallel_group
from rollout.models.runners.cuda_graphs import with_cuda_graphs
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.verify import verify
from tests.rollout.test_cli import tiny as saved_tiny  # noqa: F401 - a fixture
from tests.support.forks import output_of_ranks
from tests.support.jobs import read_records, without_attempt
from tests.support.tensor_parallel import assert_records_match_one_process
from tests.support.tiny_models import shallow, tiny
from tests.support.toy_loop import LAYOUT, World, plain, refuse_at


@pytest.mark.long
def test_both_processes_have_the_records_of_a_single_one(tmp_path: Path) -> None:
    # Qwen3 is sliced as a Llama, which the job below is, and has norms of each head, which every process keeps whole.
    # An odd vocabulary is none that every version of transformers can slice.
    assert_records_match_one_process({"qwen3": shallow("qwen3", vocab_size=200)}, tmp_path)


@pytest.mark.long
def test_the_processes_of_a_job_are_one_worker(tmp_path: Path, saved_tiny: Path) -> None:  # noqa: F811
    keys = [f"model.path={saved_tiny}", "model.dtype=float32", "data.limit=12", "sampling.max_new_tokens=10"]
    keys += ["output.rows_per_shard=5", "sampling.n=2"]
    told = output_of_ranks("rollout", *keys, f"output.dir={tmp_path / 'two'}", "model.tensor_parallel=true")
    assert told.count("12, 24 samples") == 1
    run_job(load_config([*keys, f"output.dir={tmp_path / 'one'}"]))
    assert verify(tmp_path / "two").complete
    ours, theirs = (without_attempt(read_records(tmp_path / name)) for name in ("two", "one"))
    assert [record["completion_ids"] for record in ours] == [record["completion_ids"] for record in theirs]
    run = read_run(RunPaths(tmp_path / "two"))
    assert run.shards == 3, "cut for one worker"
    assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "two"))} == {0}


@pytest.mark.parametrize(
    ("family", "processes", "reason"),
    [
        ("falcon", 2, r"no tensor parallel plan: turn tensor_parallel off"),
        ("llama", 3, r"has 2 key-value heads, which 3 processes cannot share evenly"),
        ("llama", 1, r"this launch has one process: start several"),
    ],
)
def test_unsliceable_model_is_refused_before_weights_are_read(
    family: str, processes: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(family).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=reason):
        load_model(ModelSource(str(tmp_path), tensor_parallel=True), torch.device("cpu"))


@pytest.mark.parametrize("other", ["model.device=cpu", "model.device_map=auto", "model.adapter=folder"])
def test_options_that_exclude_tensor_parallelism_are_refused(other: str) -> None:
    with pytest.raises(InputError, match=f"{other.split('=')[0]} is .* where model.tensor_parallel is true"):
        load_config(["output.dir=out", "model.tensor_parallel=true", other])


def test_topology_of_a_tensor_parallel_launch() -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "2"}
    place = Topology.from_environment(launched, tensor_parallel=True)
    assert (place.tensor_parallel, place.rank, place.workers, place.worker) == (True, 1, 3, 2)
    assert not Topology.from_environment({}, tensor_parallel=True).tensor_parallel


@pytest.fixture
def two_processes() -> Iterator[None]:
    """A process group of two without the other process; nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


def sliced(dimensions: tuple[str, ...] | None) -> PreTrainedModel:
    """A model whose last layer is half in this process."""
    model = tiny("llama")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=dimensions)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
    return model


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("name", [("fsdp",), None])
def test_other_ways_to_shard_are_refused(name: tuple[str, ...] | None) -> None:
    """Each process would compute its own rows, and wait for the other's weights for ever."""
    with pytest.raises(UnsupportedModel, match="sharded over the mesh dimensions"):
        Engine(sliced(name), None)


@pytest.mark.usefixtures("two_processes")
def test_a_mesh_without_a_name_is_served_where_transformers_says_what_it_is() -> None:
    model = sliced(None)
    model._tp_size = 2
    assert tensor_parallel_group(model) is distributed.group.WORLD


@pytest.mark.usefixtures("two_processes")
def test_steps_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """One process could find that it has no memory for a graph while the other waits in the step."""
    eager, nothing = Mock(), cast(Any, None)
    with caplog.at_level(logging.WARNING):
        assert with_cuda_graphs(eager, sliced(("tp",)), nothing, nothing) is eager
    assert "it is tensor-parallel" in caplog.text


class Other(SingleProcess):
    """One of two processes; the other has no memory left."""

    alone = False

    def all(self, own: bool) -> bool:
        return False


def test_slab_without_room_on_the_other_process_is_not_allocated() -> None:
    memory = KVMemory(
        LAYOUT, FakeHeadroom(1000 * LAYOUT.bytes_per_page), torch.device("cpu"), None, 0.0, 100, 1, Other()
    )
    assert memory.attainable_pages > 1
    assert not memory.reserve(1)
    assert (memory.bytes_held, memory.pool.slabs, memory.attainable_pages) == (0, [], 0)


def test_an_allocator_failure_inside_of_a_step_ends_the_loop() -> None:
    """The other process is blocked in that step's collectives."""
    trouble, raised = refuse_at({3})
    world = World(plain(4), trouble=trouble)
    world.loop._sync = Other()
    world.memory.reserve(100)  # type: ignore[union-attr]
    with pytest.raises(torch.OutOfMemoryError):
        world.run()
    assert raised == [3]


def test_a_process_group_ends_when_it_is_destroyed() -> None:
    """A group whose threads outlive the interpreter sometimes aborts the process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    assert group is not None
    one = TensorParallelSync(group)
    groups = [weakref.ref(group), one._host_group]
    del group
    assert (one.smallest(3), one.first_rank_value(2.5)) == (3, 2.5)
    assert one.first_rank_samples(frozenset({("b", 1), ("a", 0)})) == {("a", 0), ("b", 1)}
    distributed.destroy_process_group()
    assert [reference() for reference in groups] == [None, None]


def test_a_whole_model_decides_alone() -> None:
    assert type(sync_for(tiny("llama"))) is SingleProcess
