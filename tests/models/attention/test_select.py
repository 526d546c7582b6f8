"""Which attention serves a pool."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.models.attention import select, triton
from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.kernel_test import HeadShape
from rollout.models.errors import UnsupportedAttention
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind

pytestmark = pytest.mark.usefixtures("device")


def clear_self_test_results() -> None:
    for found in (select._triton_works, select._triton_failure):
        found.cache_clear()


@pytest.fixture
def gpu_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pool as of a GPU, for what looks at its layout and device alone."""
    clear_self_test_results()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(triton, "TritonBackend", lambda pool, library: SimpleNamespace(name="triton"))
    layout = KVLayout((AttentionLayer(None, 1, 16, 16, MaskKind()),), torch.bfloat16, 16)
    yield SimpleNamespace(layout=layout, device=torch.device("cuda", 0), device_pools=(None,))
    clear_self_test_results()


def test_gpu_uses_triton_if_self_test_passes(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(triton, "check", lambda *about: checked.append(about))
    assert [select.fastest_backend(gpu_pool).name for _ in range(2)] == ["triton", "triton"]
    assert checked == [(frozenset({HeadShape(16, 16, kv_heads=1, group=1)}), torch.bfloat16, gpu_pool.device, 16)]


def test_gpu_gathers_and_warns_once_if_self_test_fails(
    gpu_pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*about: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton, "check", fails)
    with caplog.at_level(logging.WARNING):
        assert [select.fastest_backend(gpu_pool) for _ in range(2)] == [GatherAttention, GatherAttention]
    assert len(caplog.records) == 1
    assert "some GPU; pages are gathered instead" in caplog.text
    assert "RuntimeError: Failed to find C compiler." in caplog.text


def test_requested_triton_is_refused_rather_than_replaced(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*about: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton, "check", fails)
    with pytest.raises(UnsupportedAttention, match=r"attention=triton .*\(RuntimeError: Failed to find C compiler\): "):
        select.select_backend("triton", gpu_pool)
    monkeypatch.setattr(triton, "check", lambda *about: None)
    clear_self_test_results()
    assert select.select_backend("triton", gpu_pool).name == "triton"


def test_out_of_memory_in_self_test_is_raised(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*about: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(triton, "check", fails)
    with pytest.raises(torch.OutOfMemoryError):
        select.fastest_backend(gpu_pool)
