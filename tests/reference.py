"""The methods once more, slow and literal: numpy in float64, loops over rows, candidates and regions.

Written from the equations of the papers, as the ground truth of `test_binary.py` and `test_methods.py`. Nothing here is
clever: every candidate of a search is binarized, every inverse is taken, every joint system is solved on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

__all__ = [
    "Blockwise",
    "Bools",
    "Floats",
    "Pbs2pChoices",
    "ReferenceBlock",
    "ReferenceLinear",
    "Settle",
    "StbllmChoices",
    "binarize_row",
    "binarize_row_twice",
    "compensate_diagonal",
    "compensate_exact",
    "conditional_metric",
    "count_errors",
    "damped",
    "damped_inverse",
    "joint_scales",
    "nm_mask",
    "pbs2p_linear",
    "prune_column_by_column",
    "quadratic",
    "rank_columns",
    "region_of",
    "round_scales",
    "score",
    "spbo_pair",
    "split_errors",
    "stbllm_linear",
    "textbook_factor",
    "to_half",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

REGIONS = {"none": 1, "bell": 2, "trisection": 3}


# --- binarizing a row -------------------------------------------------------------------------------------------------


@dataclass
class BinaryRow:
    """One masked row, binarized ``order`` times; ``value`` is zero outside the mask."""

    shift: float
    scale: float
    positive: Bools
    value: Floats
    residual_scale: float = 0.0
    residual_positive: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))


def binarize_row(row: Floats, mask: Bools) -> BinaryRow:
    """μ = mean(w), α = mean|w − μ|, ŵ = μ + α·sign(w − μ) over the masked entries; a difference of zero counts as +."""
    if not mask.any():
        return BinaryRow(0.0, 0.0, np.zeros_like(mask), np.zeros_like(row))
    shift = float(row[mask].mean())
    scale = float(np.abs(row[mask] - shift).mean())
    positive = mask & (row - shift >= 0)
    value = np.where(mask, shift + scale * np.where(positive, 1.0, -1.0), 0.0)
    return BinaryRow(shift, scale, positive, value)


def binarize_row_twice(row: Floats, mask: Bools, order: int = 2) -> BinaryRow:
    """Residual approximation: binarize, binarize what is left, add. The two shifts are one number in the end."""
    first = binarize_row(row, mask)
    if order == 1:
        return replace(first, residual_positive=np.zeros_like(mask))
    second = binarize_row(row - first.value, mask)
    return BinaryRow(
        first.shift + second.shift,
        first.scale,
        first.positive,
        first.value + second.value,
        second.scale,
        second.positive,
    )


def squared_error(row: Floats, mask: Bools, value: Floats) -> float:
    """Σ over the masked entries of (w − ŵ)²."""
    return float(((row[mask] - value[mask]) ** 2).sum())


# --- N:M masks and scores ---------------------------------------------------------------------------------------------


def nm_mask(scores: Floats, n: int, m: int) -> Bools:
    """Keep the N highest of every M consecutive scores of a row; ties go to the lower column."""
    keep = np.zeros(scores.shape, dtype=bool)
    for i in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            best = sorted(range(start, start + m), key=lambda j: (-scores[i, j], j))[:n]
            keep[i, best] = True
    return keep


def relative_importance(weight: Floats, original: Floats, columns: slice) -> Floats:
    """|W_ij| / Σ_j |W_ij| + |W_ij| / Σ_i |W_ij|; the sums are those of the original linear."""
    rows = np.abs(original).sum(axis=1)
    cols = np.abs(original).sum(axis=0)[columns]
    result = np.zeros(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] = abs(weight[i, j]) / rows[i] + abs(weight[i, j]) / cols[j]
    return result


def score(
    kind: str,
    weight: Floats,
    columns: slice,
    original: Floats,
    gram: Floats,
    inverse: Floats,
    exponent: float = 1.0,
    standardize: bool = True,
) -> Floats:
    """Score of the current ``weight`` of the block at ``columns``; ``inverse`` is the inverse of the damped Gram.

    ‖X_:j‖ is taken as √H_jj, which differs by a factor common to all columns.
    """
    norm = np.sqrt(gram.diagonal())[columns]
    if kind == "magnitude":
        return np.abs(weight)
    if kind == "wanda":
        return np.abs(weight) * norm
    if kind == "sparsegpt":
        return np.asarray(weight**2 / np.linalg.cholesky(inverse).diagonal()[columns] ** 2, dtype=np.float64)
    if kind == "obs":
        return weight**2 / inverse.diagonal()[columns]
    relative = relative_importance(weight, original, columns)
    if kind == "si" and standardize:
        layer = relative_importance(original, original, slice(None))
        relative = (relative - layer.mean()) / layer.std(ddof=1)
    return np.asarray(relative * norm**exponent, dtype=np.float64)


# --- the Gram matrix --------------------------------------------------------------------------------------------------


def damped(gram: Floats, damping: float) -> Floats:
    """H + λ·mean(diag H)·I."""
    return np.asarray(gram + damping * gram.diagonal().mean() * np.eye(len(gram)), dtype=np.float64)


def damped_inverse(gram: Floats, damping: float) -> Floats:
    """(H + λ·mean(diag H)·I)⁻¹."""
    return np.asarray(np.linalg.inv(damped(gram, damping)), dtype=np.float64)


def textbook_factor(gram: Floats, damping: float) -> Floats:
    """GPTQ's route: invert the damped Gram, then take the upper Cholesky factor, UᵀU = H⁻¹."""
    inverse = damped_inverse(gram, damping)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, dtype=np.float64)


def quadratic(error: Floats, metric: Floats) -> float:
    """e S eᵀ."""
    return float(error @ metric @ error)


def conditional_metric(hessian: Floats, start: int, end: int) -> Floats:
    """What an error in [start, end) costs when the later columns make the best of it: the Schur complement."""
    inside, later = slice(start, end), slice(end, len(hessian))
    if end == len(hessian):
        return hessian[inside, inside]
    return hessian[inside, inside] - hessian[inside, later] @ np.linalg.solve(
        hessian[later, later], hessian[later, inside]
    )


# --- searches ---------------------------------------------------------------------------------------------------------


def rank_columns(weight: Floats, diagonal: Floats) -> list[int]:
    """Columns by Σ_rows w² / U_jj², the highest first."""
    saliency = [float((weight[:, j] ** 2 / diagonal[j] ** 2).sum()) for j in range(weight.shape[1])]
    return sorted(range(len(saliency)), key=lambda j: (-saliency[j], j))


def count_errors(weight: Floats, keep: Bools, ranking: Sequence[int], limit: int, order: int = 2) -> list[float]:
    """Squared error of the block with the 1, 2, … limit best-ranked columns binarized twice and the rest once."""
    errors = []
    for count in range(1, min(limit, weight.shape[1] - 1) + 1):
        salient = np.zeros(weight.shape[1], dtype=bool)
        salient[list(ranking[:count])] = True
        error = 0.0
        for i in range(weight.shape[0]):
            head, rest = keep[i] & salient, keep[i] & ~salient
            error += squared_error(weight[i], head, binarize_row_twice(weight[i], head, order).value)
            error += squared_error(weight[i], rest, binarize_row(weight[i], rest).value)
        errors.append(error)
    return errors


def region_of(values: Floats, thresholds: Sequence[float]) -> Ints:
    """How many thresholds |value| exceeds."""
    region = np.zeros(values.shape, dtype=np.int64)
    for threshold in thresholds:
        region += np.abs(values) > threshold
    return region


def split_errors(
    values: Floats, mask: Bools, grouping: str, candidates: int
) -> tuple[list[tuple[float, ...]], list[float]]:
    """Every candidate's thresholds and the squared error of the block split by them, every region binarized per row."""
    sizes = np.abs(values[mask])
    tried, errors = [], []
    for first in np.percentile(sizes, np.linspace(10, 90, candidates)):
        thresholds = tuple(float(first) * 2**i for i in range(REGIONS[grouping] - 1))
        region = region_of(values, thresholds)
        error = 0.0
        for i in range(values.shape[0]):
            for r in range(REGIONS[grouping]):
                part = mask[i] & (region[i] == r)
                error += squared_error(values[i], part, binarize_row(values[i], part).value)
        tried.append(thresholds)
        errors.append(error)
    return tried, errors


def search_thresholds(values: Floats, mask: Bools, grouping: str, candidates: int) -> tuple[float, ...]:
    """The first of the best candidates; no thresholds without grouping or without entries."""
    if grouping == "none" or not mask.any():
        return ()
    tried, errors = split_errors(values, mask, grouping, candidates)
    return tried[int(np.argmin(errors))]


# --- compensation -----------------------------------------------------------------------------------------------------


def prune_column_by_column(weight: Floats, keep: Bools, upper: Floats) -> Floats:
    """SparseGPT in one block: a pruned weight, over U_jj, times U_j,later, is taken from the later columns."""
    result: Floats = weight.copy()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            if keep[i, j]:
                continue
            error = result[i, j] / upper[j, j]
            for later in range(j + 1, weight.shape[1]):
                result[i, later] -= error * upper[j, later]
            result[i, j] = 0.0
    return result


def compensate_diagonal(weight: Floats, error: Floats, upper: Floats, start: int) -> Floats:
    """W[:, e:] −= (error / diag(U)) · U[b, e:]: every column of the block on its own."""
    result: Floats = weight.copy()
    end = start + error.shape[1]
    for i in range(weight.shape[0]):
        for j in range(start, end):
            result[i, end:] -= error[i, j - start] / upper[j, j] * upper[j, end:]
    return result


def compensate_exact(weight: Floats, error: Floats, hessian: Floats, start: int) -> Floats:
    """The change D of the later columns that minimizes (−error, D) H (−error, D)ᵀ, by least squares.

    H = LLᵀ over the block and the later columns, so that the form is ‖Lᵀ (−error, D)ᵀ‖².
    """
    result: Floats = weight.copy()
    width = error.shape[1]
    root = np.linalg.cholesky(hessian[start:, start:]).T
    for i in range(weight.shape[0]):
        change, *_ = np.linalg.lstsq(root[:, width:], root[:, :width] @ error[i], rcond=None)
        result[i, start + width :] += change
    return result


# --- scales on the output error ---------------------------------------------------------------------------------------


def spbo_pair(row: Floats, metric: Floats, mask: Bools, signs: Floats) -> tuple[float, float]:
    """(α, μ) of PBS²P's joint system for one region: [vᵀSv vᵀSm; vᵀSm mᵀSm] [α; μ] = [vᵀSw; mᵀSw]."""
    m = mask.astype(np.float64)
    v = signs * m
    system = np.array([[v @ metric @ v, v @ metric @ m], [v @ metric @ m, m @ metric @ m]])
    alpha, mu = np.linalg.solve(system, np.array([v @ metric @ row, m @ metric @ row]))
    return float(alpha), float(mu)


def joint_scales(row: Floats, metric: Floats, basis: Floats) -> Floats:
    """The same for any number of basis rows: argmin_c (w − cΦ) S (w − cΦ)ᵀ, the shortest c where there are many."""
    solution, *_ = np.linalg.lstsq(basis @ metric @ basis.T, basis @ metric @ row, rcond=1e-10)
    return np.asarray(solution, dtype=np.float64)


# --- a block ----------------------------------------------------------------------------------------------------------


@dataclass
class ReferenceBlock:
    """A binarized block; ``scales`` (rows, 2R + 3): R shifts, R scales, shift, scale and residual scale of salient.

    ``moot`` marks salient weights that are alone or two in their row: order 1 meets them exactly, what is left is zero,
    and the sign of that zero is a matter of rounding.
    """

    keep: Bools
    positive: Bools
    symbol: Ints
    salient: Bools
    regions: int
    scales: Floats
    moot: Bools
    order: int = field(default=2, kw_only=True)  # of the salient columns

    def basis(self, i: int) -> Floats:
        """(2R + 3, k): the dense row i is ``scales[i] @ basis(i)``."""
        sign = np.where(self.positive[i], 1.0, -1.0)
        residual = np.where(self.symbol[i] == 1, 1.0, -1.0) if self.order == 2 else np.zeros(self.symbol[i].shape)
        masks = [self.keep[i] & ~self.salient & (self.symbol[i] == r) for r in range(self.regions)]
        twice = self.keep[i] & self.salient
        return np.array(
            [m.astype(float) for m in masks] + [m * sign for m in masks] + [twice * 1.0, twice * sign, twice * residual]
        )

    def dense(self) -> Floats:
        """(rows, k)."""
        return np.array([self.scales[i] @ self.basis(i) for i in range(len(self.keep))])

    def refit(self, target: Floats, metric: Floats) -> None:
        """Solve all scales of every row jointly on the output error against ``target``."""
        for i in range(len(self.keep)):
            self.scales[i] = joint_scales(target[i], metric, self.basis(i))

    def prune(self, keep: Bools) -> None:
        """Drop weights; what is dropped has no sign and no symbol."""
        self.keep = keep
        self.positive = self.positive & keep
        self.symbol = np.where(keep, self.symbol, 0)


def binarize_block(
    weight: Floats,
    keep: Bools,
    salient: Bools,
    search: Floats,
    thresholds: Sequence[float],
    grouping: str,
    order: int = 2,
) -> ReferenceBlock:
    """Salient columns twice, every region of the rest once, row by row."""
    regions = REGIONS[grouping]
    symbol = region_of(search, thresholds)
    positive = np.zeros_like(keep)
    scales = np.zeros((len(weight), 2 * regions + 3))
    for i in range(len(weight)):
        for r in range(regions):
            part = binarize_row(weight[i], keep[i] & ~salient & (symbol[i] == r))
            positive[i] |= part.positive
            scales[i, r], scales[i, regions + r] = part.shift, part.scale
        twice = binarize_row_twice(weight[i], keep[i] & salient, order)
        positive[i] |= twice.positive
        scales[i, 2 * regions :] = twice.shift, twice.scale, twice.residual_scale
        symbol[i] = np.where(salient, twice.residual_positive, symbol[i])
    twice_kept = keep & salient
    moot = twice_kept & (twice_kept.sum(axis=1, keepdims=True) <= 2)
    return ReferenceBlock(keep, positive, np.where(keep, symbol, 0), salient, regions, scales, moot, order=order)


def choose_salient(weight: Floats, keep: Bools, diagonal: Floats, limit: int, order: int = 2) -> Bools:
    """(k,) the salient columns of a block."""
    salient = np.zeros(weight.shape[1], dtype=bool)
    if limit > 0:
        ranking = rank_columns(weight, diagonal)
        salient[ranking[: int(np.argmin(count_errors(weight, keep, ranking, limit, order))) + 1]] = True
    return salient


# --- whole linears ----------------------------------------------------------------------------------------------------


@dataclass
class ReferenceLinear:
    """The blocks side by side; ``scales`` (out, blocks, 2R or 2R + 3)."""

    keep: Bools
    positive: Bools
    symbol: Ints
    salient: Bools
    scales: Floats
    dense: Floats


def to_half(scales: Floats) -> Floats:
    """The nearest float16 numbers."""
    return scales.astype(np.float16).astype(np.float64)


Settle = Callable[[int, ReferenceBlock, Floats, Floats], None]


def round_scales(index: int, block: ReferenceBlock, target: Floats, metric: Floats) -> None:
    """Store the scales of a block in float16."""
    block.scales = to_half(block.scales)


@dataclass(frozen=True)
class Blockwise:
    """What the methods share.

    ``settle`` gets the index, the block with exact scales, its weights and metric, and leaves the stored scales in it.
    """

    n: int
    m: int
    block_size: int = 128
    damping: float = 0.01
    salient_columns: int = 30
    residual_order: int = 2
    compensation: str = "exact"
    metric: str = "conditional"
    settle: Settle = round_scales


@dataclass(frozen=True)
class StbllmChoices:
    """The options of STBLLM, named as in the package."""

    score: str = "si"
    activation_exponent: float = 1.0
    standardize: bool = True
    prune_compensation: bool = True
    grouping: str = "trisection"
    candidates: int = 160
    search_on: str = "weights"
    scales: str = "weights"


@dataclass(frozen=True)
class Pbs2pChoices:
    """The options of PBS²P, named as in the package."""

    score: str = "obs"
    steps: int = 0
    rescore: bool = True
    grouping: str = "bell"
    candidates: int = 80


def run_blocks(
    weight: Floats, gram: Floats, common: Blockwise, one: Callable[[Floats, slice, Floats, Floats], ReferenceBlock]
) -> ReferenceLinear:
    """Binarize, round the scales, compensate, next block. ``one`` gets weight, columns, U and S of a block."""
    hessian = damped(gram, common.damping)
    upper = textbook_factor(gram, common.damping)
    current = weight.copy()
    blocks: list[ReferenceBlock] = []
    for start in range(0, weight.shape[1], common.block_size):
        end = min(start + common.block_size, weight.shape[1])
        columns = slice(start, end)
        metric = gram[columns, columns] if common.metric == "gram" else conditional_metric(hessian, start, end)
        before = current[:, columns].copy()
        block = one(before, columns, upper[columns, columns], metric)
        common.settle(len(blocks), block, before, metric)
        blocks.append(block)
        error = before - block.dense()
        if common.compensation == "diagonal":
            current = compensate_diagonal(current, error, upper, start)
        elif common.compensation == "exact" and end < weight.shape[1]:
            current = compensate_exact(current, error, hessian, start)
    used = blocks[0].scales.shape[1] if common.salient_columns > 0 else 2 * blocks[0].regions
    return ReferenceLinear(
        np.concatenate([b.keep for b in blocks], axis=1),
        np.concatenate([b.positive for b in blocks], axis=1),
        np.concatenate([b.symbol for b in blocks], axis=1),
        np.concatenate([b.salient for b in blocks]),
        np.stack([b.scales[:, :used] for b in blocks], axis=1),
        np.concatenate([b.dense() for b in blocks], axis=1),
    )


def stbllm_linear(weight: Floats, gram: Floats, common: Blockwise, choices: StbllmChoices) -> ReferenceLinear:
    """STBLLM: prune by the score, compensate, salient columns, search the split, binarize, next block."""
    inverse = damped_inverse(gram, common.damping)

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        scores = score(
            choices.score, before, columns, weight, gram, inverse, choices.activation_exponent, choices.standardize
        )
        keep = nm_mask(scores, common.n, common.m)
        current = np.where(keep, before, 0.0)
        if choices.prune_compensation:
            current = prune_column_by_column(before, keep, upper)
        diagonal = upper.diagonal()
        salient = choose_salient(current, keep, diagonal, common.salient_columns, common.residual_order)
        search = current if choices.search_on == "weights" else current**2 / diagonal**2
        thresholds = search_thresholds(search, keep & ~salient, choices.grouping, choices.candidates)
        block = binarize_block(current, keep, salient, search, thresholds, choices.grouping, common.residual_order)
        if choices.scales == "gram":
            block.refit(before, metric)
        return block

    return run_blocks(weight, gram, common, one)


def pbs2p_linear(weight: Floats, gram: Floats, common: Blockwise, choices: Pbs2pChoices) -> ReferenceLinear:
    """PBS²P: binarize densely, drop the lowest weight of every group, solve all scales again, until N are left."""
    inverse = damped_inverse(gram, common.damping)
    removals = common.m - common.n
    steps = choices.steps or removals

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        keep = np.ones(before.shape, dtype=bool)
        salient = choose_salient(before, keep, upper.diagonal(), common.salient_columns, common.residual_order)
        thresholds = search_thresholds(before, keep & ~salient, choices.grouping, choices.candidates)
        block = binarize_block(before, keep, salient, before, thresholds, choices.grouping, common.residual_order)
        scores = score(choices.score, before, columns, weight, gram, inverse)
        for step in range(1, steps + 1):
            if choices.rescore:
                scores = dropping_costs(block, before, metric)
            kept = common.m - round(removals * step / steps)
            block.prune(nm_mask(np.where(block.keep, scores, -np.inf), kept, common.m))
            block.refit(before, metric)
        return block

    return run_blocks(weight, gram, common, one)


def dropping_costs(block: ReferenceBlock, target: Floats, metric: Floats) -> Floats:
    """What the output error gains when one kept weight becomes zero and nothing else changes: both, subtracted."""
    dense = block.dense()
    costs = np.zeros(dense.shape)
    for i in range(len(dense)):
        now = quadratic(target[i] - dense[i], metric)
        for j in range(dense.shape[1]):
            without = dense[i].copy()
            without[j] = 0.0
            costs[i, j] = quadratic(target[i] - without, metric) - now
    return costs
