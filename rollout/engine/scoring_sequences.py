"""Sequences to score: pairs of a prompt and a completion, and the beginnings of prompts that pairs share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from rollout.batcher.types import IntArray
from rollout.engine.recomputation import Recomputation
from rollout.models.arrays import uploaded
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout

_NONE: IntArray = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Pair:
    """One tokenised prompt, and the completion to score."""

    prompt_ids: IntArray
    completion_ids: IntArray
    temperature: float = 1.0
    error_class: str = ""
    error: str = ""
    """Why the pair cannot be scored."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(eq=False, slots=True)
class ScoredSequence:
    """Tokens to run through the model: those of a pair but the last, or the pages that pairs of one prompt share."""

    ids: IntArray
    known: int
    """Tokens of prompt and completion, which rotary embeddings may depend on."""
    first_wanted: int
    """Position of the first token whose logits are wanted: the prompt's last. All after it are, too."""
    pairs: tuple[int, ...]
    """The pair, or the pairs that share these pages."""
    prefix: ScoredSequence | None = None
    """Holds the pages of the first tokens."""
    computed: int = 0
    """Tokens that are done: their keys and values are in pages, and their logits were read if wanted."""
    users: int = 0
    """Sequences whose prefix this is and that have not ended."""
    pages: IntArray = field(default_factory=lambda: _NONE)
    states: IntArray = field(default_factory=lambda: _NONE)

    @property
    def shared(self) -> int:
        """Tokens in the pages of `prefix`."""
        return 0 if self.prefix is None else len(self.prefix.ids)

    @property
    def remaining(self) -> int:
        return len(self.ids) - self.computed

    @property
    def table(self) -> IntArray:
        """All of its pages, in order."""
        return self.pages if self.prefix is None else np.concatenate([self.prefix.pages, self.pages])


class Chunk(NamedTuple):
    """The tokens of one sequence in one forward."""

    sequence: ScoredSequence
    start: int
    end: int
    wanted: int
    """Of how many of its last tokens the logits are wanted."""

    @property
    def first_target(self) -> int:
        """Index in the completion of the first token whose log-probability these logits give."""
        return self.end - self.wanted - self.sequence.first_wanted

    @property
    def decoded(self) -> int:
        """Of how many of its last tokens belong to the completion."""
        return max(0, self.end - max(self.start, self.sequence.first_wanted + 1))


def make_sequences(pairs: Sequence[Pair], layout: KVLayout, *, share: bool) -> list[ScoredSequence]:
    """Return the sequences of valid pairs with a completion, long ones first, each after its prefix.

    Args:
        share: compute what pairs share of a prompt once, in whole pages.
    """
    groups: dict[tuple[bytes, bool], list[int]] = {}
    for index, pair in enumerate(pairs):
        if not pair.error_class and len(pair.completion_ids):
            groups.setdefault((pair.prompt_ids.tobytes(), layout.alike(len(pair), 0)), []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: -len(pairs[index]))
    sequences: list[ScoredSequence] = []
    for group in sorted(groups.values(), key=lambda group: -len(pairs[group[0]])):
        prompt = pairs[group[0]].prompt_ids
        # The logits of a prompt's last token are wanted by each pair, so each computes that token itself.
        shared = (len(prompt) - 1) // layout.page_size * layout.page_size if share and len(group) > 1 else 0
        prefix = None
        if shared:
            prefix = ScoredSequence(
                ids=prompt[:shared],
                known=len(pairs[group[0]]),
                first_wanted=shared,
                pairs=tuple(group),
                users=len(group),
            )
            sequences.append(prefix)
        sequences += [
            ScoredSequence(
                ids=np.concatenate([prompt, pairs[index].completion_ids[:-1]]),
                known=len(pairs[index]),
                first_wanted=len(prompt) - 1,
                pairs=(index,),
                prefix=prefix,
                computed=shared,
            )
            for index in group
        ]
    return sequences


def plan_chunks(
    sequences: Iterable[ScoredSequence],
    tokens: int,
    logits: int,
    recomputation: Recomputation,
    *,
    whole_context: bool,
    prefix_first: bool,
) -> list[Chunk]:
    """Return the chunks of the next forward, oldest sequence first.

    Args:
        sequences: in order of admission.
        tokens, logits: most tokens, and most of them whose logits are wanted; at least 1.
        recomputation: limits the tokens of completions, unless contexts are computed whole.
        whole_context: every forward of a sequence begins with its first token, and the first chunk is taken whatever
            its length.
        prefix_first: a prefix must be in its pages before the forward.
    """
    chunks: list[Chunk] = []
    planned: set[ScoredSequence] = set()
    for sequence in sequences:
        prefix = sequence.prefix
        if prefix is not None and prefix.remaining and (prefix_first or prefix not in planned):
            continue
        if not sequence.remaining:
            continue
        first = max(sequence.computed, sequence.first_wanted)
        if whole_context:
            start, end = 0, min(len(sequence.ids), first + logits)
            if chunks and end > tokens:
                break
        else:
            start = sequence.computed
            end = min(len(sequence.ids), start + tokens, first + logits)
            end = start + recomputation.take(start, end - start, sequence.first_wanted + 1)
        if end <= (first if whole_context else start):
            break
        wanted = max(0, end - first)
        chunks.append(Chunk(sequence, start, end, wanted))
        if end == len(sequence.ids):
            planned.add(sequence)
        tokens -= end - start
        logits -= wanted
        if tokens <= 0:
            break
    return chunks


def build_batch(chunks: Sequence[Chunk], layout: KVLayout, device: torch.device) -> ForwardBatch:
    """Build the forward batch of some chunks."""
    tables = [chunk.sequence.table[: layout.pages_for(chunk.end)] for chunk in chunks]
    page_tables = np.zeros((len(chunks), max(map(len, tables))), np.int64)
    for row, table in zip(page_tables, tables, strict=True):
        row[: len(table)] = table
    starts, ends = (np.array(column, np.int64) for column in zip(*((c.start, c.end) for c in chunks), strict=True))
    return ForwardBatch(
        tokens=uploaded(np.concatenate([c.sequence.ids[c.start : c.end] for c in chunks]), device),
        page_tables=page_tables,
        prefix_lens=starts,
        query_lens=ends - starts,
        known_lens=np.array([chunk.sequence.known for chunk in chunks], np.int64),
        logits_lens=np.array([chunk.wanted for chunk in chunks], np.int64),
        decode_lens=np.array([chunk.decoded for chunk in chunks], np.int64) if layout.decodes_apart else _NONE,
        states=np.concatenate([chunk.sequence.states for chunk in chunks]),
    )
