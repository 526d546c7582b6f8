"""Who may import whom: files and sub-packages of the product stand in levels, and import from lower ones alone."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: From the lowest level up. Names on one level do not import each other.
LEVELS = {
    "models": [
        "errors arrays cache_dir garbage",
        "device huge_pages",
        "kv_cache forward_batch csrc module",
        "loading sampling attention",
        "runners patches",
    ],
    "batcher": [
        "types suggestions",
        "estimators preemption admission_order shared_pages",
        "policies",
        "registry",
        "simulation",
    ],
    "rollout": [
        "errors logs closing arithmetic stats scores generation_defaults record_columns",
        "batch_layouts",
        "records sampling_params headroom engine_arguments argument_parser tokenization",
        "requests length_history config stop_conditions",
        "progress tracking",
        "data engine run_dir",
        "job verify report simulate integrations",
        "cli",
        "__main__ rescore score retry",
    ],
}
PLACES = {
    (package, name): level
    for package, levels in LEVELS.items()
    for level, names in enumerate(levels)
    for name in names.split()
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in LEVELS
    for path in (ROOT / package).rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Files of the product that a file imports, anywhere in it; named by where they lie."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    names = {
        name.removeprefix("rollout.") if name.startswith(("rollout.models", "rollout.batcher")) else name
        for name in found
    }
    # What a package's own file holds is a docstring: importing a file of it is no import of the package.
    return {name for name in names & FILES.keys() if FILES[name].name != "__init__.py"}


def test_imports_go_to_lower_levels() -> None:
    for name, path in FILES.items():
        for other in imports(path) if name != "rollout" else ():
            here, there = tuple(name.split(".")[:2]), tuple(other.split(".")[:2])
            if here != there:
                assert there[0] == here[0] or here[0] == "rollout", f"{name} imports {other}"
                assert there[0] != here[0] or PLACES[there] < PLACES[here], f"{name} imports {other}"


def test_the_page_has_the_same_levels() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for package, levels in LEVELS.items():
        (row,) = re.findall(rf"^\| `{package}` \| (.*) \|$", page, re.MULTILINE)
        assert [level.replace("`", "").split(", ") for level in row.split(" · ")] == [level.split() for level in levels]


def test_files_do_not_import_in_a_circle() -> None:
    TopologicalSorter({name: imports(path) - {name} for name, path in FILES.items()}).prepare()


def test_files_of_packages_are_docstrings() -> None:
    for path in {
        *ROOT.glob("models/**/__init__.py"),
        *ROOT.glob("batcher/**/__init__.py"),
        *ROOT.glob("rollout/*/__init__.py"),
    }:
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, path
