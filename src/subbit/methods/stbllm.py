"""STBLLM (arXiv 2408.01803): structured binarization with N:M sparsity, residual columns and three regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from subbit.binary.compensate import Compensation, InverseFactor
from subbit.binary.groups import Grouping
from subbit.binary.nm import PruningScore, Sparsity, score_statistics
from subbit.linears import GroupedBinaryLinear
from subbit.methods.blockwise import Metric, binarize_blockwise, prune_and_binarize
from subbit.methods.options import check_blocks

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
    residual_order: Literal[1, 2] = 2  # 1: once, but apart from the others
    grouping: Grouping = "trisection"  # how the other columns are split by size
    candidates: int = 160  # thresholds tried
    search_on: Literal["weights", "saliency"] = "weights"  # what the thresholds are on; the code has w²/U² here
    scales: Literal["weights", "gram"] = "weights"  # least squares on the weights, or on the output
    compensation: Compensation = "exact"  # how later blocks absorb the error of a block; "diagonal" in the paper
    metric: Metric = "conditional"  # what "output" means with scales: gram

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_blocks(self, sparsity)


def stbllm(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: StbllmOptions
) -> GroupedBinaryLinear:
    """Compress one linear with STBLLM (algorithm 1 of the paper).

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
        weight,
        gram,
        factor.upper,
        sparsity,
        options,
        lambda block: prune_and_binarize(block, statistics, sparsity, options),
    )
