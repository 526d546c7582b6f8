"""Compile every Triton kernel for compute capability 9.0 and print what it takes of a multiprocessor.

python -m jobs.gpu.resources [--json] [LABEL ...]

Needs no GPU: Triton includes the assembler, ptxas. The table says how many programs of a kernel a multiprocessor holds
at once, by registers, shared memory and warps. It ends with status 1 if a kernel spills registers to memory. Labels
choose kernels by the beginning of their names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rollout.models.arrays import next_power_of_2
from rollout.models.attention import triton_kernels
from rollout.models.attention.triton import _LOCATE_BLOCK, _TILE_SIZES, tile_sizes
from rollout.models.patches import pointwise_triton, products_triton
from rollout.models.sampling import gumbel_triton, top_p_triton
from rollout.models.sampling.base import BLOCK

KERNEL_MODULES = (triton_kernels, pointwise_triton, products_triton, gumbel_triton, top_p_triton)
#: Of a multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications).
_REGISTERS, _SHARED_BYTES, _WARPS, _PROGRAMS = 65536, 228 << 10, 64, 32
_RESERVED_SHARED_BYTES = 1 << 10
"""What the driver takes of each program's shared memory."""
_HEAD = (
    *("kernel", "registers", "stack", "shared", "warps", "programs per multiprocessor"),
    *("tensor cores", "buffers", "copies under way"),
)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with the arguments of one launch."""

    label: str
    kernel: str
    types: dict[str, str]
    """Of the arguments that are not constants, as Triton spells them."""
    constants: dict[str, Any]
    unaligned: tuple[str, ...] = ()
    """Arguments that are no multiple of 16; all others are."""
    warps: int = 4
    fusion: bool = True
    """Whether a product and a sum may round once."""

    def with_ones(self, *names: str) -> Case:
        """Return the case in which these arguments are 1, which Triton compiles as constants."""
        return replace(
            self,
            label=f"{self.label}, {' '.join(names)} 1",
            types={name: kind for name, kind in self.types.items() if name not in names},
            constants=self.constants | dict.fromkeys(names, 1),
            unaligned=tuple(name for name in self.unaligned if name not in names),
        )


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes."""

    label: str
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread, where spilled registers go."""
    shared: int
    """Bytes of a program."""
    warps: int
    programs: int = field(default=0)
    """That a multiprocessor holds at once."""
    wide_copies: int = 0
    """Instructions that copy 16 bytes from global to shared memory."""
    products: tuple[str, ...] = ()
    """Instructions of tensor cores."""
    buffers: tuple[str, ...] = ()
    """Shapes of the buffers of pipelined loads, first how many there are of each."""
    waits: int = 0
    """Copies that may still be under way when a tile is multiplied; 0 means that loads and products take turns."""


def measure(case: Case) -> Resources:
    """Compile a kernel; raises what the compiler raises."""
    kernel: Any = next(getattr(module, case.kernel) for module in KERNEL_MODULES if hasattr(module, case.kernel))
    names = kernel.arg_names
    aligned = [name for name, kind in case.types.items() if kind != "fp32" and name not in case.unaligned]
    source = ASTSource(
        kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.warps, "enable_fp_fusion": case.fusion}
    made: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    threads = 32 * case.warps
    held = (
        _REGISTERS // (threads * (registers + 7 & ~7)),
        _SHARED_BYTES // (made.metadata.shared + _RESERVED_SHARED_BYTES),
        _WARPS // case.warps,
        _PROGRAMS,
    )
    return Resources(
        label=case.label,
        registers=registers,
        stack=stack,
        shared=made.metadata.shared,
        warps=case.warps,
        programs=min(held),
        wide_copies=len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", made.asm["ptx"])),
        products=tuple(sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", made.asm["ptx"])))),
        buffers=tuple(sorted(set(re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\w+),", made.asm["ttgir"])))),
        waits=max(map(int, re.findall(r"async_wait[^\n]*num = (\d+)", made.asm["ttgir"])), default=0),
    )


def _usage(binary: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a binary's kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return int(found.group(1)), int(found.group(2))


# -- cases -------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """Return every kernel, with the arguments of usual models."""
    found = [
        attend({2: "bf16", 4: "fp32"}[itemsize], (dim, dim), 4, split=split)
        for itemsize, dim in _TILE_SIZES
        for split in (True, False)
    ]
    found += [attend("bf16", dims, group, split=split) for dims, group in _SHAPES for split in (True, False)]
    variant = {"SOFTCAP": True, "SINKS": True}
    found += [
        attend("bf16", (128, 128), 8, split=False, MASK="window", **variant),
        attend("fp16", (64, 64), 8, split=False, MASK="chunk", **variant),
        attend("bf16", (192, 128), 1, split=True, **variant),
        attend("fp32", (13, 24), 5, split=False, MASK="window", **variant),
    ]
    found += [locate(), write("bf16"), write("fp32"), reduce()]
    found += [rotate_and_write("bf16", (12, 2)), rotate_and_write("bf16", (32, 8)), rotate_and_write("fp32", (32, 8))]
    for dtype in ("bf16", "fp16", "fp32"):
        found += [top_p_masses(dtype), top_p_find(dtype)]
        found += [sum_blocks(dtype, filtered=filtered) for filtered in (False, True)]
        found += [draw(dtype, filtered=filtered) for filtered in (False, True)]
    for dtype in ("bf16", "fp32"):
        found += [norm(dtype, width, late=late) for width in (2048, 4096) for late in (False, True)]
        found += [add_norm(dtype, 2048), add_norm(dtype, 4096), gated_silu(dtype)]
        found += [rotate(dtype, heads, kv_heads) for heads, kv_heads in ((12, 2), (32, 8))]
    found += [multiply("bf16", 1536), multiply("bf16", 8960), multiply("fp32", 1536)]
    found += [multiply_group("bf16"), multiply_group("fp32")]
    found += [multiply("bf16", 8960, f"{kind} gradient") for kind in ("input", "weight")]
    return found


#: Head dims and query heads per key head: Qwen2.5-1.5B, Llama 3.1 8B, Phi-3, DeepSeek-V2, Phi-2 and Falcon-7B.
_SHAPES = (((128, 128), 6), ((96, 96), 1), ((192, 128), 16), ((80, 80), 1), ((64, 64), 71))


def attend(dtype: str, dims: tuple[int, int], group: int, *, split: bool, **changes: Any) -> Case:
    """Return a cut of attention, with arguments as `TritonAttention` passes them."""
    itemsize = {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]
    sizes = tile_sizes(itemsize, max(dims), group, split)
    types = dict.fromkeys(("query", "out", "sinks"), f"*{dtype}")
    types |= {"items": "*i32", "count": "*i32", "slab_addresses": "*i64", "first_tokens": "*i32"}
    types |= dict.fromkeys(("keys_at", "values_at", "query_token", "query_head", "mask_size"), "i32")
    types |= {"scale": "fp32", "softcap": "fp32"}
    constants = {"SPLIT": split, "MASK": "full", "SOFTCAP": False, "SINKS": False, "PAGE_SIZE": 16, "KV_HEADS": 4}
    constants |= {"GROUP": group, "KEY_DIM": dims[0], "VALUE_DIM": dims[1]}
    constants |= {"BLOCK_KEY": max(16, next_power_of_2(dims[0])), "BLOCK_VALUE": max(16, next_power_of_2(dims[1]))}
    constants |= {"QUERIES": sizes.queries, "KEYS": sizes.keys, "STAGES": sizes.stages}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else None} | changes
    if split:
        types |= {"out": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
    else:
        constants |= {"maxima": None, "sums": None}
    if not constants["SINKS"]:
        constants["sinks"] = types.pop("sinks") and None
    cut = f"{sizes.queries}x{sizes.keys} w{sizes.warps} s{sizes.stages}"
    variant = "".join(f" {name.lower()}" for name in ("SOFTCAP", "SINKS") if constants[name])
    mask = "" if constants["MASK"] == "full" else f" {constants['MASK']}"
    label = f"attend {'split' if split else 'tiles'} {dtype} {dims[0]}/{dims[1]} group {group}{mask}{variant}, {cut}"
    return Case(label, "attend", types, constants, ("mask_size",), sizes.warps)


def locate() -> Case:
    """Return the kernel that looks up pages."""
    types = {"pages": "*i32", "slabs": "*i64", "slab_addresses": "*i64", "first_tokens": "*i32", "count": "*i32"}
    constants = {"PAGE_SIZE": 16, "BLOCK": _LOCATE_BLOCK}
    return Case("locate", "locate", types | {"slab_pages": "i32"}, constants, ("slab_pages",))


def write(dtype: str, heads: tuple[int, int] = (12, 2), dim: int = 128) -> Case:
    """Return the kernel that writes new keys and values."""
    types = dict.fromkeys(("key", "value", "out"), f"*{dtype}") | {"slots": "*i32", "slabs": "*i64"}
    types |= dict.fromkeys(("keys_at", "values_at", "slab_tokens"), "i32")
    types |= dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
    constants = {"KV_HEADS": heads[1], "HEADS": heads[0], "KEY_DIM": dim, "VALUE_DIM": dim}
    constants |= {"BLOCK_HEADS": heads[1], "BLOCK_KEY": dim, "BLOCK_VALUE": dim}
    return Case(f"write {dtype} {heads[0]}/{heads[1]} x {dim}", "write", types, constants)


def rotate_and_write(dtype: str, heads: tuple[int, int], dim: int = 128) -> Case:
    """Return the kernel that rotates a token's heads and writes its keys and values."""
    names = ("query", "key", "value", "cosines", "sines", "rotated", "out")
    types = dict.fromkeys(names, f"*{dtype}") | {"slots": "*i32", "slabs": "*i64"}
    types |= dict.fromkeys(("keys_at", "values_at", "slab_tokens", "query_token", "query_head"), "i32")
    types |= dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
    constants = {"KV_HEADS": heads[1], "HEADS": heads[0], "HALF": dim // 2, "VALUE_DIM": dim}
    constants |= {"BLOCK_KV_HEADS": next_power_of_2(heads[1]), "BLOCK_HEADS": next_power_of_2(heads[0])}
    constants |= {"BLOCK_HALF": next_power_of_2(dim // 2), "BLOCK_VALUE": next_power_of_2(dim)}
    label = f"rotate and write {dtype} {heads[0]}/{heads[1]} x {dim}"
    return Case(label, "rotate_and_write", types, constants, fusion=False)


def reduce() -> Case:
    """Return the kernel that adds up the splits of a row."""
    types = dict.fromkeys(("partial", "maxima", "sums"), "*fp32") | {"sinks": "*bf16", "out": "*bf16", "rows": "*i32"}
    constants = {"SINKS": True, "KV_HEADS": 2, "GROUP": 6, "VALUE_DIM": 128, "BLOCK_GROUP": 8, "BLOCK_VALUE": 128}
    return Case("reduce bf16 12/2 x 128", "reduce", types, constants)


def top_p_masses(dtype: str) -> Case:
    """Return a pass of top-p."""
    types = dict.fromkeys(("temperatures", "floors", "top_p", "masses"), "*fp32")
    types |= dict.fromkeys(("logits", "largest"), f"*{dtype}")
    types |= dict.fromkeys(("logits_row", "vocabulary", "done", "parts", "passes"), "i32")
    constants = {"BITS": 32 if dtype == "fp32" else 16, "ALL_PARTS": 16}
    constants |= {"PART_BLOCKS": top_p_triton.PART_BLOCKS, "BLOCK": top_p_triton.BLOCK}
    unaligned = ("done", "parts", "passes")
    return Case(f"top-p pass {dtype}", "sum_masses", types, constants, unaligned, top_p_triton._WARPS)


def top_p_find(dtype: str) -> Case:
    """Return the end of top-p."""
    types = dict.fromkeys(("temperatures", "top_p", "masses", "out"), "*fp32") | dict.fromkeys(
        ("parts", "passes"), "i32"
    )
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    order = top_p_triton.ORDERS[torch_dtype]
    constants = {
        "logit_dtype": top_p_triton.LOGIT_DTYPES[torch_dtype],
        "BITS": order.bits,
        "MINUS_INFINITY": order.minus_infinity,
        "ALL_PARTS": 16,
    }
    return Case(f"top-p threshold {dtype}", "find", types, constants, ("parts", "passes"), 1)


def sum_blocks(dtype: str, *, filtered: bool) -> Case:
    """Return the first kernel of a draw."""
    types = {"logits": f"*{dtype}"} | dict.fromkeys(("temperatures", "sums", "maxima"), "*fp32")
    types |= dict.fromkeys(("logits_row", "vocabulary", "blocks"), "i32")
    constants: dict[str, Any] = {"BLOCK": BLOCK, "BLOCKS": gumbel_triton.BLOCKS}
    return _thresholds(Case(f"sum_blocks {dtype}", "sum_blocks", types, constants, ("blocks",)), filtered)


def draw(dtype: str, *, filtered: bool) -> Case:
    """Return the second kernel of a draw."""
    types = {"logits": f"*{dtype}", "totals": "*fp64"}
    types |= dict.fromkeys(("temperatures", "sums", "maxima", "logprobs"), "*fp32")
    types |= dict.fromkeys(("keys", "samples", "positions", "tokens"), "*i64")
    types |= dict.fromkeys(("logits_row", "vocabulary", "blocks"), "i32")
    constants: dict[str, Any] = {"BLOCK": BLOCK, "ALL_BLOCKS": 1024}
    return _thresholds(Case(f"draw {dtype}", "draw", types, constants, ("blocks",)), filtered)


def _thresholds(case: Case, filtered: bool) -> Case:
    if not filtered:
        return replace(case, constants=case.constants | {"thresholds": None})
    return replace(case, label=f"{case.label} filtered", types=case.types | {"thresholds": "*fp32"})


def norm(dtype: str, width: int, *, late: bool) -> Case:
    """Return a norm."""
    types = dict.fromkeys(("x", "factors", "out"), f"*{dtype}") | {"x_row": "i32", "width": "i32"}
    types |= {"eps": "fp32", "plus": "fp32"}
    label = f"norm {dtype} {width}{' late' if late else ''}"
    return Case(label, "norm", types, {"LATE": late, "BLOCK": width}, (), 4 if width <= 4096 else 8)


def add_norm(dtype: str, width: int) -> Case:
    """Return a sum and its norm."""
    types = dict.fromkeys(("x", "y", "factors", "total", "out"), f"*{dtype}") | {"width": "i32"}
    types |= {"eps": "fp32", "plus": "fp32"}
    return Case(f"sum and norm {dtype} {width}", "add_norm", types, {"LATE": False, "BLOCK": width})


def gated_silu(dtype: str) -> Case:
    """Return an activation and its product."""
    types = dict.fromkeys(("gate", "up", "out"), f"*{dtype}") | {"count": "i32"}
    return Case(f"gated silu {dtype}", "gated_silu", types, {"BLOCK": pointwise_triton._SILU_BLOCK})


def rotate(dtype: str, heads: int, kv_heads: int) -> Case:
    """Return the rotary embedding of a token."""
    types = dict.fromkeys(("query", "key", "query_out", "key_out", "cosines", "sines"), f"*{dtype}")
    types |= dict.fromkeys(("query_token", "query_head", "key_token", "key_head"), "i32")
    constants = {"HEADS": heads, "KEY_HEADS": kv_heads, "HALF": 64}
    constants |= {"BLOCK_HEADS": next_power_of_2(heads), "BLOCK_HALF": 64}
    return Case(f"rotate {dtype} {heads}/{kv_heads} x 128", "rotate", types, constants, fusion=False)


def multiply(dtype: str, columns: int, kind: str = "forward") -> Case:
    """Return a batch-invariant product: a layer's forward, or the gradient of its input or of its weight."""
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    tile = products_triton.tile_of(columns, torch_dtype)
    types = dict.fromkeys(("left", "right", "bias", "out"), f"*{dtype}")
    types |= dict.fromkeys(("rows", "columns", "inner", "left_row", "left_inner", "right_inner", "right_column"), "i32")
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner, "STAGES": tile.stages}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else None}
    if kind != "forward":
        constants["bias"] = types.pop("bias") and None
    label = f"product {dtype} {kind}, {tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages}"
    ones = {
        "forward": ("left_inner", "right_inner"),
        "input gradient": ("left_inner", "right_column"),
        "weight gradient": ("left_row", "right_column"),
    }[kind]
    case = Case(label, "multiply", types, constants, ("rows",), tile.warps)
    return replace(case.with_ones(*ones), label=label)


def multiply_group(dtype: str) -> Case:
    """Return the batch-invariant products of three layers with one input."""
    tile = products_triton.tile_of(1536, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    ordinals = ("first", "second", "third")
    types = {f"{ordinal}{part}": f"*{dtype}" for part in ("", "_bias", "_out") for ordinal in ordinals}
    types |= {"left": f"*{dtype}"} | {f"{ordinal}_columns": "i32" for ordinal in ordinals}
    types |= dict.fromkeys(("rows", "inner", "left_row"), "i32")
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner, "STAGES": tile.stages}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else None}
    label = f"three products {dtype}, {tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages}"
    return Case(label, "multiply_group", types, constants, ("rows",), tile.warps)


def with_arguments_of_1() -> list[Case]:
    """Return kernels with arguments of 1: Triton makes them constants, which gives other types inside."""
    narrow = attend("fp32", (1, 1), 2, split=True, MASK="window", KV_HEADS=1)
    vocabularies = (("blocks",), ("logits_row", "vocabulary", "blocks"))
    return [
        narrow.with_ones("query_head", "mask_size"),
        rotate_and_write("fp32", (2, 1), 2).with_ones("key_token", "key_head", "value_token", "value_head"),
        write("fp32", (2, 1), 1).with_ones("key_token", "key_head", "value_token", "value_head"),
        top_p_masses("fp32").with_ones("logits_row", "vocabulary"),
        norm("fp32", 1, late=False).with_ones("x_row", "width"),
        *(sum_blocks("fp32", filtered=True).with_ones(*ones) for ones in vocabularies),
        *(draw("fp32", filtered=True).with_ones(*ones) for ones in vocabularies),
    ]


def main() -> None:
    """Measure and print the chosen kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="*", metavar="LABEL")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("Unset TRITON_INTERPRET: the interpreter compiles nothing.")
    chosen = [case for case in cases() + with_arguments_of_1() if case.label.startswith(tuple(given.labels or [""]))]
    if given.json:
        print(json.dumps([asdict(measure(case)) for case in chosen]))
        return
    print(f"Triton {triton.__version__}, compute capability 9.0\n")
    print(f"| {' | '.join(_HEAD)} |")
    print("|---" * len(_HEAD) + "|")
    spilling = []
    for case in chosen:
        found = measure(case)
        numbers = (found.registers, found.stack, found.shared, found.warps, found.programs)
        words = (" ".join(found.products), " ".join(found.buffers), str(found.waits or ""))
        print("|", " | ".join([found.label, *map(str, numbers), *words]), "|", flush=True)
        spilling += [found.label] * bool(found.stack)
    if spilling:
        sys.exit(f"Registers are spilled in {len(spilling)} kernels: {'; '.join(spilling)}.")


if __name__ == "__main__":
    main()
