"""The loop that BiLLM, ARB-LLM, STBLLM and PBS²P share: binarize a block of columns, compensate, next block.

A method is what happens inside one block; it gets a :class:`Block` and returns a :class:`BinaryBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, compensate, prune_sequentially
from subbit.binary.groups import (
    REGIONS,
    Grouping,
    assign_regions,
    rank_columns,
    search_salient_count,
    search_split,
)
from subbit.binary.nm import ScoreStatistics, Sparsity, keep_top
from subbit.binary.residual import binarize, binarize_residual
from subbit.binary.scales import quadratic_error, solve_on_gram
from subbit.linears import GroupedBinaryLinear, level_index, levels, scale_count

__all__ = [
    "BinaryBlock",
    "Block",
    "BlockOptions",
    "Metric",
    "PrunedBlockOptions",
    "binarize_block",
    "binarize_blockwise",
    "binarize_searched",
    "prune_and_binarize",
    "prune_block",
    "refit_on_gram",
]

Metric = Literal["gram", "conditional"]


class BlockOptions(Protocol):
    """The options that every method of this family has."""

    @property
    def block_size(self) -> int: ...

    @property
    def salient_columns(self) -> int: ...

    @property
    def compensation(self) -> Compensation: ...

    @property
    def metric(self) -> Metric: ...


class SplitOptions(BlockOptions, Protocol):
    """With salient columns and regions found as BiLLM does."""

    @property
    def grouping(self) -> Grouping: ...

    @property
    def candidates(self) -> int: ...


class PrunedBlockOptions(SplitOptions, Protocol):
    """The options of BiLLM and STBLLM."""

    @property
    def prune_compensation(self) -> bool: ...

    @property
    def residual_order(self) -> int: ...

    @property
    def search_on(self) -> Literal["weights", "saliency"]: ...

    @property
    def scales(self) -> Literal["weights", "gram"]: ...


@dataclass(frozen=True)
class Block:
    """What a method sees of one block of columns."""

    weight: Tensor  # (rows, k) float32, current: what earlier blocks lost has been added
    columns: slice  # where the block stands
    upper: Tensor  # (k, k) float32, its block of U
    metric: Tensor  # (k, k) float32, S: the output error of a weight error e is e S eᵀ


@dataclass(frozen=True)
class BinaryBlock:
    """A binarized block, in the terms of :class:`subbit.linears.GroupedBinaryLinear`."""

    keep: Tensor  # (rows, k) bool
    positive: Tensor  # (rows, k) bool
    symbol: Tensor  # (rows, k) uint8
    salient: Tensor  # (k,) bool
    regions: int
    scales: Tensor  # (rows, scale_count): float32 while it is being solved, float16 at the end
    column_scales: Tensor | None = None  # (k,), as the scales
    residual_order: int = 2  # 1: the residual scales are zero

    @property
    def salient_regions(self) -> int:
        """Regions of the salient columns: 1 or 2."""
        return max(1, (self.scales.shape[1] - 2 * self.regions) // 3)

    def dense(self) -> Tensor:
        """(rows, k) float32."""
        values = levels(self.scales, self.regions)
        index = level_index(self.positive, self.symbol, self.salient, self.regions)
        dense = torch.where(self.keep, values.gather(1, index), 0.0)
        return dense if self.column_scales is None else dense * self.column_scales.float()

    def basis(self) -> Tensor:
        """(rows, scale_count, k) float32: without column scales the dense block is ``scales @ basis``, row by row."""
        sign = torch.where(self.positive, 1.0, -1.0)
        region = [self.keep & ~self.salient & (self.symbol == r) for r in range(self.regions)]
        rows = [mask.float() for mask in region] + [torch.where(mask, sign, 0.0) for mask in region]
        residual = torch.where(self.symbol & 1 == 1, 1.0, -1.0) * (self.residual_order - 1)
        for first in range(2 * self.regions, self.scales.shape[1], 3):
            mask = self.keep & self.salient & (self.symbol >> 1 == (first - 2 * self.regions) // 3)
            rows += [mask.float(), torch.where(mask, sign, 0.0), torch.where(mask, residual, 0.0)]
        return torch.stack(rows, dim=1)


def prune_block(
    block: Block, statistics: ScoreStatistics, sparsity: Sparsity, compensated: bool
) -> tuple[Tensor, Tensor]:
    """Prune N:M by score.

    Args:
        compensated: the kept weights of the block absorb its pruned ones, as in SparseGPT.

    Returns:
        The weights (rows, k) float32, zero where pruned, and the keep-mask (rows, k) bool.
    """
    keep = keep_top(statistics.score(block.weight, block.columns), sparsity.n, sparsity.m)
    if sparsity.dense:
        return block.weight, keep
    if compensated:
        return prune_sequentially(block.weight, keep, block.upper), keep
    return torch.where(keep, block.weight, 0.0), keep


def binarize_searched(
    weight: Tensor,
    keep: Tensor,
    upper: Tensor,
    options: SplitOptions,
    search: Tensor | None = None,
    split_salient: bool = False,
    order: int = 2,
) -> BinaryBlock:
    """BiLLM (arXiv 2402.04291, sections 3.2 and 3.3) on the kept weights: find salient columns and regions, binarize.

    Args:
        weight: (rows, k) float32.
        keep: (rows, k) bool.
        upper: (k, k), the block of U.
        search: (rows, k), the matrix that the thresholds are on; None: the weights.
        split_salient: split the salient columns by size as well (ARB-LLM's column-group bitmap).
        order: how often the salient columns are binarized.
    """
    search = weight if search is None else search
    ranking = rank_columns(weight, upper.diagonal())
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranking[: search_salient_count(weight, keep, ranking, options.salient_columns, order)]] = True
    thresholds = search_split(search, keep & ~salient, options.grouping, options.candidates)
    region = assign_regions(search, thresholds)
    if split_salient:
        inner = search_split(search, keep & salient, "bell", options.candidates)
        region = torch.where(salient, assign_regions(search, inner), region)
    return binarize_block(weight, keep, salient, region, REGIONS[options.grouping], 2 if split_salient else 1, order)


def binarize_block(
    weight: Tensor,
    keep: Tensor,
    salient: Tensor,
    region: Tensor,
    regions: int,
    salient_regions: int = 1,
    order: int = 2,
) -> BinaryBlock:
    """Binarize a block on its weights: every region of the salient columns twice, every region of the rest once.

    Args:
        weight: (rows, k) float32.
        keep: (rows, k) bool.
        salient: (k,) bool.
        region: (rows, k) uint8, below ``regions``; in the salient columns it counts only if they have two regions.
        order: 1: the salient columns once as well.
    """
    shifts, scales, triples = [], [], []
    positive = torch.zeros_like(keep)
    symbol = region
    for r in range(regions):
        part = binarize(weight, keep & ~salient & (region == r))
        positive |= part.positive
        shifts.append(part.shift)
        scales.append(part.scale)
    for r in range(salient_regions):
        mask = salient if salient_regions == 1 else salient & (region == r)
        twice = binarize_residual(weight, keep & mask, order)
        triples += [twice.shift, twice.scale, twice.residual_scale]
        positive |= twice.positive
        symbol = torch.where(mask, 2 * r + twice.residual_positive.to(torch.uint8), symbol)
    numbers = torch.stack(shifts + scales + triples, dim=1)
    return BinaryBlock(keep, positive, torch.where(keep, symbol, 0), salient, regions, numbers, residual_order=order)


def prune_and_binarize(
    block: Block, statistics: ScoreStatistics, sparsity: Sparsity, options: PrunedBlockOptions
) -> BinaryBlock:
    """The block of BiLLM and STBLLM: prune N:M, find salient columns and regions, binarize.

    The two differ in their score and in the number of regions (STBLLM, algorithm 1). A pruned weight takes no part in
    the binarization and is zero afterwards.
    """
    weight, keep = prune_block(block, statistics, sparsity, options.prune_compensation)
    search = None if options.search_on == "weights" else (weight / block.upper.diagonal()).square()
    result = binarize_searched(weight, keep, block.upper, options, search, order=options.residual_order)
    if options.scales == "gram":
        result = replace(result, scales=refit_on_gram(result, block.weight, block.metric))
    return result


def refit_on_gram(block: BinaryBlock, target: Tensor, metric: Tensor) -> Tensor:
    """Scales (rows, scale_count) with the least output error against ``target`` (rows, k).

    A row keeps its scales unless the new ones, as float16 holds them, are better; float64 decides, since on a metric
    of few tokens float32 noise can pass for a gain.
    """
    basis = block.basis()
    solved = solve_on_gram(basis, target, metric)
    rounded = (solved.half().float()[:, None, :] @ basis)[:, 0]
    before = quadratic_error((target - block.dense()).double(), metric.double())
    after = quadratic_error((target - rounded).double(), metric.double())
    return torch.where((after < before)[:, None], solved, block.scales)


def binarize_blockwise(
    weight: Tensor,
    gram: Tensor,
    upper: Tensor,
    sparsity: Sparsity,
    options: BlockOptions,
    binarize: Callable[[Block], BinaryBlock],
) -> GroupedBinaryLinear:
    """Run a method over all blocks of a linear, left to right.

    Args:
        weight: (out, in) float32, not changed.
        gram: (in, in) float32, H.
        upper: (in, in) float32, U with UᵀU = (damped H)⁻¹.
        binarize: the method.
    """
    weight = weight.clone()
    done: list[BinaryBlock] = []
    for start in range(0, weight.shape[1], options.block_size):
        columns = slice(start, min(start + options.block_size, weight.shape[1]))
        corner = upper[columns, columns]
        block = Block(weight[:, columns].clone(), columns, corner, block_metric(gram, corner, columns, options.metric))
        result = store_scales(binarize(block), options.salient_columns > 0)
        done.append(result)
        compensate(weight, block.weight - result.dense(), upper, start, options.compensation)
    column_scales = [b.column_scales for b in done if b.column_scales is not None]
    return GroupedBinaryLinear(
        sparsity,
        options.block_size,
        done[0].regions,
        keep=torch.cat([b.keep for b in done], dim=1),
        positive=torch.cat([b.positive for b in done], dim=1),
        symbol=torch.cat([b.symbol for b in done], dim=1),
        salient=torch.cat([b.salient for b in done]),
        scales=torch.stack([b.scales for b in done], dim=1),
        column_scales=torch.cat(column_scales) if column_scales else None,
    )


def store_scales(block: BinaryBlock, has_salient: bool) -> BinaryBlock:
    """The block with float16 numbers, those of salient columns only if the linear has any."""
    count = scale_count(block.regions, has_salient, block.salient_regions)
    column_scales = None if block.column_scales is None else block.column_scales.half()
    return replace(block, scales=block.scales[:, :count].half(), column_scales=column_scales)


def block_metric(gram: Tensor, corner: Tensor, columns: slice, metric: Metric) -> Tensor:
    """S (k, k) float32, what a block calls output error.

    Its slice of H (``gram``, the papers), or its Schur complement (U_bbᵀU_bb)⁻¹ (``conditional``), which knows that
    later columns will compensate.
    """
    if metric == "gram":
        return gram[columns, columns]
    identity = torch.eye(len(corner), device=corner.device)
    inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
    return inverse @ inverse.T
