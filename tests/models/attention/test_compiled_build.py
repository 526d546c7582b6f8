"""The source of the compiled kernel: building, caching and checking it."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rollout.models.attention import compiled
from rollout.models.attention.compiled_library import Kernel
from rollout.models.csrc import build, threads
from tests.support.compiler import needs_compiler


def test_source_compiles_without_warnings(tmp_path: Path) -> None:
    needs_compiler()
    warnings = [*build.FLAGS, "-Wall", "-Wextra", "-Werror", "-O1", "-o", str(tmp_path / "out.so")]
    subprocess.run([*build.compiler(), *warnings, str(compiled.SOURCE), "-lm"], check=True)
    native = "-mcpu=native" if os.uname().machine == "aarch64" else "-march=native"
    for command in ("gcc", "clang"):
        if shutil.which(command):
            also = [native, "-fsyntax-only", "-Wno-unused-command-line-argument"]
            subprocess.run([command, *warnings, *also, str(compiled.SOURCE)], check=True)


def test_exponential_and_tanh_are_accurate(tmp_path: Path) -> None:
    needs_compiler()
    (tmp_path / "probe.c").write_text(
        f'#include "{compiled.SOURCE}"\n'
        "void run(int which, int64_t n, const float *in, float *out) {\n"
        "    for (int64_t i = 0; i < n; i += W)\n"
        "        store(out + i, which ? hyperbolic_tangent(load(in + i)) : exponential(load(in + i)));\n"
        "}\n"
    )
    flags = [flag for flag in build.FLAGS if flag != "-O3"]
    command = [*build.compiler(), *flags, "-O1", "-march=native"]
    if subprocess.run([*command, "-o", tmp_path / "probe.so", tmp_path / "probe.c", "-lm"], check=False).returncode:
        subprocess.run([*command[:-1], "-o", tmp_path / "probe.so", tmp_path / "probe.c", "-lm"], check=True)
    run = ctypes.CDLL(str(tmp_path / "probe.so")).run
    run.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]

    def applied(
        which: int, x: np.ndarray[tuple[int], np.dtype[np.float32]]
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
        padded[: len(x)] = x
        out = np.empty_like(padded)
        run(which, len(padded), padded.ctypes.data, out.ctypes.data)
        return out[: len(x)]

    x = -np.concatenate([np.linspace(0, 87.3, 400_000), np.logspace(-40, 0, 10_000)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(applied(0, x) - exact) / np.spacing(exact.astype(np.float32))).max() < 1.5
    special = np.array([0, -87.4, -1000, -np.inf, np.nan, np.inf], np.float32)
    assert np.array_equal(applied(0, special)[:5], np.array([1, 0, 0, 0, np.nan], np.float32), equal_nan=True)

    x = np.concatenate([np.linspace(-12, 12, 400_000), np.logspace(-30, 0, 10_000)]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(applied(1, x) - exact) / np.spacing(np.abs(exact.astype(np.float32)))).max() < 3
    special = np.array([0, -np.inf, np.inf, np.nan, 100], np.float32)
    assert np.array_equal(applied(1, special), np.array([0, -1, 1, np.nan, 1], np.float32), equal_nan=True)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a loader that has not been called."""
    needs_compiler()
    threads.entry_points()  # built before, since these tests count files
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The least that can be built: these tests are about files.
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
    compiled.kernel.cache_clear()
    yield tmp_path / "cache" / "rollout" / "kernels"
    compiled.kernel.cache_clear()


def assert_unavailable_with_one_warning(caplog: pytest.LogCaptureFixture, why: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert compiled.kernel() is None
        assert compiled.kernel() is None
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_built_library_is_cached_per_cpu(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = empty_cache / "paged-attention-0123456789abcdef01234567.so"
    empty_cache.mkdir(parents=True)
    stale.write_text("another machine's")
    assert compiled.kernel() is not None
    assert compiled.kernel() is compiled.kernel()
    (made,) = set(empty_cache.iterdir()) - {stale}
    assert stale.read_text() == "another machine's"
    before = made.stat().st_mtime_ns
    compiled.load()
    assert made.stat().st_mtime_ns == before
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    compiled.load()
    assert len(list(empty_cache.iterdir())) == 3


def test_broken_cached_library_is_rebuilt(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled.load()
    (made,) = empty_cache.iterdir()
    # In another place: a process does not load a file again that it has loaded.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    broken = tmp_path / "other" / "rollout" / "kernels" / made.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    compiled.load()
    assert broken.stat().st_size == made.stat().st_size
    assert list(broken.parent.iterdir()) == [broken]


def test_concurrent_builds_leave_one_library(empty_cache: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(lambda _: isinstance(compiled.load(), Kernel), range(4)))
    assert len(list(empty_cache.iterdir())) == 1


def test_missing_compiler_is_warned_about_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_unavailable_with_one_warning(caplog, "no C compiler was found")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("rollout-no-such-compiler", "does not run"),
        ("false", "failed"),
        ("'unbalanced", "not a command"),
        (shlex.join([sys.executable, "-c", "print('a compiler that makes nothing')"]), "cannot be loaded"),
    ],
)
def test_failing_compiler_is_warned_about_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, why: str
) -> None:
    monkeypatch.setenv("CC", command)
    assert_unavailable_with_one_warning(caplog, why)
    assert not [file for file in empty_cache.parent.rglob("*") if file.is_file()]


def test_source_that_does_not_compile_is_warned_about(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "SOURCE", tmp_path / "broken.c")
    (tmp_path / "broken.c").write_text("int broken(void) { return no_such_name; }")
    assert_unavailable_with_one_warning(caplog, "no_such_name")


def test_kernel_that_fails_its_self_test_is_not_used(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for file in (compiled.SOURCE, *compiled.SOURCE.parent.glob("*.h")):
        shutil.copy(file, tmp_path)
    header = tmp_path / "attention_call.h"
    mutated = header.read_text().replace(
        "return position / layer->mask_size * layer->mask_size;\n    return 0;", "return position;\n    return 1;"
    )
    assert mutated != header.read_text()
    header.write_text(mutated)
    monkeypatch.setattr(compiled, "SOURCE", tmp_path / compiled.SOURCE.name)
    assert_unavailable_with_one_warning(caplog, "differs from reference attention by")
    assert not [file for file in empty_cache.parent.rglob("*") if file.is_file()]


def test_unwritable_cache_builds_for_this_process_only(empty_cache: Path) -> None:
    empty_cache.parent.parent.mkdir(parents=True)
    empty_cache.parent.write_text("a file where the folder should be")
    assert compiled.kernel() is not None
    assert empty_cache.parent.is_file()
