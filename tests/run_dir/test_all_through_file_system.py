"""What a run writes, claims and commits is changed through a `FileSystem`, or no test could let it fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rollout.job
import rollout.run_dir

FOLDERS = [Path(package.__path__[0]) for package in (rollout.run_dir, rollout.job)]
OTHERS = {"file_system.py", "metrics.py"}
"""The file system itself; and metrics, which no result depends on."""
FUNCTIONS = {
    "os": {
        *("open", "fdopen", "link", "symlink", "rename", "replace", "remove", "unlink", "mkdir", "makedirs", "rmdir"),
        *("truncate", "fsync"),
    },
    "shutil": {"rmtree", "move", "copy", "copyfile", "copy2"},
    "tempfile": {"TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp"},
}
METHODS = {"write_text", "write_bytes", "touch", "unlink", "mkdir", "rmdir", "hardlink_to", "symlink_to"}
"""Those of `Path` that no other class here has."""


def changing_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield calls that change files without a `FileSystem`, and their lines."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open":
            modes = [ast.unparse(value) for value in (*node.args[1:2], *(word.value for word in node.keywords))]
            if any(set("wax+") & set(mode.strip("'")) for mode in modes if "utf" not in mode):
                yield "open", node.lineno
        elif isinstance(called, ast.Attribute):
            module = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in FUNCTIONS.get(module, ()) or called.attr in METHODS:
                yield f"{module}.{called.attr}", node.lineno


def test_files_are_changed_through_the_file_system() -> None:
    found = [
        f"{path.parent.name}/{path.name}:{line} {name}"
        for folder in FOLDERS
        for path in folder.glob("*.py")
        if path.name not in OTHERS
        for name, line in changing_calls(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_calls_that_change_files_are_found() -> None:
    calls = ["open(p, 'xb')", "open(p, mode='a')", "os.rename(a, b)", "shutil.rmtree(a)", "p.write_text('x')"]
    assert [name for name, _ in changing_calls(ast.parse("\n".join(calls)))] == [
        *("open", "open", "os.rename", "shutil.rmtree", "p.write_text")
    ]
    assert not list(changing_calls(ast.parse("open(p)\nopen(p, 'rb')\nopen(p, encoding='utf-8')\nfiles.rename(a, b)")))
