"""PBS²P (arXiv 2502.01705): prune step by step while the binary scales are solved again on the output error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, InverseFactor
from subbit.binary.groups import Grouping
from subbit.binary.nm import PruningScore, ScoreStatistics, Sparsity, keep_top, score_statistics
from subbit.linears import GroupedBinaryLinear
from subbit.methods.blockwise import BinaryBlock, Block, Metric, binarize_blockwise, binarize_searched, refit_on_gram
from subbit.methods.options import check_blocks

__all__ = ["Pbs2pOptions", "pbs2p"]


@dataclass(frozen=True)
class Pbs2pOptions:
    """Every choice of PBS²P; docs/methods.md says where the defaults leave the paper, and by how much that helps."""

    block_size: int = 128  # columns that share scales
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    score: PruningScore = "obs"  # the fine search: w² / [H⁻¹]_jj
    steps: int = 0  # pruning steps; 0: M − N, one weight of every group a step; 1: all at once
    rescore: bool = True  # score a weight before every step by what dropping it would add to the output error now
    salient_columns: int = 30  # at most so many columns of a block are binarized twice; 0: none
    residual_order: Literal[1, 2] = 2  # 1: once, but apart from the others
    grouping: Grouping = "bell"  # how the other columns are split by size
    candidates: int = 80  # thresholds tried
    compensation: Compensation = "exact"  # how later blocks absorb the error of a block; "diagonal" in the paper
    metric: Metric = "conditional"  # whose output error the scales minimize; "gram" in the paper

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_blocks(self, sparsity)


def pbs2p(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: Pbs2pOptions
) -> GroupedBinaryLinear:
    """Compress one linear with PBS²P.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
    """
    statistics = score_statistics(options.score, weight, gram, factor.upper)
    return binarize_blockwise(
        weight, gram, factor.upper, sparsity, options, lambda block: spbo(block, statistics, sparsity, options)
    )


def spbo(block: Block, statistics: ScoreStatistics, sparsity: Sparsity, options: Pbs2pOptions) -> BinaryBlock:
    """Stepwise pruning with binarization optimization (algorithm 1 of the paper) for one block.

    Starts from the dense binarization of BiLLM. The error is always that against the unmasked weights, so that the
    solved scales absorb what the pruned weights did. All shifts and scales of a row are solved jointly: the fixed point
    of the paper's τ alternations, reached at once. Without ``rescore`` the number of steps changes nothing, since the
    order of the scores, and with it the last mask and the last solution, stay the same.
    """
    result = dense_start(block, options)
    score = statistics.score(block.weight, block.columns)
    for kept in pruning_schedule(sparsity, options.steps):
        if options.rescore:
            score = dropping_cost(result, block)
        score = torch.where(result.keep, score, -torch.inf)
        keep = keep_top(score, kept, sparsity.m)
        symbol = torch.where(keep, result.symbol, 0)
        result = replace(result, keep=keep, positive=result.positive & keep, symbol=symbol)
        result = replace(result, scales=refit_on_gram(result, block.weight, block.metric))
    return result


def pruning_schedule(sparsity: Sparsity, steps: int) -> list[int]:
    """Kept weights of a group after every step, falling from M to N: ``[7, 6, 5, 4]`` for 4:8 and four steps."""
    removals = sparsity.m - sparsity.n
    if removals == 0:
        return [sparsity.n]
    steps = min(steps or removals, removals)
    return [sparsity.m - round(removals * step / steps) for step in range(1, steps + 1)]


def dense_start(block: Block, options: Pbs2pOptions) -> BinaryBlock:
    """BiLLM's binarization of the unpruned block: salient columns twice, the rest in regions."""
    everything = torch.ones_like(block.weight, dtype=torch.bool)
    return binarize_searched(block.weight, everything, block.upper, options, order=options.residual_order)


def dropping_cost(result: BinaryBlock, block: Block) -> Tensor:
    """(rows, k): what the output error would gain if one kept weight became zero, all else fixed."""
    value = result.dense()
    slope = (block.weight - value) @ block.metric
    return value.square() * block.metric.diagonal() + 2 * value * slope
