"""STBLLM (arXiv 2408.01803): structured binarization with N:M sparsity, residual columns and three regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, InverseFactor, prune_sequentially
from subbit.binary.groups import Grouping, rank_columns, search_salient_count, search_split
from subbit.binary.nm import PruningScore, ScoreStatistics, Sparsity, keep_top, score_statistics
from subbit.linears import GroupedBinaryLinear
from subbit.methods.blockwise import BinaryBlock, Block, Metric, binarize_block, binarize_blockwise, refit_on_gram

__all__ = ["StbllmOptions", "stbllm"]


@dataclass(frozen=True)
class StbllmOptions:
    """Every choice of STBLLM; docs/methods.md says where the defaults leave the paper, and by how much that helps."""

    block_size: int = 128  # columns that share scales
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    score: PruningScore = "si"  # which weights of a group are kept
    activation_exponent: float = 1.0  # of ‖x_j‖ in si and ria: 1 in the paper, 0.5 in the authors' code
    standardize: bool = True  # si: (x − mean) / std over the linear, as the paper writes
    prune_compensation: bool = True  # the kept weights of a block absorb its pruned ones, as in SparseGPT
    salient_columns: int = 30  # at most so many columns of a block are binarized twice; 0: none (49 in the code)
    grouping: Grouping = "trisection"  # how the other columns are split by size
    candidates: int = 160  # thresholds tried
    search_on: Literal["weights", "saliency"] = "weights"  # what the thresholds are on; the code has w²/U² here
    scales: Literal["weights", "gram"] = "weights"  # least squares on the weights, or on the output
    compensation: Compensation = "exact"  # how later blocks absorb the error of a block; "diagonal" in the paper
    metric: Metric = "conditional"  # what "output" means with scales: gram


def stbllm(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: StbllmOptions
) -> GroupedBinaryLinear:
    """Compress one linear with STBLLM.

    Unlike the authors' code, a pruned weight takes no part in the binarization and is zero afterwards.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
    """
    statistics = score_statistics(
        options.score, weight, gram, factor.upper, options.activation_exponent, options.standardize
    )
    return binarize_blockwise(
        weight, gram, factor.upper, sparsity, options, lambda block: stbllm_block(block, statistics, sparsity, options)
    )


def stbllm_block(block: Block, statistics: ScoreStatistics, sparsity: Sparsity, options: StbllmOptions) -> BinaryBlock:
    """Algorithm 1 of the paper for one block: prune N:M, salient columns, trisection search, binarize."""
    keep = keep_top(statistics.score(block.weight, block.columns), sparsity.n, sparsity.m)
    if options.prune_compensation:
        weight = prune_sequentially(block.weight, keep, block.upper)
    else:
        weight = torch.where(keep, block.weight, 0.0)
    diagonal = block.upper.diagonal()
    ranking = rank_columns(weight, diagonal)
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranking[: search_salient_count(weight, keep, ranking, options.salient_columns)]] = True
    search = weight if options.search_on == "weights" else (weight / diagonal).square()
    thresholds = search_split(search, keep & ~salient, options.grouping, options.candidates)
    result = binarize_block(weight, keep, salient, search, thresholds, options.grouping)
    if options.scales == "gram":
        solved = refit_on_gram(result, block.weight, block.metric)
        result = BinaryBlock(keep, result.positive, result.symbol, salient, result.regions, solved)
    return result
