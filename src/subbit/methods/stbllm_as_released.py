"""STBLLM as its authors' code runs (github.com/pprp/STBLLM), for comparison only: what comes out is not N:M-sparse.

The code prunes, and then binarizes the whole block: no mask tells it which weights are zero. The zeros fall into the
region of the smallest weights and come out as μ ± α ≠ 0, and from the second block on they are no zeros any more, since
they too have absorbed what earlier blocks lost. The result is a dense matrix with a sign and one of three regions for
every weight, and is counted as that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binary.compensate import Compensation, InverseFactor
from subbit.binary.groups import ROWS_AT_ONCE, candidate_thresholds, rank_columns, split_gain
from subbit.binary.nm import PruningScore, Sparsity, keep_top, score_statistics
from subbit.binary.residual import binarize_residual
from subbit.linears import GroupedBinaryLinear
from subbit.methods.blockwise import BinaryBlock, Block, Metric, binarize_block, binarize_blockwise
from subbit.methods.options import check_blocks

__all__ = ["ReleasedStbllmOptions", "stbllm_as_released"]

DENSE = Sparsity(1, 1)  # what the result is, whatever was pruned before


@dataclass(frozen=True)
class ReleasedStbllmOptions:
    """The settings of the authors' scripts."""

    block_size: int = 128  # columns that share scales
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    score: PruningScore = "ria"  # SI without its standardization
    activation_exponent: float = 0.5  # of ‖x_j‖
    salient_columns: int = 49  # at most so many columns of a block are binarized twice; 0: none
    candidates: int = 160  # thresholds tried
    compensation: Compensation = "diagonal"  # how later blocks absorb the error of a block

    @property
    def metric(self) -> Metric:
        """Not used: every error here is one of saliencies."""
        return "gram"

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_blocks(self, sparsity)


def stbllm_as_released(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: ReleasedStbllmOptions
) -> GroupedBinaryLinear:
    """Compress one linear as STBLLM's code does.

    The whole linear is pruned first, without compensation; then it goes through the blocks like a dense one. Two things
    differ from the code: it measures the activations of the second step on the pruned model, here both steps have one
    Gram; and its sign of 0, for a weight that equals the mean of its set, is 0, here +1.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
        sparsity: N:M before the binarization.
    """
    statistics = score_statistics(
        options.score, weight, gram, factor.upper, options.activation_exponent, standardize=False
    )
    keep = keep_top(statistics.score(weight, slice(None)), sparsity.n, sparsity.m)
    pruned = torch.where(keep, weight, 0.0)
    return binarize_blockwise(pruned, gram, factor.upper, DENSE, options, lambda block: released_block(block, options))


def released_block(block: Block, options: ReleasedStbllmOptions) -> BinaryBlock:
    """One block; columns and thresholds are chosen by the error of the saliency w²/U², not of the weights."""
    everything = torch.ones_like(block.weight, dtype=torch.bool)
    diagonal = block.upper.diagonal()
    saliency = (block.weight / diagonal).square()
    ranking = rank_columns(block.weight, diagonal)
    salient = torch.zeros_like(everything[0])
    salient[ranking[: released_count(saliency, ranking, options.salient_columns)]] = True
    region = torch.zeros_like(block.weight, dtype=torch.uint8)
    for threshold in released_thresholds(saliency, salient, options.candidates):
        region += saliency.double() >= threshold
    return binarize_block(block.weight, everything, salient, region, regions=3)


def released_count(saliency: Tensor, ranking: Tensor, limit: int) -> int:
    """How many of the best-ranked columns are salient: 1 … limit, with both sides of the cut binarized twice.

    The rest is binarized twice in this search only.
    """
    salient = torch.zeros_like(saliency, dtype=torch.bool)
    errors = []
    for column in ranking[: min(limit, len(ranking) - 1)]:
        salient[:, column] = True
        errors.append(sum(residual_error(saliency, mask) for mask in (salient, ~salient)))
    return errors.index(min(errors)) + 1 if errors else 0


def residual_error(values: Tensor, mask: Tensor) -> float:
    """Squared error of the order-2 binarization of the masked ``values`` (rows, k)."""
    twice = binarize_residual(values, mask)
    sign, residual = (torch.where(positive, 1.0, -1.0) for positive in (twice.positive, twice.residual_positive))
    value = twice.shift[:, None] + twice.scale[:, None] * sign + twice.residual_scale[:, None] * residual
    return float(torch.where(mask, values - value, 0.0).double().square().sum())


def released_thresholds(saliency: Tensor, salient: Tensor, candidates: int) -> tuple[float, float]:
    """p1 and p2 = 2·p1 with the least squared error of the saliencies; a saliency that equals one lies above it.

    The candidates are percentiles of the whole block, with zeros for the pruned weights and the salient columns. One
    whose p2 is above all candidates is passed over. So is one that is 0: it leaves a single region, the last one, which
    is what remains if there is no other candidate.
    """
    everything = torch.ones_like(saliency, dtype=torch.bool)
    first = candidate_thresholds(torch.where(salient, 0.0, saliency), everything, candidates)
    first = first[(first > 0) & (2 * first <= first[-1])]
    if len(first) == 0:
        return 0.0, 0.0
    both = torch.stack([first, 2 * first])
    below = torch.nextafter(both, torch.full_like(both, -torch.inf))  # the shared search has >, the code >=
    gain = torch.zeros_like(first)
    for start in range(0, len(saliency), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        gain += split_gain(saliency[rows], everything[rows] & ~salient, below)
    best = float(first[int(gain.argmax())])
    return best, 2 * best
