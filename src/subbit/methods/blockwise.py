"""The loop that BiLLM, ARB-LLM, STBLLM and PBS²P share: binarize a block of columns, compensate, next block.

A method is what happens inside one block; it gets a :class:`Block` and returns a :class:`BinaryBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, compensate
from subbit.binary.groups import REGIONS, Grouping, assign_regions
from subbit.binary.nm import Sparsity
from subbit.binary.residual import binarize, binarize_residual
from subbit.binary.scales import quadratic_error, solve_on_gram
from subbit.linears import GroupedBinaryLinear, level_index, levels, scale_count

__all__ = ["BinaryBlock", "Block", "BlockOptions", "Metric", "binarize_block", "binarize_blockwise", "refit_on_gram"]

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

    def dense(self) -> Tensor:
        """(rows, k) float32."""
        values = levels(self.scales, self.regions)
        index = level_index(self.positive, self.symbol, self.salient, self.regions)
        return torch.where(self.keep, values.gather(1, index), 0.0)

    def basis(self) -> Tensor:
        """(rows, scale_count, k) float32: the dense block is ``scales @ basis``, row by row."""
        sign = torch.where(self.positive, 1.0, -1.0)
        region = [self.keep & ~self.salient & (self.symbol == r) for r in range(self.regions)]
        rows = [mask.float() for mask in region] + [torch.where(mask, sign, 0.0) for mask in region]
        if self.scales.shape[1] > 2 * self.regions:
            mask = self.keep & self.salient
            rows += [mask.float(), torch.where(mask, sign, 0.0)]
            rows += [torch.where(mask, torch.where(self.symbol == 1, 1.0, -1.0), 0.0)]
        return torch.stack(rows, dim=1)


def binarize_block(
    weight: Tensor, keep: Tensor, salient: Tensor, search: Tensor, thresholds: tuple[float, ...], grouping: Grouping
) -> BinaryBlock:
    """Binarize a block on its weights: salient columns twice, every region of the rest once.

    Args:
        weight: (rows, k) float32.
        keep: (rows, k) bool.
        salient: (k,) bool.
        search: (rows, k), the matrix that the thresholds are on (the weights, or their saliency).
        thresholds: from :func:`subbit.binary.groups.search_split`.
    """
    regions = REGIONS[grouping]
    symbol = assign_regions(search, thresholds)
    shifts, scales = [], []
    positive = torch.zeros_like(keep)
    for region in range(regions):
        part = binarize(weight, keep & ~salient & (symbol == region))
        positive |= part.positive
        shifts.append(part.shift)
        scales.append(part.scale)
    columns = shifts + scales
    twice = binarize_residual(weight, keep & salient)
    columns += [twice.shift, twice.scale, twice.residual_scale]
    positive |= twice.positive
    symbol = torch.where(salient, twice.residual_positive.to(torch.uint8), symbol)
    return BinaryBlock(keep, positive, torch.where(keep, symbol, 0), salient, regions, torch.stack(columns, dim=1))


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
        result = binarize(block)
        kept_scales = result.scales[:, : scale_count(result.regions, options.salient_columns > 0)].half()
        result = BinaryBlock(result.keep, result.positive, result.symbol, result.salient, result.regions, kept_scales)
        done.append(result)
        compensate(weight, block.weight - result.dense(), upper, start, options.compensation)
    return GroupedBinaryLinear(
        sparsity,
        options.block_size,
        done[0].regions,
        keep=torch.cat([b.keep for b in done], dim=1),
        positive=torch.cat([b.positive for b in done], dim=1),
        symbol=torch.cat([b.symbol for b in done], dim=1),
        salient=torch.cat([b.salient for b in done]),
        scales=torch.stack([b.scales for b in done], dim=1),
    )


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
