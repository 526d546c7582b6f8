"""Matrix products on a GPU in which a row's bits do not depend on the number of rows.

cuBLAS chooses tiles, and how many programs share a sum, by the number of rows, so a row gets other bits in another
batch. Here tiles depend on the weight's shape and the dtype alone, and each program adds up one tile's sum in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rollout.models.arrays import ceil_div
from rollout.models.device import launching_on

_GROUP = 3
"""Layers of `multiply_group`."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Sizes of the tile that one program computes."""

    rows: int
    columns: int
    inner: int
    """Terms of the sums that are added at a time."""
    warps: int = 4
    stages: int = 4


def tile_of(columns: int, dtype: torch.dtype) -> ProductTile:
    """Return the tile for a weight with so many outputs; nothing else may decide, since bits depend on it."""
    if dtype == torch.float32:
        return ProductTile(32, 32, 32, stages=3)
    # Few outputs in narrow tiles give enough programs for a GPU when few rows decode.
    return ProductTile(64, 64 if columns >= 8192 else 32, 64)


@triton.jit
def _multiply_tile(
    left,
    right,
    bias,
    out,
    tile,
    rows,
    columns,
    inner,
    left_row,
    left_inner,
    right_inner,
    right_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    some_rows, some_columns = row < rows, column < columns
    step = tl.arange(0, INNER)
    left_rows = left + row.to(tl.int64)[:, None] * left_row
    right_columns = right + column.to(tl.int64)[None] * right_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, inner, INNER, num_stages=STAGES):
        at = (start + step).to(tl.int64)
        inside = at < inner
        a = tl.load(left_rows + at[None] * left_inner, mask=some_rows[:, None] & inside[None], other=0)
        b = tl.load(right_columns + at[:, None] * right_inner, mask=inside[:, None] & some_columns[None], other=0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, mask=some_columns, other=0).to(tl.float32)[None]
    places = out + row.to(tl.int64)[:, None] * columns + column[None]
    tl.store(places, total.to(out.dtype.element_ty), mask=some_rows[:, None] & some_columns[None])


@triton.jit
def multiply(
    left,
    right,
    bias,
    out,
    rows,
    columns,
    inner,
    left_row,
    left_inner,
    right_inner,
    right_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of out = left [rows, inner] @ right [inner, columns] + bias [columns], which may be None."""
    _multiply_tile(
        *(left, right, bias, out, tl.program_id(0), rows, columns, inner),
        *(left_row, left_inner, right_inner, right_column),
        *(ROWS, COLUMNS, INNER, STAGES, PRECISION),
    )


@triton.jit
def multiply_group(
    left,
    first,
    second,
    third,
    first_bias,
    second_bias,
    third_bias,
    first_out,
    second_out,
    third_out,
    rows,
    first_columns,
    second_columns,
    third_columns,
    inner,
    left_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of three layers of one input [rows, inner]; weights [columns, inner] are contiguous."""
    tile = tl.program_id(0)
    first_tiles, second_tiles = tl.cdiv(first_columns, COLUMNS), tl.cdiv(second_columns, COLUMNS)
    right, bias, out, columns = first, first_bias, first_out, first_columns
    if tile >= first_tiles:
        right, bias, out, columns = second, second_bias, second_out, second_columns
        if tile >= first_tiles + second_tiles:
            right, bias, out, columns = third, third_bias, third_out, third_columns
            tile -= second_tiles
        tile -= first_tiles
    _multiply_tile(
        *(left, right, bias, out, tile, rows, columns, inner),
        *(left_row, 1, 1, inner),
        *(ROWS, COLUMNS, INNER, STAGES, PRECISION),
    )


def product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return left [rows, inner] @ right [inner, columns] + bias [columns]; any strides, one dtype of `DTYPES`."""
    (rows, inner), columns = left.shape, right.shape[1]
    out = torch.empty((rows, columns), dtype=left.dtype, device=left.device)
    if not out.numel():
        return out
    tile = tile_of(columns, left.dtype)
    with launching_on(left.device):
        multiply[(ceil_div(columns, tile.columns), ceil_div(rows, tile.rows))](
            left,
            right,
            None if bias is None else bias.contiguous(),
            out,
            rows,
            columns,
            inner,
            left.stride(0),
            left.stride(1),
            right.stride(0),
            right.stride(1),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            STAGES=tile.stages,
            # Multiply float32 exactly; TF32 would round inputs to ten mantissa bits.
            PRECISION="ieee" if left.dtype == torch.float32 else None,
            num_warps=tile.warps,
        )
    return out


def grouped_product(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor] | None:
    """Compute up to three layers of one input in one launch; None if they do not suit.

    Args:
        x: [rows, inner].
        weights: each [columns, inner].
        biases: each [columns], or None for all.

    Returns:
        Each [rows, columns], with the bits of `product`.
    """
    tiles = {tile_of(len(weight), weight.dtype) for weight in weights}
    plain = all(weight.is_contiguous() and weight.dtype == x.dtype for weight in weights)
    if len(weights) > _GROUP or len(tiles) > 1 or not plain or len({bias is None for bias in biases}) > 1 or not len(x):
        return None
    tile = tiles.pop()
    x = x if x.stride(1) == 1 else x.contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    outs = [torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device) for weight in weights]
    # An absent layer has no tile, so what stands for it is not read.
    absent = _GROUP - len(weights)
    columns = [len(weight) for weight in weights] + [0] * absent
    with launching_on(x.device):
        multiply_group[(sum(ceil_div(count, tile.columns) for count in columns), ceil_div(len(x), tile.rows))](
            x,
            *(*weights, *weights[:1] * absent),
            *(*biases, *biases[:1] * absent),
            *(*outs, *outs[:1] * absent),
            len(x),
            *columns,
            x.shape[1],
            x.stride(0),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            STAGES=tile.stages,
            PRECISION="ieee" if x.dtype == torch.float32 else None,
            num_warps=tile.warps,
        )
    return outs


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` with a backward by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute [..., outputs] from x [..., inputs], weight [outputs, inputs] and bias [outputs]."""
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients that are needed; a weight's is a sum over rows, in their order."""
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight).view(x.shape) if needs_x else None,
            product(grad.T, x.reshape(-1, x.shape[-1])) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute a linear layer like ``torch.nn.functional.linear``, and its gradients; all of one dtype of `DTYPES`."""
    if torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in (x, weight, bias)):
        return cast(torch.Tensor, _Linear.apply(x, weight, bias))
    return product(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], weight.shape[0])
