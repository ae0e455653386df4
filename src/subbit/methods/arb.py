"""ARB-LLM (arXiv 2410.03129): binarize as BiLLM does, then alternate between the shifts, the scales and the signs.

Where the paper leaves something open, the authors' code (github.com/ZHITENGLI/ARB-LLM) decided: that every set of
weights is solved on its own, and the order in which two signs and their scales take turns. The searches for the sets
are those of BiLLM here; docs/methods.md has the differences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, InverseFactor
from subbit.binary.groups import Grouping
from subbit.binary.nm import PruningScore, ScoreStatistics, Sparsity, score_statistics
from subbit.linears import GroupedBinaryLinear
from subbit.methods.blockwise import (
    BinaryBlock,
    Block,
    Metric,
    binarize_blockwise,
    binarize_searched,
    prune_block,
    refit_on_gram,
)
from subbit.methods.options import check_blocks

__all__ = ["ArbOptions", "arb"]


@dataclass(frozen=True)
class ArbOptions:
    """Every choice of ARB-LLM; docs/methods.md says where the defaults leave the paper."""

    block_size: int = 128  # columns that share scales
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    variant: Literal["rc", "x"] = "rc"  # row × column scales; or shifts and scales on the output error
    score: PruningScore = "sparsegpt"  # which weights of a group are kept, where there is an N:M
    prune_compensation: bool = True  # the kept weights of a block absorb its pruned ones, as in SparseGPT
    salient_columns: int = 30  # at most so many columns of a block are binarized twice; 0: none (49 in the code)
    split_salient: bool = True  # in two regions, as the others: the column-group bitmap
    grouping: Grouping = "bell"  # how the other columns are split by size
    candidates: int = 80  # thresholds tried
    iterations: int = 15  # alternations on the weight error
    output_iterations: int = 15  # x: alternations on the output error after them, with the signs fixed
    scales: Literal["alternate", "gram"] = "alternate"  # x: those alternations, or their joint solution at once
    compensation: Compensation = "exact"  # how later blocks absorb the error of a block; "diagonal" in the paper
    metric: Metric = "conditional"  # x: what output error means; "gram" in the paper

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_blocks(self, sparsity)
        if self.iterations < 0 or self.output_iterations < 0:
            raise ValueError("iterations and output_iterations must be at least 0")


def arb(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: ArbOptions
) -> GroupedBinaryLinear:
    """Compress one linear with ARB-LLM_RC or ARB-LLM_X.

    With every weight kept this is the method as published; with N:M its weights are pruned by SparseGPT first, and a
    pruned weight takes no part in any set.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
    """
    statistics = score_statistics(options.score, weight, gram, factor.upper)
    return binarize_blockwise(
        weight, gram, factor.upper, sparsity, options, lambda block: arb_block(block, statistics, sparsity, options)
    )


def arb_block(block: Block, statistics: ScoreStatistics, sparsity: Sparsity, options: ArbOptions) -> BinaryBlock:
    """One block: BiLLM's sets, then the alternations of the variant."""
    weight, keep = prune_block(block, statistics, sparsity, options.prune_compensation)
    start = binarize_searched(weight, keep, block.upper, options, split_salient=options.split_salient)
    if options.variant == "rc":
        return alternate_rows_and_columns(start, weight, options.iterations)
    result = alternate_on_weights(start, weight, options.iterations)
    if options.scales == "gram":
        return replace(result, scales=refit_on_gram(result, block.weight, block.metric))
    return alternate_on_output(result, weight, block.metric, options.output_iterations)


# ---- sets of weights -------------------------------------------------------------------------------------------------


@dataclass
class SignedSet:
    """Weights with their own numbers in every row: a region of the ordinary columns, or one of the salient columns.

    Such a weight becomes ``shift + Σ scale · sign``, with one sign (order 1) or, if salient, two (order 2).
    """

    columns: Tensor  # (c,) int64: where in the block its weights can stand
    mask: Tensor  # (rows, c) bool
    target: Tensor  # (rows, c) float32: the weights, zero outside the mask
    slots: list[int]  # the places of shift and scales among the numbers of a (row, block)
    shift: Tensor  # (rows,)
    scales: list[Tensor]  # (rows,) each
    signs: list[Tensor]  # (rows, c) float32 each: ±1, zero outside the mask

    @property
    def count(self) -> Tensor:
        """(rows,) float32: how many weights there are, at least 1."""
        return self.mask.sum(dim=1).clamp_min(1).float()

    def masked_signs(self, positive: Tensor) -> Tensor:
        """(rows, c) float32: ±1 within the mask."""
        return torch.where(self.mask, torch.where(positive, 1.0, -1.0), 0.0)

    def signed(self, leaving_out: int | None = None) -> Tensor:
        """(rows, c) float32: Σ scale · sign, without one of the terms."""
        total = torch.zeros_like(self.target)
        for i, (scale, sign) in enumerate(zip(self.scales, self.signs, strict=True)):
            if i != leaving_out:
                total += scale[:, None] * sign
        return total

    def choose_signs(self, left: Tensor, column_scales: Tensor | float = 1.0) -> None:
        """The signs that bring ``column_scales · Σ scale · sign`` nearest to ``left`` (rows, c).

        A single scale is never negative here, nor is a column scale.
        """
        if len(self.signs) == 1:
            self.signs = [self.masked_signs(left >= 0)]
            return
        first, second = self.scales
        values = torch.stack([-first - second, -first + second, first - second, first + second])[:, :, None]
        nearest = (left - values * column_scales).abs().argmin(dim=0)
        self.signs = [self.masked_signs(nearest >= 2), self.masked_signs(nearest % 2 == 1)]


def weight_sets(block: BinaryBlock, weight: Tensor) -> list[SignedSet]:
    """The sets of a block of ``weight`` (rows, k), with its numbers and signs."""
    sets = []
    for first in [*range(block.regions), *range(2 * block.regions, block.scales.shape[1], 3)]:
        ordinary = first < block.regions
        columns = (~block.salient if ordinary else block.salient).nonzero()[:, 0]
        symbol = block.symbol[:, columns]
        if ordinary:
            slots, region = [first, block.regions + first], symbol == first
        else:
            slots, region = [first, first + 1, first + 2], symbol >> 1 == (first - 2 * block.regions) // 3
        mask = block.keep[:, columns] & region
        target = torch.where(mask, weight[:, columns], 0.0)
        shift, *scales = (block.scales[:, slot] for slot in slots)
        part = SignedSet(columns, mask, target, slots, shift, scales, [])
        positive = [block.positive[:, columns], symbol & 1 == 1]
        part.signs = [part.masked_signs(p) for p in positive[: len(scales)]]
        sets.append(part)
    return sets


def with_sets(block: BinaryBlock, sets: list[SignedSet], column_scales: Tensor | None = None) -> BinaryBlock:
    """The block with the numbers and signs of its sets."""
    numbers = torch.zeros_like(block.scales)
    positive, symbol = torch.zeros_like(block.positive), block.symbol.clone()
    for part in sets:
        numbers[:, part.slots] = torch.stack([part.shift, *part.scales], dim=1)
        positive[:, part.columns] |= part.signs[0] > 0
        if len(part.signs) == 2:
            old = symbol[:, part.columns]
            residual = (part.signs[1] > 0).to(torch.uint8)
            symbol[:, part.columns] = torch.where(part.mask, (old & 2) + residual, old)
    return replace(block, positive=positive, symbol=symbol, scales=numbers, column_scales=column_scales)


# ---- ARB and ARB-X ---------------------------------------------------------------------------------------------------


def alternate_on_weights(block: BinaryBlock, weight: Tensor, iterations: int) -> BinaryBlock:
    """ARB (section 3.2, algorithm 1; for two signs as in the authors' code): shift, scales, signs, in turn.

    Each takes its best value for the squared error of ``weight`` (rows, k) with the others fixed, so that the error
    never increases.
    """
    sets = weight_sets(block, weight)
    for part in sets:
        count = part.count
        for _ in range(iterations):
            part.shift = (part.target - part.signed()).sum(dim=1) / count
            left = torch.where(part.mask, part.target - part.shift[:, None], 0.0)
            for i, sign in enumerate(part.signs):
                part.scales[i] = (sign * (left - part.signed(leaving_out=i))).sum(dim=1) / count
            part.choose_signs(left)
    return with_sets(block, sets)


def alternate_on_output(block: BinaryBlock, weight: Tensor, metric: Tensor, iterations: int) -> BinaryBlock:
    """ARB-X (section 3.3): μ = mᵀS(w⊙m − αv) / mᵀSm and α = vᵀS(w⊙m − μm) / vᵀSv in turn, v the signs in the mask m.

    With two signs the scales take turns. Every set is solved on its own, as in the authors' code: on the output error
    of its own weights, as if those of the other sets were exact. A row of a set keeps its numbers unless the new ones,
    as float16 holds them, are better; in exact arithmetic they always are before they are rounded.

    Args:
        weight: (rows, k) float32.
        metric: (k, k) float32, S.
    """
    sets = weight_sets(block, weight)
    for part in sets:
        inner = metric[part.columns][:, part.columns].double()
        basis = torch.stack([part.mask.float(), *part.signs], dim=1).double()
        weighted = basis @ inner
        system = weighted @ basis.transpose(1, 2)
        right = (weighted @ part.target.double()[:, :, None])[:, :, 0]
        start = torch.stack([part.shift, *part.scales], dim=1).double()
        solved = take_turns(system, right, start, iterations)
        better = form(system, right, solved.half().double()) < form(system, right, start)
        part.shift, *part.scales = torch.where(better[:, None], solved, start).float().unbind(dim=1)
    return with_sets(block, sets)


def take_turns(system: Tensor, right: Tensor, start: Tensor, iterations: int) -> Tensor:
    """(rows, p) float64: x after so many rounds of minimizing xᵀGx − 2xᵀr over one x_i after the other.

    Args:
        system: (rows, p, p) float64, G.
        right: (rows, p) float64, r.
        start: (rows, p) float64, the first x. Where G_ii is zero, x_i stays what it is.
    """
    x = start.clone()
    diagonal = system.diagonal(dim1=1, dim2=2)
    for _ in range(iterations):
        for i in range(x.shape[1]):
            others = (system[:, i] * x).sum(dim=1) - diagonal[:, i] * x[:, i]
            x[:, i] = torch.where(diagonal[:, i] > 0, (right[:, i] - others) / diagonal[:, i], x[:, i])
    return x


def form(system: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """(rows,) xᵀGx − 2xᵀr: the squared error that the numbers x (rows, p) leave, a constant apart."""
    return ((system @ x[:, :, None])[:, :, 0] * x).sum(dim=1) - 2 * (right * x).sum(dim=1)


# ---- ARB-RC ----------------------------------------------------------------------------------------------------------


def alternate_rows_and_columns(block: BinaryBlock, weight: Tensor, iterations: int) -> BinaryBlock:
    """ARB-RC (section 3.4): ŵ_ij = c_j · Σ α_i · sign, no shifts; α, c and, if there are two, the signs in turn.

    α_i = Σ_j c_j b_ij w_ij / Σ_j c_j² and c_j = Σ_i α_i b_ij w_ij / Σ_i α_i² (for two signs, of what the other one
    leaves). A column has one scale for all of its sets and for both of its signs, so that a kernel can multiply the
    inputs by it; the authors' code has one for each. The α keep their regions.

    Each takes its best value for the squared error of ``weight`` (rows, k) with the others fixed, so that the error
    never increases.
    """
    sets = weight_sets(block, weight)
    column_scales = start_rows_and_columns(sets, weight)
    for _ in range(iterations):
        above, below = torch.zeros_like(column_scales), torch.zeros_like(column_scales)
        for part in sets:
            solve_rows(part, column_scales[part.columns])
            value = part.signed()
            above[part.columns] += (value * part.target).sum(dim=0)
            below[part.columns] += value.square().sum(dim=0)
        column_scales = torch.where(below > 0, above / below, column_scales)
        for part in sets:
            if len(part.signs) == 2:  # a single sign is that of the weight
                part.choose_signs(part.target, column_scales[part.columns])
    mean = float(column_scales.mean())
    if mean > 0:  # a factor that rows and columns may share as they like: float16 suits numbers around 1
        column_scales = column_scales / mean
        for part in sets:
            part.scales = [scale * mean for scale in part.scales]
    return with_sets(block, sets, column_scales)


def start_rows_and_columns(sets: list[SignedSet], weight: Tensor) -> Tensor:
    """Row scales mean|w|, then column scales (k,) mean|w|/α, then the same rows for what is left to a second sign."""
    above, below = torch.zeros_like(weight[0]), torch.zeros_like(weight[0])
    for part in sets:
        part.shift = torch.zeros_like(part.shift)
        part.signs[0] = part.masked_signs(part.target >= 0)
        part.scales[0] = part.target.abs().sum(dim=1) / part.count
        inverse = torch.where(part.scales[0] > 0, 1 / part.scales[0], 0.0)[:, None]
        above[part.columns] += (part.target.abs() * inverse).sum(dim=0)
        below[part.columns] += (part.mask & (inverse > 0)).sum(dim=0)
    column_scales = torch.where(below > 0, above / below, 1.0)
    for part in sets:
        if len(part.signs) == 2:
            left = part.target - column_scales[part.columns] * part.signed(leaving_out=1)
            part.signs[1] = part.masked_signs(left >= 0)
            part.scales[1] = left.abs().sum(dim=1) / part.count
    return column_scales


def solve_rows(part: SignedSet, column_scales: Tensor) -> None:
    """The row scales, one after the other, with the least squared error for the given column scales (c,)."""
    below = part.mask.float() @ column_scales.square()
    for i, sign in enumerate(part.signs):
        left = part.target - column_scales * part.signed(leaving_out=i)
        above = (sign * left) @ column_scales
        part.scales[i] = torch.where(below > 0, above / below, part.scales[i])
