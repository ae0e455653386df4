"""BiLLM (arXiv 2402.04291): salient columns binarized twice, the other weights in two regions."""

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

__all__ = ["BillmOptions", "billm"]


@dataclass(frozen=True)
class BillmOptions:
    """Every choice of BiLLM; docs/methods.md says where the defaults leave the paper."""

    block_size: int = 128  # columns that share scales
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    score: PruningScore = "sparsegpt"  # which weights of a group are kept, where there is an N:M
    prune_compensation: bool = True  # the kept weights of a block absorb its pruned ones, as in SparseGPT
    salient_columns: int = 30  # at most so many columns of a block are binarized twice; 0: none (49 in the code)
    residual_order: Literal[1, 2] = 2  # 1: once, but apart from the others
    grouping: Grouping = "bell"  # how the other columns are split by size
    candidates: int = 80  # thresholds tried
    search_on: Literal["weights", "saliency"] = "weights"  # what the thresholds are on; the code has w²/U² here
    scales: Literal["weights", "gram"] = "weights"  # least squares on the weights, or on the output
    compensation: Compensation = "exact"  # how later blocks absorb the error of a block; "diagonal" in the paper
    metric: Metric = "conditional"  # what "output" means with scales: gram

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_blocks(self, sparsity)


def billm(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: BillmOptions
) -> GroupedBinaryLinear:
    """Compress one linear with BiLLM (algorithm 1 of the paper).

    With every weight kept this is BiLLM as published. With N:M it is what STBLLM's and PBS²P's tables call BiLLM at
    N:M: pruned by SparseGPT first. STBLLM differs by its score and its third region only, so the block is its block.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
    """
    statistics = score_statistics(options.score, weight, gram, factor.upper)
    return binarize_blockwise(
        weight,
        gram,
        factor.upper,
        sparsity,
        options,
        lambda block: prune_and_binarize(block, statistics, sparsity, options),
    )
