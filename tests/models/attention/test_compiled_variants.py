"""Every variant of the compiled kernel in bfloat16: tiles, dot products of pairs, and float arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.models.attention import compiled
from rollout.models.attention.compiled_library import Kernel
from rollout.models.csrc import build
from rollout.models.kv_cache.layout import MaskKind
from tests.models.attention.test_compiled import World
from tests.support.compiler import needs_compiler
from tests.support.paged_sequences import Kind, Parts, same_bits, whole

#: Flags that leave out instructions, on a CPU that may have them.
VARIANTS = {
    "native": ("-march=native",),
    "pairs": ("-march=native", "-mno-amx-bf16", "-mno-amx-tile"),
    "float": ("-march=native", "-mno-avx512bf16"),
    "generic": (),
}
KINDS = (
    Kind(3, 3, 64, 64),
    Kind(1, 16, 96, 80, softcap=1.5),
    Kind(2, 7, 13, 40, sinks=True),
    Kind(1, 17, 32, 32, MaskKind("window", 37)),
    Kind(2, 1, 128, 64, MaskKind("window", 600), sinks=True),
    Kind(1, 4, 64, 48, MaskKind("chunk", 70)),
)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Kernel:
    needs_compiler()
    try:
        return build.build_with((*build.FLAGS, *VARIANTS[request.param]), compiled.SOURCE, Kernel)
    except build.KernelUnavailable as error:
        pytest.skip(f"the compiler does not know these instructions: {error}")


def cut(length: int, size: int) -> list[range]:
    return [range(at, min(at + size, length)) for at in range(0, length, size)]


def test_variants_equal_reference_attention(variant: Kernel) -> None:
    world = World([600, 1, 33], torch.bfloat16, 0, kinds=KINDS)
    world.compare(world.run(variant, whole(world), threads=2), whole(world))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 32, 33, 511, 512, 513])
def test_bits_do_not_depend_on_chunks_of_prefill(variant: Kernel, size: int) -> None:
    length = 1030 if size > 100 else 530
    world = World([length, 20], torch.bfloat16, 1, kinds=KINDS)
    alone = [world.run(variant, [(0, range(length))]), world.run(variant, [(1, range(20))])]
    world.poison()
    start = 0 if size > 1 else length - 40  # decoding every position would add nothing
    if start:
        world.run(variant, [(0, range(start))])
    for positions in cut(length, size):
        if positions.start >= start:
            parts: Parts = [(1, range(20)), (0, positions)]
            same_bits(alone, world.run(variant, parts, threads=1 + size % 2), parts, KINDS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_a_query_does_not_see_change_nothing(variant: Kernel, bad: float) -> None:
    """0 times such a value would be NaN."""
    sound, world = (World([80], torch.bfloat16, 2, kinds=KINDS) for _ in range(2))
    for stored in (*world.values, *world.keys):
        stored[0][50] = bad
    expected, outputs = sound.run(variant, whole(sound)), world.run(variant, whole(world))
    again = [world.run(variant, [(0, positions)]) for positions in cut(80, 7)]
    for index in range(len(KINDS)):
        assert torch.equal(outputs[index][:50], expected[index][:50])
        chunks = torch.cat([out[index] for out in again])
        assert torch.equal(chunks.nan_to_num(7.0), outputs[index].nan_to_num(7.0))


def test_long_prompts_have_the_bits_of_decoded_tokens(variant: Kernel) -> None:
    """Two threads divide the chunks of a decoded token, with all heads of a chunk in one task."""
    kinds = (Kind(2, 2, 64, 64), Kind(1, 2, 64, 64, MaskKind("window", 1000)))
    world = World([4200], torch.bfloat16, 3, kinds=kinds)
    alone = [world.run(variant, whole(world), threads=2)]
    draws = np.random.default_rng(3).integers(0, 4199, 12).tolist()
    for position in [*draws, 4198, 4199]:
        parts: Parts = [(0, range(position, position + 1))]
        same_bits(alone, world.run(variant, parts, threads=2), parts, kinds)
    world.compare([out[-50:] for out in alone[0]], [(0, range(4150, 4200))])
