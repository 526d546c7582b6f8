"""Triton kernels of paged attention: look up pages, write new keys and values, attend, reduce splits.

Softmax is online over tiles of keys (Milakov and Gimelshein, arXiv 1805.02867); the keys of a decoding row are split
among programs and reduced afterwards (Flash-Decoding, Dao et al. 2023). Heads that share keys are rows of one tile, so
that keys are read once for all of them.

Results do not depend on the batch composition, bit for bit: a tile of keys begins at a multiple of its size, masked
keys have weight 0 exactly, and splits are reduced in order. What varies per step (addresses, lengths, amount of work)
is read from memory, so that a CUDA graph stays valid; the grid only limits how many programs share the work.

Addresses are loaded, so the compiler cannot know their alignment; `tl.multiple_of` states it, or loads would not be 16
bytes wide. torch's allocators align slabs to 64 bytes or more, and `rollout.models.kv_cache.slab_table` checks it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rollout.models.attention import triton_metadata
from rollout.models.attention.triton_rotary import rotated_halves, store_halves

_ITEM_FIELDS = tl.constexpr(triton_metadata.ITEM_FIELDS)
_ROW_FIELDS = tl.constexpr(triton_metadata.ROW_FIELDS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["slab_pages"])  # a multiple of 16 in some pools only
def locate(pages, slabs, slab_addresses, first_tokens, count, slab_pages, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Look up each of ``count`` page table entries: the address of its slab, and its first token within the slab."""
    total = tl.load(count)
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < total
        page = tl.load(pages + at, mask=inside, other=0)
        slab = page // slab_pages
        tl.store(slab_addresses + at, tl.load(slabs + slab, mask=inside, other=0), mask=inside)
        tl.store(first_tokens + at, (page - slab * slab_pages) * PAGE_SIZE, mask=inside)


@triton.jit
def _slot_memory(slabs, slot, slab_tokens, like):
    """Return the memory of a slot's slab, with elements of the type of ``like``, and the slot's place within it."""
    slab = slot // slab_tokens
    memory = tl.load(slabs + slab).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(memory, 16), (slot - slab * slab_tokens).to(tl.int64)


@triton.jit
def _write_heads(x, target, head_stride, HEADS, DIM, BLOCK_HEADS, BLOCK_DIM):
    """Copy one token's heads x [HEADS, DIM] to ``target``, where they are contiguous."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (heads < HEADS) & (dims < DIM)
    new = tl.load(x + heads * head_stride + dims, mask=inside, other=0)
    tl.store(target + heads * DIM + dims, new, mask=inside)


@triton.jit
def _write_zeros(out, HEADS, DIM, BLOCK_HEADS, BLOCK_DIM):
    """Write zeros to one token's results ``out`` [HEADS, DIM]."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    for first in range(0, HEADS, BLOCK_HEADS):
        zeros = tl.zeros([BLOCK_HEADS, BLOCK_DIM], out.dtype.element_ty)
        tl.store(out + (first + heads) * DIM + dims, zeros, mask=(first + heads < HEADS) & (dims < DIM))


@triton.jit
def write(
    key,
    value,
    out,
    slots,
    slabs,
    keys_at,
    values_at,
    slab_tokens,
    key_token,
    key_head,
    value_token,
    value_head,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Write a new token's keys and values to its slot; write zeros to ``out`` for padding, whose slot is -1."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        _write_zeros(out + token * (HEADS * VALUE_DIM), HEADS, VALUE_DIM, BLOCK_HEADS, BLOCK_VALUE)
    else:
        memory, place = _slot_memory(slabs, slot, slab_tokens, key)
        keys = memory + (keys_at + place * (KV_HEADS * KEY_DIM))
        _write_heads(key + token * key_token, keys, key_head, KV_HEADS, KEY_DIM, BLOCK_HEADS, BLOCK_KEY)
        values = memory + (values_at + place * (KV_HEADS * VALUE_DIM))
        _write_heads(value + token * value_token, values, value_head, KV_HEADS, VALUE_DIM, BLOCK_HEADS, BLOCK_VALUE)


@triton.jit
def rotate_and_write(
    query,
    key,
    value,
    cosines,
    sines,
    rotated,
    out,
    slots,
    slabs,
    keys_at,
    values_at,
    slab_tokens,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Rotate a new token's query into ``rotated`` [tokens, HEADS, 2 * HALF], and its keys into their slot; see `write`.

    Two programs a token: one for the query, one for keys and values.
    """
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        left, right = rotated_halves(
            query + token * query_token, cosines, sines, token, query_head, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF
        )
        store_halves(rotated + token * (HEADS * 2 * HALF), left, right, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
    else:
        slot = tl.load(slots + token)
        if slot < 0:
            _write_zeros(out + token * (HEADS * VALUE_DIM), HEADS, VALUE_DIM, BLOCK_KV_HEADS, BLOCK_VALUE)
        else:
            memory, place = _slot_memory(slabs, slot, slab_tokens, key)
            left, right = rotated_halves(
                key + token * key_token, cosines, sines, token, key_head, KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF
            )
            keys = memory + (keys_at + place * (KV_HEADS * 2 * HALF))
            store_halves(keys, left, right, KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
            values = memory + (values_at + place * (KV_HEADS * VALUE_DIM))
            _write_heads(
                value + token * value_token, values, value_head, KV_HEADS, VALUE_DIM, BLOCK_KV_HEADS, BLOCK_VALUE
            )


@triton.jit
def attend(
    query,
    out,
    maxima,
    sums,
    sinks,
    items,
    count,
    slab_addresses,
    first_tokens,
    keys_at,
    values_at,
    query_token,
    query_head,
    scale,
    softcap,
    mask_size,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend for each work item and key head: a tile of queries over a range of keys.

    With ``SPLIT``, an item is one query over a split of its keys. Then ``out`` receives unnormalised values [items,
    heads, value_dim], ``maxima`` [items, heads] the largest score and ``sums`` [items, heads] the sum of weights
    relative to it; scores are multiplied by log2(e). Without, ``out`` receives results [tokens, heads, value_dim].
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    element = query.dtype.element_ty
    rows = tl.arange(0, QUERIES)
    key_dims = tl.arange(0, BLOCK_KEY)
    value_dims = tl.arange(0, BLOCK_VALUE)
    columns = tl.arange(0, KEYS)
    total = tl.load(count) * KV_HEADS
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        item = work // KV_HEADS
        kv_head = work % KV_HEADS
        fields = items + item * _ITEM_FIELDS
        token = tl.load(fields).to(tl.int64)
        queries = tl.load(fields + 1)
        position = tl.load(fields + 2)
        begin = tl.load(fields + 3)
        end = tl.load(fields + 4)
        entry = tl.load(fields + 5)

        number = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        valid = number < queries
        query_position = position + number
        query_rows = query + (token + number) * query_token + head * query_head
        query_places = query_rows[:, None] + key_dims[None, :]
        if KEY_DIM == BLOCK_KEY:
            q = tl.load(query_places, mask=valid[:, None], other=0)
        else:
            q = tl.load(query_places, mask=valid[:, None] & (key_dims < KEY_DIM)[None, :], other=0)

        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        weight = tl.zeros([QUERIES], tl.float32)
        values = tl.zeros([QUERIES, BLOCK_VALUE], tl.float32)
        keys_from = keys_at + kv_head * KEY_DIM
        values_from = values_at + kv_head * VALUE_DIM
        for tile in tl.range(begin // KEYS * KEYS, end, KEYS, num_stages=STAGES):
            n = tile + columns
            # Keys outside of the range are not read: their slots may hold NaN.
            inside = (n >= begin) & (n < end)
            page = entry + n // PAGE_SIZE
            memory = tl.load(slab_addresses + page, mask=inside, other=0).to(tl.pointer_type(element))
            memory = tl.multiple_of(memory, 16)
            place = (tl.load(first_tokens + page, mask=inside, other=0) + n % PAGE_SIZE).to(tl.int64)
            key_rows = (keys_from + place * (KV_HEADS * KEY_DIM))[:, None]
            key_places = memory[:, None] + key_rows + key_dims[None, :]
            if KEY_DIM == BLOCK_KEY:
                k = tl.load(key_places, mask=inside[:, None], other=0)
            else:
                k = tl.load(key_places, mask=inside[:, None] & (key_dims < KEY_DIM)[None, :], other=0)
            value_places = (
                memory[:, None] + (values_from + place * (KV_HEADS * VALUE_DIM))[:, None] + value_dims[None, :]
            )
            if VALUE_DIM == BLOCK_VALUE:
                v = tl.load(value_places, mask=inside[:, None], other=0)
            else:
                v = tl.load(value_places, mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :], other=0)

            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                scores = softcap * _tanh(scores / softcap)
            scores = scores * _LOG2_E
            if SPLIT:
                scores = tl.where(inside[None, :], scores, float("-inf"))
            else:
                seen = inside[None, :] & (n[None, :] <= query_position[:, None])
                if MASK == "window":
                    seen = seen & (query_position[:, None] - n[None, :] < mask_size)
                if MASK == "chunk":
                    seen = seen & (n[None, :] // mask_size == query_position[:, None] // mask_size)
                scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            # While a query has seen no key, its maximum is -inf, and -inf - -inf would be NaN.
            origin = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp2(scores - origin[:, None])
            rescale = tl.exp2(largest - origin)
            weight = weight * rescale + tl.sum(weights, 1)
            values = values * rescale[:, None]
            values = tl.dot(weights.to(element), v, values, input_precision=PRECISION)
            largest = larger

        if SPLIT:
            row = item.to(tl.int64) * HEADS + head
            tl.store(maxima + row, largest, mask=valid)
            tl.store(sums + row, weight, mask=valid)
            result = values
        else:
            if SINKS:
                sink = tl.load(sinks + head, mask=valid, other=0).to(tl.float32) * _LOG2_E
            else:
                sink = tl.full([QUERIES], float("-inf"), tl.float32)
            row = (token + number) * HEADS + head
            result = _normalised(largest, weight, values, sink).to(element)
        out_places = out + row[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(out_places, result, mask=valid[:, None] & (value_dims < VALUE_DIM)[None, :])


@triton.jit
def reduce(
    partial,
    maxima,
    sums,
    sinks,
    out,
    rows,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Reduce the splits of a decoding row, in order, for the heads that share one key head."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    fields = rows + tl.program_id(0) * _ROW_FIELDS
    token = tl.load(fields).to(tl.int64)
    first = tl.load(fields + 1)
    count = tl.load(fields + 2)
    if count == 0:
        return
    member = tl.arange(0, BLOCK_GROUP)
    head = tl.program_id(1) * GROUP + member
    valid = member < GROUP
    dims = tl.arange(0, BLOCK_VALUE)
    inside = valid[:, None] & (dims < VALUE_DIM)[None, :]
    largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_GROUP], tl.float32)
    values = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for item in range(first, first + count):
        row = tl.cast(item, tl.int64) * HEADS + head
        split_largest = tl.load(maxima + row, mask=valid, other=float("-inf"))
        split_weight = tl.load(sums + row, mask=valid, other=0)
        split_values = tl.load(partial + row[:, None] * VALUE_DIM + dims[None, :], mask=inside, other=0)
        larger = tl.maximum(largest, split_largest)
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        rescale = tl.exp2(largest - origin)
        split_rescale = tl.exp2(split_largest - origin)
        weight = weight * rescale + split_weight * split_rescale
        values = values * rescale[:, None] + split_values * split_rescale[:, None]
        largest = larger
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0).to(tl.float32) * _LOG2_E
    else:
        sink = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    result = _normalised(largest, weight, values, sink).to(out.dtype.element_ty)
    tl.store(out + (token * HEADS + head)[:, None] * VALUE_DIM + dims[None, :], result, mask=inside)


@triton.jit
def _normalised(largest, weight, values, sink):
    """Divide ``values`` by the sum of all weights; a sink adds weight and no value."""
    larger = tl.maximum(largest, sink)
    origin = tl.where(larger == float("-inf"), 0.0, larger)
    rescale = tl.exp2(largest - origin)
    return values * (rescale / (weight * rescale + tl.exp2(sink - origin)))[:, None]


@triton.jit
def _tanh(x):
    """Compute tanh, by its series near 0, where the closed form loses digits; the relative error is below 4e-7."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp2(tl.abs(x) * (-2 * _LOG2_E))
    other = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -other, other))
