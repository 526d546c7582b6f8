"""Building libraries of C sources: once, side by side, and by one of several processes."""

from __future__ import annotations

import ctypes
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.models.csrc import build
from tests.support.compiler import needs_compiler

_PROCESS = """
import sys
from pathlib import Path
from rollout.models.csrc import build
print(build.try_build(Path(sys.argv[1]), lambda library: library.answer()))
"""


def answer(library: ctypes.CDLL) -> int:
    found: int = library.answer()
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    needs_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rollout" / "kernels"


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"answer_{number}.c" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text(f"int answer(void) {{ return {number}; }}\n")
    return files


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for each run of the compiler, which takes half a second."""
    log = tmp_path / "compiled"
    log.touch()
    script = (
        "import subprocess, sys, time\n"
        "command = sys.argv[2:]\n"
        "if '--version' not in command:\n"
        "    open(sys.argv[1], 'a').write(command[-2] + '\\n')\n"
        "    time.sleep(0.5)\n"
        "sys.exit(subprocess.run(command).returncode)\n"
    )
    monkeypatch.setenv("CC", shlex.join([sys.executable, "-c", script, str(log), *build.compiler()]))
    return log


def lines(log: Path) -> list[str]:
    return sorted(log.read_text().splitlines())


def test_begun_libraries_are_compiled_once(cache: Path, sources: list[Path], compiled: Path) -> None:
    build.begin(sources)
    build.begin(sources)
    assert [build.build(source, answer) for source in sources] == [0, 1, 2]
    assert lines(compiled) == [*map(str, sources)]
    build.begin(sources)
    assert not build._begun
    assert [build.build(source, answer) for source in sources] == [0, 1, 2]
    assert len(lines(compiled)) == 3
    assert len(list(cache.iterdir())) == 3


def test_begun_libraries_serve_this_process_where_the_cache_cannot_be_written(
    cache: Path, sources: list[Path], compiled: Path
) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    build.begin(sources)
    assert [build.build(source, answer) for source in sources] == [0, 1, 2]
    assert lines(compiled) == [*map(str, sources)]


def test_a_begun_source_that_does_not_compile_is_warned_about_where_it_is_loaded(
    cache: Path, sources: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    sources[1].write_text("int answer(void) { return no_such_name; }\n")
    with caplog.at_level(logging.WARNING):
        build.begin(sources)
        assert [build.build(sources[number], answer) for number in (0, 2)] == [0, 2]
        assert not caplog.records
        assert build.try_build(sources[1], answer) is None
    assert len(caplog.records) == 1
    assert "Could not compile answer_1.c" in caplog.text
    assert "no_such_name" in caplog.text


def test_nothing_begins_without_a_compiler(
    cache: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    build.begin(sources)
    assert not build._begun
    assert not cache.exists()


def test_one_of_several_processes_compiles(cache: Path, sources: list[Path], compiled: Path) -> None:
    command = [sys.executable, "-c", _PROCESS, str(sources[1])]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["1\n"] * 3
    assert lines(compiled) == [str(sources[1])]
    assert len(list(cache.iterdir())) == 1
