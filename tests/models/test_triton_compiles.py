"""Compile the Triton kernels for a GPU without having one: the compiler refuses code that the interpreter accepts.

One case per kernel, so that the suite stays fast; ``python -m jobs.gpu.resources`` compiles every cut. The assertions
are about speed: no spilled registers, 16-byte copies into shared memory that overlap with products, and two programs
per multiprocessor.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.gpu import resources
from rollout.models.attention import triton
from rollout.models.attention.triton import _TILE_SIZES, tile_sizes

pytestmark = pytest.mark.long

#: The beginning of a label for each kernel.
_REPRESENTATIVES = (
    "attend split bf16 128/128 group 6",
    "attend tiles bf16 128/128 group 6",
    "attend split fp32 128/128 group 4",
    "locate",
    "write bf16",
    "rotate and write bf16 32/8",
    "reduce",
    "top-p pass bf16",
    "top-p threshold bf16",
    "sum_blocks bf16 filtered",
    "draw bf16 filtered",
    "norm bf16 2048",
    "sum and norm bf16 2048",
    "gated silu bf16",
    "rotate bf16 12/2",
    "product bf16 forward, 64x32",
    "three products bf16",
)


def compiled(tmp_path: Path, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compile in one subprocess without the interpreter, so that Triton is imported once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "jobs.gpu.resources", "--json", *labels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def test_kernels_spill_nothing_and_attention_overlaps_its_loads(tmp_path: Path) -> None:
    found = {made["label"]: made for made in compiled(tmp_path, _REPRESENTATIVES)}
    assert not [label for label, made in found.items() if made["stack"]]
    assert all(made["programs"] >= 2 for made in found.values()), found
    for label, made in found.items():
        if label.startswith("attend"):
            assert made["wide_copies"], made
            assert made["waits"] > 0, made
            # Float32 is multiplied as it is, not in tensor cores.
            assert bool(made["products"]) == ("bf16" in label), made


def test_arguments_of_1_compile(tmp_path: Path) -> None:
    """Triton makes them constants, which gives other types inside."""
    labels = tuple(case.label for case in resources.with_arguments_of_1())
    assert [made["label"] for made in compiled(tmp_path, labels)] == list(labels)


def launched_kernels() -> set[str]:
    """Return the names of Triton functions that any module launches, ``NAME[grid](...)``."""
    defined, launched = set(), set()
    for path in Path(triton.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name, decorator_list=decorators):
                    defined |= {name} if any("triton.jit" in ast.unparse(each) for each in decorators) else set()
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name))):
                    launched.add(name)
    return defined & launched


def test_every_kernel_and_cut_has_a_case() -> None:
    """The table of resources, and what compute-sanitizer runs, would leave out a new kernel silently."""
    launched, cases = launched_kernels(), resources.cases()
    assert launched == {case.kernel for case in cases}
    assert {case.kernel for case in cases if case.label.startswith(_REPRESENTATIVES)} == launched
    cuts = {
        (case.constants["QUERIES"], case.constants["KEYS"], case.warps) for case in cases if case.kernel == "attend"
    }
    for itemsize, dim in _TILE_SIZES:
        for split in (True, False):
            sizes = tile_sizes(itemsize, dim, 4, split)
            assert (sizes.queries, sizes.keys, sizes.warps) in cuts
