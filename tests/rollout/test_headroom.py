from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from rollout.errors import InputError
from rollout.headroom.cuda import CudaHeadroom, _log_without_nvml
from rollout.headroom.fake import FakeHeadroom
from rollout.headroom.headroom import after_reserve, headroom_for, memory_name
from rollout.headroom.host import HostHeadroom, _resident_bytes, limiting_cgroup

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host of 64 GiB, 40 of them available."""
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory


def write(folder: Path, **files: object) -> None:
    """Files named ``memory.<key>``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def host_headroom(tmp_path: Path, membership: str) -> HostHeadroom:
    (tmp_path / "cgroup").write_text(membership)
    return HostHeadroom(membership=tmp_path / "cgroup", mount=tmp_path / "fs", refresh_s=0.0)


def stat(active: int = 0, inactive: int = 0, mapped: int = 0, prefix: str = "") -> str:
    mapped_name = "total_mapped_file" if prefix else "file_mapped"
    return f"anon 5\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\n{mapped_name} {mapped}"


def test_without_cgroups_the_host_is_what_there_is(tmp_path: Path):
    memory = HostHeadroom(membership=tmp_path / "missing", mount=tmp_path)
    assert (memory.total_bytes, memory.free_bytes()) == (64 * GIB, 40 * GIB)


def test_version_2_counts_dropable_file_cache_as_free(tmp_path: Path):
    cache = stat(active=2 * GIB, inactive=3 * GIB, mapped=1 * GIB)
    write(tmp_path / "fs/job", max=16 * GIB, high="max", current=12 * GIB, stat=cache)
    memory = host_headroom(tmp_path, "0::/job\n")
    assert (memory.total_bytes, memory.free_bytes()) == (16 * GIB, (16 - 12 + 2 + 3 - 1) * GIB)


def test_all_of_the_cache_mapped_gives_nothing(tmp_path: Path):
    # Shared memory is mapped, but not on the file lists: the difference can be negative.
    write(tmp_path / "fs/job", max=16 * GIB, current=12 * GIB, stat=stat(active=GIB, mapped=3 * GIB))
    assert host_headroom(tmp_path, "0::/job\n").free_bytes() == 4 * GIB


def test_the_throttling_limit_binds_too_and_can_be_exceeded(tmp_path: Path):
    write(tmp_path / "fs/job", max=16 * GIB, high=8 * GIB, current=9 * GIB, stat=stat())
    memory = host_headroom(tmp_path, "0::/job\n")
    assert (memory.total_bytes, memory.free_bytes()) == (8 * GIB, -1 * GIB)


def test_an_outer_cgroup_binds_when_it_is_tighter(tmp_path: Path):
    write(tmp_path / "fs/outer", max=10 * GIB, current=9 * GIB, stat=stat())
    write(tmp_path / "fs/outer/middle", max="max", current=3 * GIB, stat=stat())
    write(tmp_path / "fs/outer/middle/inner", max=8 * GIB, current=2 * GIB, stat=stat())
    memory = host_headroom(tmp_path, "0::/outer/middle/inner\n")
    assert (memory.total_bytes, memory.free_bytes()) == (8 * GIB, 1 * GIB)


@pytest.mark.parametrize(
    ("membership", "name"), [("0::/job/step/task\n", "job/step"), ("0::/job\n", "job"), ("0::/\n", ""), ("", "")]
)
def test_limiting_cgroup_is_the_innermost_with_a_limit(tmp_path: Path, membership: str, name: str) -> None:
    for folder, limit in (("", GIB), ("job", 2 * GIB), ("job/step", GIB), ("job/step/task", "max")):
        write(tmp_path / "fs" / folder, max=limit, current=5, stat=stat())
    (tmp_path / "cgroup").write_text(membership)
    assert limiting_cgroup(tmp_path / "cgroup", tmp_path / "fs") == name


def test_memory_is_named_alike_by_processes_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.headroom.headroom.limiting_cgroup", lambda: "slurm/job_7")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"0000-{device.index}")
    )
    assert memory_name([torch.device("cpu")]) == "cpu slurm/job_7"
    assert memory_name([torch.device("cuda", 1), torch.device("cuda", 0)]) == "GPU-0000-0 GPU-0000-1"


def test_version_1_takes_the_counters_that_include_cgroups_below(tmp_path: Path):
    own_only = "active_file 7\ninactive_file 7\nmapped_file 7\n"
    counters = own_only + stat(active=GIB, inactive=2 * GIB, prefix="total_")
    folder = tmp_path / "fs/memory/slurm/job_1"
    write(folder, limit_in_bytes=16 * GIB, usage_in_bytes=12 * GIB, stat=counters)
    write(tmp_path / "fs/memory", limit_in_bytes=UNLIMITED_V1, usage_in_bytes=50 * GIB, stat=stat())
    memory = host_headroom(tmp_path, "9:name=systemd:/x\n4:memory:/slurm/job_1\n1:cpu,cpuacct:/\n0::/\n")
    assert (memory.total_bytes, memory.free_bytes()) == (16 * GIB, (16 - 12 + 3) * GIB)


def test_a_hybrid_mount_is_read_on_both_sides(tmp_path: Path):
    write(tmp_path / "fs/unified/a", max=6 * GIB, current=GIB, stat=stat())
    write(tmp_path / "fs/memory/b", limit_in_bytes=7 * GIB, usage_in_bytes=4 * GIB, stat=stat())
    memory = host_headroom(tmp_path, "4:memory,hugetlb:/b\n0::/a\n")
    assert (memory.total_bytes, memory.free_bytes()) == (6 * GIB, 3 * GIB)


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../../outside"])
def test_a_path_that_is_not_mounted_here_falls_back_to_the_mounts_root(tmp_path: Path, path: str):
    write(tmp_path / "fs/memory", limit_in_bytes=4 * GIB, usage_in_bytes=GIB, stat=stat())
    # Outside of the mount, as ".." would reach it.
    write(tmp_path / "outside", limit_in_bytes=GIB, usage_in_bytes=GIB, stat=stat())
    assert host_headroom(tmp_path, f"4:memory:{path}\n").free_bytes() == 3 * GIB


def test_the_host_binds_when_it_is_tighter(tmp_path: Path, host: SimpleNamespace):
    write(tmp_path / "fs/job", max=1000 * GIB, current=GIB, stat=stat())
    memory = host_headroom(tmp_path, "0::/job\n")
    host.available = 3 * GIB
    assert (memory.total_bytes, memory.free_bytes()) == (64 * GIB, 3 * GIB)


def test_others_are_seen_after_a_while_and_this_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, resident = 5.0, 2 * GIB
    monkeypatch.setattr("rollout.headroom.host._resident_bytes", lambda: resident)
    write(tmp_path / "fs/job", max=16 * GIB, current=12 * GIB, stat=stat())
    (tmp_path / "cgroup").write_text("0::/job\n")
    memory = HostHeadroom(tmp_path / "cgroup", tmp_path / "fs", 0.5, lambda: now)
    assert memory.free_bytes() == 4 * GIB
    resident += GIB
    write(tmp_path / "fs/job", current=15 * GIB)
    now += 0.4
    assert memory.free_bytes() == 3 * GIB
    now += 0.2
    assert memory.free_bytes() == 1 * GIB
    resident -= GIB
    assert memory.free_bytes() == 2 * GIB


def test_the_resident_memory_of_this_process():
    before = _resident_bytes()
    taken = b"x" * (64 << 20)
    assert _resident_bytes() - before > 0.9 * len(taken)


def test_a_cgroup_that_vanishes_limits_nothing(tmp_path: Path):
    write(tmp_path / "fs/job", max=16 * GIB, current=12 * GIB, stat=stat())
    memory = host_headroom(tmp_path, "0::/job\n")
    write(tmp_path / "fs/job", current=15 * GIB)
    assert memory.free_bytes() == 1 * GIB
    (tmp_path / "fs/job/memory.max").unlink()
    assert memory.free_bytes() == 40 * GIB


def test_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    memory = headroom_for(torch.device("cpu"))
    assert 0 < memory.free_bytes() <= memory.total_bytes <= psutil.virtual_memory().total


class FakeGpu:
    """One GPU as torch, its allocator and NVML show it; bytes are settable."""

    def __init__(self) -> None:
        self.total = 80 * GIB
        self.runtime_free = 50 * GIB
        self.nvml_free = 48 * GIB
        self.allocated = 20 * GIB
        self.reserved = 25 * GIB
        self.known_as = {"GPU-0a1b"}
        self.driver_reads = 0

    def stats(self, device: torch.device) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"current": self.allocated, "peak": 99 * GIB}, "small_pool": {"current": 1}},
            "reserved_bytes": {"all": {"current": self.reserved, "peak": 99 * GIB}},
        }

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.driver_reads += 1
        return self.runtime_free, self.total

    def handle(self, name: str) -> str:
        if name not in self.known_as:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return name

    def memory_info(self, handle: str) -> SimpleNamespace:
        assert handle in self.known_as
        return SimpleNamespace(free=self.nvml_free)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    properties = SimpleNamespace(
        total_memory=fake.total, uuid="0a1b", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fake.stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fake.mem_get_info)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", fake.handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByPciBusId", fake.handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", fake.memory_info)
    _log_without_nvml.cache_clear()
    return fake


def cuda_headroom(now: list[float] | None = None) -> CudaHeadroom:
    clock = [0.0] if now is None else now
    return CudaHeadroom(torch.device("cuda", 0), refresh_s=0.05, clock=lambda: clock[0])


def test_cuda_takes_the_tighter_driver_reading_and_adds_torchs_cache(gpu: FakeGpu):
    memory = cuda_headroom()
    assert (memory.total_bytes, memory.free_bytes()) == (80 * GIB, (48 + 5) * GIB)
    gpu.runtime_free = 30 * GIB
    assert cuda_headroom().free_bytes() == (30 + 5) * GIB


def test_cuda_sees_its_own_allocations_at_once_and_others_after_the_interval(gpu: FakeGpu):
    now = [10.0]
    memory = cuda_headroom(now)
    memory.free_bytes()
    now[0] = 10.04
    gpu.allocated, gpu.reserved = 30 * GIB, 35 * GIB  # 10 GiB of our own
    gpu.runtime_free = gpu.nvml_free = 31 * GIB  # and 7 of another process
    assert memory.free_bytes() == (53 - 10) * GIB
    now[0] = 10.05
    assert memory.free_bytes() == (53 - 10 - 7) * GIB
    assert gpu.driver_reads == 2


@pytest.mark.parametrize("name", ["GPU-0a1b", "MIG-0a1b", "00000000:c1:00.0"])
def test_nvml_devices_are_matched_by_identity(gpu: FakeGpu, caplog: pytest.LogCaptureFixture, name: str):
    gpu.known_as = {name}
    assert cuda_headroom().free_bytes() == 53 * GIB
    assert not caplog.records


def without_library() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.mark.parametrize("missing", ["library", "device"])
def test_without_nvml_the_runtime_is_asked_and_that_is_said_once(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
):
    if missing == "library":
        monkeypatch.setattr(pynvml, "nvmlInit", without_library)
    else:
        gpu.known_as = set()
    with caplog.at_level(logging.WARNING):
        assert [cuda_headroom().free_bytes() for _ in range(3)] == [(50 + 5) * GIB] * 3
    assert ["NVML is not available" in record.message for record in caplog.records] == [True]


def test_nvml_that_fails_later_is_left_alone_from_then_on(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    now = [0.0]
    memory = cuda_headroom(now)
    assert memory.free_bytes() == 53 * GIB
    asked = []

    def lost(handle: str) -> None:
        asked.append(handle)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    for now[0] in (1.0, 2.0):
        assert memory.free_bytes() == 55 * GIB
    assert (len(asked), len(caplog.records)) == (1, 1)


def test_cuda_before_anything_was_allocated(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    assert cuda_headroom().free_bytes() == 48 * GIB


def test_headroom_for_picks_by_device(gpu: FakeGpu):
    assert isinstance(headroom_for(torch.device("cuda", 0)), CudaHeadroom)
    with pytest.raises(InputError, match=r"model\.device is 'meta'"):
        headroom_for(torch.device("meta"))


def test_the_fake_follows_what_others_take_and_what_is_held():
    held = [30]
    memory = FakeHeadroom(total_bytes=100, taken_bytes=20, held=lambda: held[0])
    assert memory.free_bytes() == 50
    memory.taken_bytes, held[0] = 60, 45
    assert memory.free_bytes() == -5


def test_the_reserve_is_a_share_of_the_total_and_a_deficit_is_kept():
    assert after_reserve(FakeHeadroom(1000, 600), 0.05) == 350
    assert after_reserve(FakeHeadroom(1000, 980), 0.05) == -30
