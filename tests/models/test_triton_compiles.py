"""Compile the Triton kernels for a GPU without having one: the compiler refuses code that the interpreter accepts.

Triton includes the assembler, so subprocesses without the interpreter compile binaries for compute capability 9.0.
The assertions are about speed: 16-byte loads into shared memory, no spilled registers where one query attends, and
shared memory for two programs per multiprocessor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.models.attention.triton import _TILE_SIZES, tile_sizes
from rollout.models.sampling import gumbel_triton, top_p_triton

pytestmark = pytest.mark.long

_SHARED_BYTES = 227 << 10

_COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rollout.models.attention import triton_kernels
from rollout.models.patches import pointwise_triton
from rollout.models.sampling import gumbel_triton, top_p_triton

def compiled(name, types, constants, unaligned, warps):
    modules = gumbel_triton, triton_kernels, pointwise_triton, top_p_triton
    kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
    aligned = [a for a, t in types.items() if t != "fp32" and a not in unaligned]
    source = ASTSource(
        kernel,
        {a: types.get(a, "constexpr") for a in kernel.arg_names},
        {(kernel.arg_names.index(a),): value for a, value in constants.items()},
        {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    return {
        "shared": made.metadata.shared,
        "wide": len(re.findall(r"cp\\.async\\.cg\\.shared\\.global[^;]*, 0x10", ptx)),
        "products": sorted(set(re.findall(r"wgmma\\.mma_async|mma\\.sync", ptx))),
        "stack": stack(made.asm["cubin"]),
    }

def stack(binary):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\\d+)", said).group(1))

print(json.dumps([compiled(*case) for case in json.load(sys.stdin)]))
"""


def compiled(tmp_path: Path, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], input=json.dumps(cases), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def attend(dtype: str, dims: tuple[int, int], group: int, split: bool, **changes: Any) -> tuple[Any, ...]:
    """Arguments as `TritonAttention` passes them."""
    itemsize = {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]
    cut = tile_sizes(itemsize, max(dims), group, split)
    types = dict.fromkeys(("query", "out", "sinks"), f"*{dtype}")
    types |= {"items": "*i32", "count": "*i32", "slab_addresses": "*i64", "first_tokens": "*i32"}
    types |= dict.fromkeys(("keys_at", "values_at", "query_token", "query_head", "mask_size"), "i32")
    types |= {"scale": "fp32", "softcap": "fp32"}
    constants = {"SPLIT": split, "MASK": "full", "SOFTCAP": False, "SINKS": False, "PAGE_SIZE": 16, "KV_HEADS": 4}
    constants |= {"GROUP": group, "KEY_DIM": dims[0], "VALUE_DIM": dims[1]}
    constants |= {"BLOCK_KEY": max(16, power(dims[0])), "BLOCK_VALUE": max(16, power(dims[1]))}
    constants |= {"QUERIES": cut.queries, "KEYS": cut.keys, "STAGES": cut.stages}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else None} | changes
    if split:
        types |= {"out": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
    else:
        constants |= {"maxima": None, "sums": None}
    if not constants["SINKS"]:
        constants["sinks"] = types.pop("sinks") and None
    return "attend", types, constants, ("mask_size",), cut.warps


def test_attention_of_every_cut(tmp_path: Path) -> None:
    """All cases share one subprocess, so that Triton is imported once."""
    kinds = [({2: "bf16", 4: "fp32"}[itemsize], dim, split) for itemsize, dim in _TILE_SIZES for split in (True, False)]
    cases = [attend(dtype, (dim, dim), 4, split) for dtype, dim, split in kinds]
    for kind, made in zip(kinds, compiled(tmp_path, cases), strict=True):
        dtype, _, split = kind
        assert made["shared"] <= _SHARED_BYTES // 2, (kind, made)
        assert made["wide"] > 0, (kind, made)
        # Float32 is multiplied as it is, not in tensor cores.
        assert bool(made["products"]) == (dtype == "bf16"), (kind, made)
        if split:
            assert made["stack"] <= 16, (kind, made)  # bytes, where spilled registers go


def test_kernels_compile(tmp_path: Path) -> None:
    """All cases share one subprocess here too."""
    cases = [*shapes_of_models(), *arguments_of_1()]
    for case, made in zip(cases, compiled(tmp_path, cases), strict=True):
        assert made["shared"] <= _SHARED_BYTES, (case[:3], made)


def shapes_of_models() -> list[tuple[Any, ...]]:
    full = {"SOFTCAP": True, "SINKS": True}
    cases = [
        attend("bf16", (128, 128), 7, False, MASK="window", **full),
        attend("fp16", (64, 64), 8, False, MASK="chunk", **full),
        attend("bf16", (192, 128), 1, True, **full),
        attend("bf16", (192, 128), 1, False),
        attend("bf16", (80, 80), 1, True),
        attend("fp32", (13, 24), 5, False, MASK="window", **full),
        attend("bf16", (256, 256), 33, True),
    ]
    key = {"key": "*bf16", "value": "*bf16", "out": "*bf16", "slots": "*i32", "slabs": "*i64"}
    key |= dict.fromkeys(("keys_at", "values_at", "slab_tokens"), "i32")
    key |= dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
    sizes = {"KV_HEADS": 2, "HEADS": 12, "KEY_DIM": 128, "VALUE_DIM": 128}
    cases.append(("write", key, sizes | {"BLOCK_HEADS": 2, "BLOCK_KEY": 128, "BLOCK_VALUE": 128}, (), 4))
    tables = {"pages": "*i32", "slabs": "*i64", "slab_addresses": "*i64", "first_tokens": "*i32", "count": "*i32"}
    cases.append(("locate", tables | {"slab_pages": "i32"}, {"PAGE_SIZE": 16, "BLOCK": 256}, ("slab_pages",), 4))
    parts = dict.fromkeys(("partial", "maxima", "sums"), "*fp32") | {"sinks": "*bf16", "out": "*bf16", "rows": "*i32"}
    sizes = {"SINKS": True, "KV_HEADS": 2, "GROUP": 6, "VALUE_DIM": 128, "BLOCK_GROUP": 8, "BLOCK_VALUE": 128}
    cases.append(("reduce", parts, sizes, (), 4))
    cases += [top_p_masses(dtype, bits) for dtype, bits in (("bf16", 16), ("fp16", 16), ("fp32", 32))]
    for dtype in ("bf16", "fp16", "fp32"):
        rows = {"logits": f"*{dtype}", "temperatures": "*fp32", "sums": "*fp32", "maxima": "*fp32"}
        sizes = dict.fromkeys(("logits_row", "vocabulary", "blocks"), "i32")
        block = {"BLOCK": gumbel_triton.BLOCK}
        sum_blocks = block | {"BLOCKS": gumbel_triton.BLOCKS}
        cases.append(("sum_blocks", rows | sizes, sum_blocks | {"thresholds": None}, ("blocks",), 4))
        rows["thresholds"] = "*fp32"
        cases.append(("sum_blocks", rows | sizes, sum_blocks, ("blocks",), 4))
        rows |= dict.fromkeys(("keys", "samples", "positions", "tokens"), "*i64")
        rows |= {"logprobs": "*fp32", "totals": "*fp64"}
        cases.append(("draw", rows | sizes, block | {"ALL_BLOCKS": 1024}, ("blocks",), 4))
    for dtype in ("bf16", "fp32"):
        rows = dict.fromkeys(("x", "factors", "out"), f"*{dtype}") | {"x_row": "i32", "width": "i32"}
        rows |= {"eps": "fp32", "plus": "fp32"}
        cases += [("norm", rows, {"LATE": late, "BLOCK": 2048}, (), 4) for late in (False, True)]
        heads = dict.fromkeys(("query", "key", "query_out", "key_out", "cosines", "sines"), f"*{dtype}")
        heads |= dict.fromkeys(("query_token", "query_head", "key_token", "key_head"), "i32")
        sizes = {"HEADS": 12, "KEY_HEADS": 2, "HALF": 64, "BLOCK_HEADS": 16, "BLOCK_HALF": 64}
        cases.append(("rotate", heads, sizes, (), 4))
    return cases


def top_p_masses(dtype: str, bits: int) -> tuple[Any, ...]:
    types = dict.fromkeys(("temperatures", "floors", "top_p", "masses"), "*fp32")
    types |= dict.fromkeys(("logits", "largest"), f"*{dtype}")
    types |= dict.fromkeys(("logits_row", "vocabulary", "done", "parts", "passes"), "i32")
    constants = {"BITS": bits, "PART_BLOCKS": top_p_triton.PART_BLOCKS, "BLOCK": top_p_triton.BLOCK, "ALL_PARTS": 16}
    return "sum_masses", types, constants, ("done", "parts", "passes"), top_p_triton._WARPS


def arguments_of_1() -> list[tuple[Any, ...]]:
    """Triton specializes an argument of 1 to a constant, which gives another kernel with other types inside."""
    narrow = attend("fp32", (1, 1), 2, True, MASK="window", KV_HEADS=1)
    key = {"key": "*fp32", "value": "*fp32", "out": "*fp32", "slots": "*i32", "slabs": "*i64"}
    key |= dict.fromkeys(("keys_at", "values_at", "slab_tokens", "key_token", "key_head"), "i32")
    key |= {"value_token": "i32", "value_head": "i32"}
    sizes = {
        "KV_HEADS": 1,
        "HEADS": 2,
        "KEY_DIM": 1,
        "VALUE_DIM": 1,
        "BLOCK_HEADS": 1,
        "BLOCK_KEY": 1,
        "BLOCK_VALUE": 1,
    }
    rows = dict.fromkeys(("x", "factors", "out"), "*fp32") | {"x_row": "i32", "width": "i32", "eps": "fp32"}
    logits = dict.fromkeys(("logits", "temperatures", "thresholds", "sums", "maxima"), "*fp32")
    logits |= dict.fromkeys(("logits_row", "vocabulary", "blocks"), "i32")
    draws = dict.fromkeys(("keys", "samples", "positions", "tokens"), "*i64") | {"logprobs": "*fp32", "totals": "*fp64"}
    block = {"BLOCK": gumbel_triton.BLOCK}
    vocabularies = (("blocks",), ("logits_row", "vocabulary", "blocks"))
    return [
        with_ones(narrow, "query_head", "mask_size"),
        with_ones(("write", key, sizes, (), 4), "key_token", "key_head", "value_token", "value_head"),
        with_ones(top_p_masses("fp32", 32), "logits_row", "vocabulary"),
        with_ones(("norm", rows | {"plus": "fp32"}, {"LATE": False, "BLOCK": 1}, (), 4), "x_row", "width"),
        *(with_ones(("sum_blocks", logits, block | {"BLOCKS": 8}, (), 4), *ones) for ones in vocabularies),
        *(with_ones(("draw", logits | draws, block | {"ALL_BLOCKS": 1}, (), 4), *ones) for ones in vocabularies),
    ]


def with_ones(case: tuple[Any, ...], *names: str) -> tuple[Any, ...]:
    name, types, constants, unaligned, warps = case
    others = {argument: kind for argument, kind in types.items() if argument not in names}
    return name, others, constants | dict.fromkeys(names, 1), tuple(a for a in unaligned if a not in names), warps
