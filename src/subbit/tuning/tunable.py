"""Compressed linears that can be trained, and become compressed linears again.

Scales are trained by their logarithm or relative to their own size, so that one learning rate suits every layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from subbit.binary.nm import Sparsity, keep_top
from subbit.linears import (
    CodesLinear,
    CompressedLinear,
    GroupedBinaryLinear,
    grouped_weight,
    level_index,
    levels,
    scale_slots,
)
from subbit.runtime import native
from subbit.tuning.precision import product_dtype

__all__ = ["Tunable", "TunableCodes", "TunableGroupedBinary", "latent_signs", "make_tunable", "separate"]

BOUNDARY = 0.5  # between pruned and kept latents at the start, in units of the scales
MARGIN = 0.005  # between the two; a wide one keeps signs and positions from moving (docs/log.md)
SETTLED = 0.01  # from the edge, at least, are latents that a tuning begins with which another has ended with
LARGEST_LATENT = 2.0  # at the start: outliers must stay within reach of the optimizer


class Tunable(nn.Module, ABC):
    """Stands where a compressed linear stands while it is tuned."""

    bias: nn.Parameter | None

    @abstractmethod
    def scale_parameters(self) -> list[nn.Parameter]:
        """What the learning rate of the scales is for."""

    @abstractmethod
    def latent_parameters(self) -> list[nn.Parameter]:
        """What the learning rate of the latents is for: nothing where signs and masks are fixed."""

    @abstractmethod
    def linear(self) -> CompressedLinear:
        """What it is now, with its scales as float16 holds them."""


def make_tunable(linear: CompressedLinear, weight: Tensor, bias: nn.Parameter | None) -> Tunable:
    """The trainable form of a compressed linear; TypeError for a type that has none.

    Args:
        weight: (out, in) float32, the weights before compression; they say which codewords lie near.
    """
    if isinstance(linear, CodesLinear):
        return TunableCodes(linear, weight, bias)
    if isinstance(linear, GroupedBinaryLinear):
        return TunableGroupedBinary(linear, bias)
    raise TypeError(f"{type(linear).__name__} cannot be tuned")


# ---- codes -----------------------------------------------------------------------------------------------------------


class TunableCodes(Tunable):
    """Latent weights u, rounded to codewords in every forward pass: ŵ = r·c·z(u)."""

    def __init__(self, linear: CodesLinear, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.sparsity = linear.sparsity
        self.has_columns = linear.column_scales is not None
        row = linear.row_scales.float()
        column = torch.ones_like(weight[0]) if linear.column_scales is None else linear.column_scales.float()
        self.row: Tensor
        self.column: Tensor
        self.register_buffer("row", row)
        self.register_buffer("column", column)
        self.log_row = nn.Parameter(torch.zeros_like(row))
        self.log_column = nn.Parameter(torch.zeros_like(column), requires_grad=self.has_columns)
        self.latent = nn.Parameter(start_latent(linear, weight))
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        row, column = self.scales()
        dtype = product_dtype(inputs)
        given = column if self.has_columns else None
        output: Tensor = _CodesProduct.apply(inputs, self.latent, row, given, self.sparsity, dtype)
        return output if self.bias is None else output + self.bias

    def scales(self) -> tuple[Tensor, Tensor]:
        """(out,) and (in,) float32: r and c as they are now."""
        return self.row * self.log_row.exp(), self.column * self.log_column.exp()

    def scale_parameters(self) -> list[nn.Parameter]:
        """r and, where the linear has them, c."""
        return [self.log_row, self.log_column] if self.has_columns else [self.log_row]

    def latent_parameters(self) -> list[nn.Parameter]:
        """u."""
        return [self.latent]

    @torch.no_grad()
    def linear(self) -> CodesLinear:
        """With the codewords that the latents are rounded to."""
        signs = latent_signs(self.latent, self.sparsity)
        row, column = self.scales()
        return CodesLinear(self.sparsity, signs, row.half(), column.half() if self.has_columns else None)


def start_latent(linear: CodesLinear, weight: Tensor) -> Tensor:
    """(out, in) float32: W/(r·c), moved only as far as it must to be rounded to the codewords that were chosen."""
    scale = linear.size()
    relative = weight / torch.where(scale.abs() < 1e-12, 1.0, scale)
    kept = linear.signs * (relative * linear.signs).clamp(BOUNDARY + MARGIN, LARGEST_LATENT)
    return torch.where(linear.signs != 0, kept, relative.clamp(MARGIN - BOUNDARY, BOUNDARY - MARGIN))


def separate(latent: Tensor, sparsity: Sparsity, margin: float = SETTLED) -> Tensor:
    """(out, in) float32: the same codewords, kept and pruned latents of a group at least ``margin`` from their middle.

    Training leaves many latents right at the edge, where they went to and fro; there any step flips them.
    """
    grouped = latent.unflatten(1, (-1, sparsity.m))
    size = grouped.abs()
    keep = keep_top(size.flatten(1), sparsity.n, sparsity.m).view_as(size)
    middle = 0.5 * (size.where(keep, torch.inf).amin(-1, True) + size.where(~keep, -torch.inf).amax(-1, True))
    middle = middle.clamp_min(margin)  # below it there is room for pruned latents
    apart = torch.where(keep, size.maximum(middle + margin), size.minimum(middle - margin))
    return torch.where(grouped < 0, -apart, apart).flatten(1)


def latent_signs(latent: Tensor, sparsity: Sparsity, dtype: torch.dtype = torch.int8) -> Tensor:
    """(out, in) in {−1, 0, +1}: the signs of the N largest |latent| of a group, ties as in :func:`keep_top`.

    Args:
        dtype: int8 or bfloat16.
    """
    fits = latent.is_cpu and latent.dtype == torch.float32 and sparsity.m in (4, 8, 16)
    if fits and native.reason_missing() is None:
        return native.round_latents(latent, sparsity.n, sparsity.m, dtype)
    if not latent.is_cpu:
        return round_all_pairs(latent, sparsity, dtype)
    grouped = latent.reshape(-1, sparsity.m).T.contiguous()  # whole vectors of groups
    size = grouped.abs()
    before = torch.zeros(size.shape, dtype=torch.int8, device=latent.device)
    for i in range(sparsity.m):
        for j in range(i + 1, sparsity.m):
            first = size[i] >= size[j]
            before[j] += first
            before[i] += ~first
    signs = torch.where(grouped < 0, -1, 1).to(torch.int8) * (before < sparsity.n)
    return signs.T.reshape(latent.shape).to(dtype)


def round_all_pairs(latent: Tensor, sparsity: Sparsity, dtype: torch.dtype) -> Tensor:
    """:func:`latent_signs` in a few operations, M times as large: on a GPU every one of them costs a launch."""
    size = latent.abs().float().reshape(-1, sparsity.m)
    # The bits of floats that are not negative are in the order of the floats; the column decides between equal ones.
    key = size.view(torch.int32).long() * sparsity.m - torch.arange(sparsity.m, device=latent.device)
    before = (key[:, None, :] > key[:, :, None]).sum(dim=2, dtype=torch.int8)
    kept = (before < sparsity.n).view(latent.shape)
    return torch.where(latent < 0, -1.0, 1.0).mul_(kept).to(dtype)


class _CodesProduct(torch.autograd.Function):
    """y = x Ŵᵀ; the gradient of the latents passes straight through the rounding.

    Products are with the signs alone, which bfloat16 holds exactly; scales are applied to activations. Outputs have the
    dtype of the products, as those of a dense linear under autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latent: Tensor, row: Tensor, column: Tensor | None, sparsity: Sparsity, dtype: torch.dtype
    ) -> Tensor:
        signs = latent_signs(latent, sparsity, dtype if dtype == torch.bfloat16 else torch.int8)  # kept for backward
        scaled = (x if column is None else x * column).to(dtype)
        output = (scaled @ signs.to(dtype).T).mul_(row.to(dtype))
        ctx.save_for_backward(x if column is not None else None, scaled, signs, output, row, column)
        ctx.dtypes = x.dtype, dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scaled, signs, output, row, column = ctx.saved_tensors
        given, dtype = ctx.dtypes
        slope = grads[0] * row.to(dtype)
        dx, dlatent, dcolumn = slope @ signs.to(dtype), None, None
        if ctx.needs_input_grad[1]:
            dlatent = (slope.flatten(0, -2).T @ scaled.flatten(0, -2)).to(torch.float32)
        drow = (grads[0] * output).flatten(0, -2).sum(dim=0, dtype=torch.float32)
        drow = torch.where(row == 0, 0.0, drow / row)
        if column is not None:
            dcolumn = (x * dx).flatten(0, -2).sum(dim=0)
            dx = dx * column
        return dx.to(given), dlatent, drow, dcolumn, None, None


# ---- regions, shifts and residual columns ----------------------------------------------------------------------------


class TunableGroupedBinary(Tunable):
    """Shifts and scales of BiLLM, ARB-LLM, STBLLM and PBS²P; masks, signs, regions and column scales stay."""

    def __init__(self, linear: GroupedBinaryLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.fixed = linear
        values = linear.scales.float()
        self.start: Tensor
        self.unit: Tensor
        self.keep: Tensor
        self.index: Tensor
        self.register_buffer("start", values)
        unit = values.abs().mean(dim=-1, keepdim=True).expand_as(values).clone()
        if linear.column_scales is not None:  # such a linear has no shifts, and its format no room for them
            shifts = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
            shifts[scale_slots(linear.regions, values.shape[-1])] = False
            unit[..., shifts] = 0.0
        self.register_buffer("unit", unit)
        self.register_buffer("keep", linear.keep)
        index = level_index(linear.positive, linear.symbol, linear.salient, linear.regions)
        self.register_buffer("index", index.to(torch.int32))
        self.change = nn.Parameter(torch.zeros_like(values))
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        table = levels(self.start + self.unit * self.change, self.fixed.regions)
        weight = grouped_weight(table, self.index, self.keep, self.fixed.block_size, self.fixed.column_scales)
        return nn.functional.linear(inputs, weight, self.bias)

    def scale_parameters(self) -> list[nn.Parameter]:
        """All of them, in units of the mean size in their (row, block)."""
        return [self.change]

    def latent_parameters(self) -> list[nn.Parameter]:
        """None: signs and masks stay."""
        return []

    @torch.no_grad()
    def linear(self) -> GroupedBinaryLinear:
        """The same pattern with the tuned scales."""
        return replace(self.fixed, scales=(self.start + self.unit * self.change).half())
