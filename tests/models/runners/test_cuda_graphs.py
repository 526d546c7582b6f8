"""CUDA graphs without a GPU: a fake graph calls the step again on replay, with kernels in Triton's interpreter."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.engine.kv_memory import KVMemory
from rollout.headroom.fake import FakeHeadroom
from rollout.models.attention import triton, triton_metadata
from rollout.models.attention.triton import TileSizes, TritonBackend
from rollout.models.attention.triton_metadata import TileKinds
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners import cuda_graphs, graph_rungs
from rollout.models.runners.base import Runner
from rollout.models.runners.cuda_graphs import CudaGraphRunner, with_cuda_graphs
from rollout.models.runners.graph_rungs import Rung
from rollout.models.runners.packed import PackedRunner, PackedStrategy
from tests.contract.test_long_sequences import long_model
from tests.support.cuda_graph_world import FakeGraphs, World, llama
from tests.support.devices import DEVICE
from tests.support.triton_interpreter import kernels_run_here

_SMALL = TileSizes(16, 16, 4)


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels_run_here(monkeypatch)
    monkeypatch.setattr(triton_metadata, "SPLIT_TOKENS", 32)
    monkeypatch.setattr(triton, "_TILE_SIZES", dict.fromkeys(triton._TILE_SIZES, (_SMALL, _SMALL)))
    monkeypatch.setattr(triton, "_PROGRAMS", 2)
    # Steps without prefills are captured at their first time, except where a test says otherwise.
    monkeypatch.setattr(graph_rungs, "_LARGEST_MIXED_TOKENS", 0)
    monkeypatch.setattr(graph_rungs, "EAGER_STEPS", 0)
    monkeypatch.setattr(graph_rungs, "PADDED_STEPS", 0)
    cuda_graphs._refused.clear()
    yield
    cuda_graphs._refused.clear()


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with prefills are captured as well."""
    monkeypatch.setattr(graph_rungs, "_LARGEST_MIXED_TOKENS", 4096)


def test_rows_are_padded_to_the_next_batch_size_and_bits_match_the_eager_runner() -> None:
    world = World(llama(), texts=5)
    world.same([(text, (3, 5, 1, 17, 33)[text]) for text in range(5)])
    for texts in ((0,), (1, 2), (0, 3, 4), (2,), (4, 0, 1), (0, 1, 2, 3, 4)):
        world.decode(*texts)
    assert sorted(world.sizes) == [1, 2, 4, 8]
    assert len(world.fake.graphs) == 4
    assert sum(graph.replays for graph in world.fake.graphs) == 6


def test_padding_writes_nothing() -> None:
    world = World(llama(), texts=3)
    world.same([(text, 5) for text in range(3)])
    pool = world.pools[1]
    before = [tensor.clone() for slab in pool.slabs if slab is not None for tensor in slab.tensors]
    world.decode(0, 1, 2)
    after = [tensor for slab in pool.slabs if slab is not None for tensor in slab.tensors]
    slots = [int(table[0]) * world.layout.page_size + 5 for table in world.tables[1]]
    for old, new in zip(before, after, strict=True):
        changed = (old != new).flatten(2).any(2).flatten().nonzero()[:, 0].tolist()
        assert set(changed) <= set(slots)


@pytest.mark.usefixtures("mixed")
def test_steps_with_prefills_are_replayed_too() -> None:
    world = World(texts=6)
    world.same([(0, 4), (1, 9)])
    world.same([(0, 1), (2, 2), (1, 30)])
    world.same([(3, 70), (0, 1)])
    world.same([(3, 1), (0, 1), (4, 17), (1, 1), (5, 40)])
    assert world.rungs == [Rung(64, 16, mixed=True), Rung(128, 16, mixed=True)]
    assert [graph.replays for graph in world.fake.graphs] == [3, 1]
    world.decode(0, 1, 2)
    assert world.rungs[2:] == [Rung(4, 4, mixed=False)]


def test_prefills_of_more_tokens_than_pay_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rungs, "_LARGEST_MIXED_TOKENS", 64)
    world = World()
    world.same([(0, 65)])
    assert not world.rungs
    world.same([(0, 1), (1, 63)])
    assert world.rungs == [Rung(64, 16, mixed=True)]


@pytest.mark.usefixtures("mixed")
def test_prefills_of_a_library_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "prefills_in_kernels", False)
    world = World()
    world.same([(0, 4), (1, 9)])
    assert world.fake.tried == 0
    world.decode(0, 1)
    assert world.fake.tried == 1


@pytest.mark.usefixtures("mixed")
def test_a_size_is_captured_once_it_has_come_up_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rungs, "EAGER_STEPS", 2)
    monkeypatch.setattr(graph_rungs, "PADDED_STEPS", 3)
    world = World(texts=5)
    world.same([(text, 5 + text) for text in range(5)])
    for _ in range(2):
        world.decode(0, 1, 2, 3, 4)
    assert not world.sizes
    world.decode(0, 1, 2, 3, 4)
    assert world.sizes == [8]
    for _ in range(3):  # the graph of eight rows replays these
        world.decode(0, 1)
    assert world.sizes == [8]
    assert world.fake.graphs[0].replays == 4
    world.forward([(0, 1), (1, 1)])
    assert world.sizes == [8, 2]


@pytest.mark.usefixtures("mixed")
def test_only_the_first_step_of_each_kind_is_tried_out() -> None:
    model, kinds = llama(1), TileKinds()
    for tried in (2, 0):  # by a first runner, and by a second one of the same model
        world = World(model)
        world.runner._backend._tile_kinds = kinds
        for parts in ([(0, 70)], [(1, 4), (2, 2)], [(0, 1)], [(0, 1), (1, 1)], [(0, 1), (1, 1), (2, 1)]):
            world.same(parts)
        assert len(world.fake.graphs) == 5
        assert world.fake.tried == tried


def test_a_size_that_cannot_be_captured_untried_is_tried_out(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.same([(0, 4), (1, 9)])
    world.decode(0)
    tried = world.fake.tried
    world.fake.failure = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        world.decode(0, 1)
    assert (world.sizes, world.fake.tried) == ([1, 2], tried + 1)
    assert not caplog.records


def test_replays_are_right_while_the_pool_grows_and_shrinks() -> None:
    """Freed slabs are filled with NaN."""
    world = World(llama(), slab_pages=2, texts=3)
    world.same([(0, 18), (1, 3), (2, 14)])
    pool, tables = world.pools[1], world.tables[1]
    kept = []
    for _ in range(2):
        for _ in range(2):
            pool.grow()
        world.decode(0, 1, 2)
        # Keeps one slab for the live rows.
        tables.append(pool.allocate(1))
        before = [slab for slab in pool.slabs if slab is not None]
        while pool.shrink(tables):
            pass
        freed = [slab for slab in before if not any(slab is held for held in pool.slabs)]
        assert freed
        for slab in freed:
            for tensor in slab.tensors:
                tensor.fill_(torch.nan)
        kept += freed  # so that new slabs do not reuse their memory
        world.decode(0, 1, 2)
    assert len(world.fake.graphs) == 1


def test_step_is_captured_again_when_pages_outgrow_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_PAGES_PER_ROW", 2)
    world = World(texts=2)
    rooms = []
    for _ in range(5):
        world.same([(0, 15), (1, 15)])
        world.decode(0, 1)
        rooms.append(world.runner._captured[Rung(2, 2, mixed=False)].inputs.metadata.capacity.entries)
    assert rooms == [4, 4, 16, 16, 16]
    assert [graph.gone for graph in world.fake.graphs] == [True, False]
    assert world.fake.released == 1, "torch lets no new graph join a memory pool that no graph is left in"


def test_model_whose_capture_fails_runs_eagerly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.fake.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    world.same([(0, 4), (1, 9)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            world.decode(0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "Steps of LlamaForCausalLM (model type 'llama') are not captured in CUDA graphs and run slower: "
        "RuntimeError: operation not permitted when stream is capturing."
    ]
    assert (world.fake.tried, world.fake.released, world.runner.bytes_kept) == (1, 1, 0)
    assert with_cuda_graphs(world.plain, world.model, world.runner._backend, world.borrowed) is world.plain


def test_capture_out_of_memory_is_retried_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "_PAUSED_STEPS", 3)
    world = World()
    world.same([(0, 4), (1, 9)])
    world.decode(0)
    world.fake.failure = torch.OutOfMemoryError("CUDA out of memory.")
    with caplog.at_level(logging.WARNING):
        world.decode(0, 1)
    assert "Memory is short: the next 3 steps run without CUDA graphs" in caplog.text
    assert world.runner.bytes_kept == 0
    for _ in range(2):
        world.decode(0, 1)
    assert not world.sizes
    world.decode(0, 1)
    assert world.sizes == [2]


def test_out_of_memory_is_found_behind_a_later_error() -> None:
    world = World()
    world.fake.first_failure = torch.OutOfMemoryError("CUDA out of memory.")
    world.fake.failure = RuntimeError("capture was invalidated")
    world.same([(0, 4)])
    world.decode(0)
    assert world.runner._paused
    assert world.model not in cuda_graphs._refused


def test_what_the_caller_was_handling_is_no_cause(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.fake.failure = RuntimeError("operation not permitted when stream is capturing")
    world.same([(0, 4)])
    try:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    except torch.OutOfMemoryError:
        world.decode(0)
    assert not world.runner._paused
    assert "run slower: RuntimeError: operation not permitted when stream is capturing." in caplog.text


def test_shed_frees_graphs_and_they_are_captured_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "_PAUSED_STEPS", 3)
    world = World()
    assert not world.runner.shed()
    world.same([(0, 4), (1, 9)])
    world.decode(0, 1)
    with caplog.at_level(logging.DEBUG):
        assert world.runner.shed()
    assert "Memory is short: the CUDA graphs are freed and the next 3 steps run eagerly." in caplog.text
    assert (world.runner.bytes_kept, world.fake.released) == (0, 1)
    assert not world.runner.shed()
    for _ in range(2):
        world.decode(0, 1)
    assert not world.sizes
    world.decode(0, 1)
    assert world.sizes == [2]


def test_close_frees_all_memory_and_logs_the_captures(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.same([(0, 4), (1, 9)])
    world.decode(0)
    world.decode(0, 1)
    assert world.runner.bytes_kept == 2000
    with caplog.at_level(logging.DEBUG):
        world.runner.close()
    assert "2 step(s) were captured in CUDA graphs" in caplog.text
    assert world.runner.bytes_kept == 0
    assert not world.runner._captured
    world.decode(0, 1)
    assert world.sizes == [2]


def test_step_is_captured_again_after_weights_move() -> None:
    world = World()
    world.same([(0, 4)])
    world.decode(0)
    norm = world.model.model.norm.weight
    with torch.no_grad():
        norm.mul_(1.5)
    world.decode(0)
    assert len(world.fake.graphs) == 1
    norm.data = norm.data.clone() * 2
    world.decode(0)
    assert [graph.gone for graph in world.fake.graphs] == [True, False]


def test_forwards_under_autocast_run_eagerly() -> None:
    world = World()
    world.same([(0, 4)])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        world.decode(0)
    assert world.fake.tried == 0


@pytest.mark.parametrize("family", ["phi3", "dynamic"])
def test_models_with_length_dependent_rotary_embeddings_run_eagerly(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    model = long_model("phi3") if family == "phi3" else llama(rope_parameters=scaling)
    world = World(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert with_cuda_graphs(world.plain, model, world.runner._backend, world.borrowed) is world.plain
    assert caplog.text.count("are not captured") == 1
    assert "depend on the length of a sequence" in caplog.text


def test_model_on_several_devices_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.model.lm_head.to("meta")
    with caplog.at_level(logging.WARNING):
        assert with_cuda_graphs(world.plain, world.model, world.runner._backend, world.borrowed) is world.plain
    assert "it lies on several devices" in caplog.text


def test_a_step_that_captures_says_so() -> None:
    world = World()
    world.same([(0, 4), (1, 9)])
    assert not world.runner.prepared
    for prepared in (True, False):
        world.decode(0, 1)
        assert world.runner.prepared == prepared


def test_captures_are_rare_under_a_latency_budget_that_they_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_STEPS_PER_SLOW_CAPTURE", 4)
    world = World()
    world.runner.latency_budget_ms = 1e-6
    world.same([(0, 4), (1, 9), (2, 3)])
    found = []
    for texts in ((0,), (0, 1), (0, 1), (0, 1), (0, 1, 2)):
        world.forward([(text, 1) for text in texts])
        found.append(world.sizes)
    assert found == [[1], [1], [1, 2], [1, 2], [1, 2]]
    world.runner.latency_budget_ms = 1e9
    world.forward([(text, 1) for text in (0, 1, 2)])
    assert world.sizes == [1, 2, 4]


def test_resting_keeps_graphs_within_a_limit() -> None:
    world = World()
    world.same([(0, 4)])
    world.decode(0)
    kept = world.runner.rest(1e9)
    assert kept > world.runner.bytes_kept > 0
    world.decode(0)
    assert len(world.fake.graphs) == 1
    assert world.runner.rest(kept - 1) == 0
    assert (world.runner.bytes_kept, world.fake.released) == (0, 1)


def use_triton(monkeypatch: pytest.MonkeyPatch, *, replays: bool = True) -> list[FakeGraphs]:
    """Let engines run Triton's kernels; return the graphs of their runners, which grow as calls begin."""
    graphs: list[FakeGraphs] = []

    def runner(self: PackedStrategy, pool: PagePool) -> Runner:
        backend = TritonBackend(pool)
        eager = PackedRunner(self.model, pool, backend)
        if not replays:
            return eager
        graphs.append(FakeGraphs())
        return CudaGraphRunner(eager, self.model, backend, self._borrowed, graphs[-1])

    monkeypatch.setattr(PackedStrategy, "runner", runner)
    return graphs


def test_engine_generates_the_same_tokens_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join and finish in a small pool; all graphs are freed when the call ends."""
    model = llama()
    prompts = [[5, 6, 7], [8] * 20, [9, 10], [11] * 9]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    batches = []
    for replays in (False, True):
        graphs = use_triton(monkeypatch, replays=replays)
        engine = Engine(model, None, max_rows=3)
        batches.append([record.completion_ids for record in engine.generate(prompts, params)])
    assert batches[0] == batches[1]
    assert sum(graph.replays for graph in graphs[-1].graphs) >= 6
    assert graphs[-1].bytes_kept == 0


def test_a_session_keeps_graphs_while_the_module_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(1)
    graphs = use_triton(monkeypatch)
    engine = Engine(model, None)
    graphs.clear()
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    with engine.session() as session:
        for _ in range(3):
            found = session.generate([[5, 6, 7], [9, 10]], params)
            with torch.no_grad():
                model.lm_head.weight.mul_(-1.5)  # other weights at the same place
        assert [len(made.graphs) for made in graphs] == [1]
        assert graphs[0].graphs[0].replays == 6
        session.release()
        assert graphs[0].bytes_kept == 0
        session.generate([[5, 6, 7]], params)
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        session.generate([[5, 6, 7]], params)
        assert [len(made.graphs) for made in graphs] == [1, 1, 1]
    assert all(made.bytes_kept == 0 for made in graphs)
    with torch.no_grad():
        model.lm_head.weight.div_(-1.5)
    expected = engine.generate([[5, 6, 7], [9, 10]], params)
    assert [record.completion_ids for record in expected] == [record.completion_ids for record in found]


def test_what_sessions_keep_of_graphs_is_no_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    engine = Engine(llama(1), None)
    session = engine.session()
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    session.generate([[5, 6, 7]], params)
    sessions = engine._generation.sessions
    assert sessions.runner_bytes == 1000
    free = FakeHeadroom(10_000)
    kv = KVMemory(session._kept._held.kept.kv.pool.layout, free, DEVICE, None, 0.0, 1, idle=sessions)  # type: ignore[union-attr]
    assert kv.headroom_bytes == 9000
    assert sessions.release()
    kv.read_headroom()
    assert kv.headroom_bytes == 10_000
