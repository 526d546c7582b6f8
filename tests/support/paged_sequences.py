"""Sequences over pages that lie anywhere, and plain attention over them: what attention kernels are tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.arrays import IntArray, ceil_div
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

Parts = list[tuple[int, range]]
"""A forward: sequences, and the positions of each that are computed."""
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreParams], torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """One layer of a model, and how it makes weights of its scores."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    mask_kind: MaskKind = MaskKind()
    softcap: float | None = None
    sinks: bool = False


class PagedWorld:
    """Sequences with keys, values and queries for every layer, and a pool whose every slot holds NaN until written.

    Args:
        lengths: tokens of each sequence.
        seed: of their numbers.
        tolerance: of a result of size 1.
        place: of where their pages lie.
        shared: the second sequence begins with so many tokens of the first, and holds the same pages for them.
    """

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype,
        seed: int,
        kinds: tuple[Kind, ...],
        tolerance: float,
        *,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        place: int = 0,
        page_size: int = 16,
        slab_pages: int = 8,
        shared: int = 0,
    ) -> None:
        print("seed", seed, "place", place)
        self.lengths, self.dtype, self.kinds, self.page_size = lengths, dtype, kinds, page_size
        self.tolerance, self.device = tolerance, device
        layers = tuple(
            AttentionLayer(None, kind.kv_heads, kind.key_dim, kind.value_dim, kind.mask_kind) for kind in kinds
        )
        self.pool = PagePool(KVLayout(layers, dtype, page_size), slab_pages, device)
        counts = [ceil_div(length, page_size) for length in lengths]
        while self.pool.free_pages < sum(counts) + 5:
            self.pool.grow()
        self.poison()
        pages = np.random.default_rng(place).permutation(self.pool.free_pages)[: sum(counts)]
        self.tables: list[IntArray] = np.split(pages, np.cumsum(counts)[:-1])
        rng = np.random.default_rng(seed)

        def drawn(heads: int, dim: int) -> list[torch.Tensor]:
            rows = [torch.from_numpy(rng.standard_normal((n, heads, dim), np.float32)).to(dtype) for n in lengths]
            if shared:
                rows[1][:shared] = rows[0][:shared]
            return [row.to(device) for row in rows]

        # [layer][sequence]
        self.queries = [drawn(kind.kv_heads * kind.group, kind.key_dim) for kind in kinds]
        self.keys = [drawn(kind.kv_heads, kind.key_dim) for kind in kinds]
        self.values = [drawn(kind.kv_heads, kind.value_dim) for kind in kinds]
        if shared:
            self.tables[1][: shared // page_size] = self.tables[0][: shared // page_size]
        self.scores = [
            ScoreParams(
                1.3 * kind.key_dim**-0.5,
                kind.softcap,
                torch.from_numpy(rng.standard_normal(kind.kv_heads * kind.group, np.float32)).to(device, dtype)
                if kind.sinks
                else None,
            )
            for kind in kinds
        ]

    def check_only_written(self, lengths: dict[int, int]) -> None:
        """The first tokens of each sequence stand in their slots; all other slots are as nobody has written them."""
        size, slab_pages = self.page_size, self.pool.slab_pages
        slots = {
            (int(self.tables[sequence][p // size]), p % size): (sequence, p)
            for sequence, n in lengths.items()
            for p in range(n)
        }
        for index in range(len(self.kinds)):
            for number, slab in enumerate(self.pool.slabs):
                if slab is None:
                    continue
                for memory, source in ((slab.keys, self.keys), (slab.values, self.values)):
                    for page in range(slab_pages):
                        for at in range(size):
                            found, owner = memory[index][page, at], slots.get((number * slab_pages + page, at))
                            if owner is None:
                                assert found.isnan().all()
                            else:
                                assert torch.equal(found, source[index][owner[0]][owner[1]])

    def poison(self) -> None:
        for slab in self.pool.slabs:
            if slab is not None:
                for tensor in (*slab.keys, *slab.values):
                    tensor.fill_(torch.nan)

    def forward(self, parts: Parts) -> ForwardBatch:
        """Entries of the tables past a sequence's pages name a page that is not there."""
        width = max(len(self.tables[sequence]) for sequence, _ in parts)
        tables = np.full((len(parts), width), 10**9)
        for row, (sequence, positions) in enumerate(parts):
            held = self.tables[sequence][: ceil_div(positions.stop, self.page_size)]
            tables[row, : len(held)] = held
        starts, lengths = (np.array(x) for x in zip(*((p.start, len(p)) for _, p in parts), strict=True))
        return ForwardBatch(torch.zeros(int(lengths.sum()), dtype=torch.int64), tables, starts, lengths)

    def packed(self, source: list[list[torch.Tensor]], index: int, parts: Parts) -> torch.Tensor:
        return torch.cat([source[index][sequence][positions] for sequence, positions in parts])

    def attend(self, attention: Attention, parts: Parts) -> list[torch.Tensor]:
        """One forward: for each layer [T, heads, value_dim]."""
        return [
            attention(index, *(self.packed(s, index, parts) for s in (self.queries, self.keys, self.values)), scores)
            for index, scores in enumerate(self.scores)
        ]

    def expected(self, index: int, sequence: int, positions: range) -> torch.Tensor:
        """[positions, heads, value_dim] in float64, of the definition."""
        kind, scores = self.kinds[index], self.scores[index]
        query = self.queries[index][sequence][positions].cpu().double()
        key, value = (
            s[index][sequence][: positions.stop].cpu().double().repeat_interleave(kind.group, 1)
            for s in (self.keys, self.values)
        )
        logits = torch.einsum("qhd,khd->hqk", query, key) * scores.scale
        if scores.softcap is not None:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        q, k = torch.tensor(positions)[:, None], torch.arange(positions.stop)
        seen = k <= q
        if kind.mask_kind.kind == "window":
            seen &= q - k < kind.mask_kind.size
        if kind.mask_kind.kind == "chunk":
            seen &= q // kind.mask_kind.size == k // kind.mask_kind.size
        weights = logits.masked_fill(~seen, -torch.inf).exp()
        sink = 0.0 if scores.sinks is None else scores.sinks.cpu().double().exp()[:, None, None]
        weights = weights / (weights.sum(-1, keepdim=True) + sink)
        return torch.einsum("hqk,khd->qhd", weights, value)

    def compare(self, outputs: list[torch.Tensor], parts: Parts) -> None:
        for index, kind in enumerate(self.kinds):
            pieces = outputs[index].split([len(positions) for _, positions in parts])
            for out, (sequence, positions) in zip(pieces, parts, strict=True):
                assert out.dtype == self.dtype
                assert out.is_contiguous()
                expected = self.expected(index, sequence, positions)
                error = float(((out.cpu().double() - expected).abs() / expected.abs().clamp(min=1)).max())
                assert error < self.tolerance, (kind, sequence, positions, error)

    def random_parts(self, rng: np.random.Generator, most: int) -> Iterator[Parts]:
        """Forwards that together compute everything: rows that decode and segments of prompts, in any order."""
        done = [0] * len(self.lengths)
        while any(have < length for have, length in zip(done, self.lengths, strict=True)):
            parts = []
            for sequence in rng.permutation(len(done)).tolist():
                size = int(rng.choice([0, 1, 1, rng.integers(1, most)]))
                end = min(self.lengths[sequence], done[sequence] + size)
                if end > done[sequence]:
                    parts.append((sequence, range(done[sequence], end)))
                    done[sequence] = end
            if parts:
                yield parts


def whole(world: PagedWorld) -> Parts:
    return [(sequence, range(length)) for sequence, length in enumerate(world.lengths)]


def same_bits(
    alone: list[list[torch.Tensor]], outputs: list[torch.Tensor], parts: Parts, kinds: tuple[Kind, ...]
) -> None:
    """``alone``: [sequence][layer], each of the whole sequence."""
    for index, kind in enumerate(kinds):
        pieces = outputs[index].split([len(positions) for _, positions in parts])
        for out, (sequence, positions) in zip(pieces, parts, strict=True):
            assert torch.equal(out, alone[sequence][index][positions]), (kind, sequence, positions)
