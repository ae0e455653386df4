"""BiLLM, ARB-LLM and the released STBLLM once more, slow and literal, in the manner of `reference.py`.

Numpy in float64, loops over rows, weights and candidates, written from the equations of the papers (and, for the
released STBLLM, from what its code does): the ground truth of `test_baselines.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from reference import (
    Blockwise,
    Bools,
    Floats,
    ReferenceBlock,
    ReferenceLinear,
    binarize_block,
    binarize_row,
    binarize_row_twice,
    choose_salient,
    damped_inverse,
    nm_mask,
    prune_column_by_column,
    quadratic,
    rank_columns,
    region_of,
    round_scales,
    run_blocks,
    score,
    search_thresholds,
    squared_error,
    to_half,
)

__all__ = [
    "ArbChoices",
    "ArbReferenceBlock",
    "BillmChoices",
    "ReleasedChoices",
    "RowSet",
    "arb_block",
    "arb_linear",
    "arb_on_output",
    "arb_on_weights",
    "billm_linear",
    "published_rc",
    "published_rc_linear",
    "released_linear",
    "round_all_scales",
    "row_column_block",
    "sets_of_row",
]


# --- pruning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BillmChoices:
    """The options of BiLLM, named as in the package."""

    score: str = "sparsegpt"
    prune_compensation: bool = True
    grouping: str = "bell"
    candidates: int = 80
    search_on: str = "weights"
    scales: str = "weights"


def prune(
    before: Floats,
    columns: slice,
    upper: Floats,
    original: Floats,
    gram: Floats,
    common: Blockwise,
    kind: str,
    compensated: bool,
) -> tuple[Floats, Bools]:
    """The weights of a block, zero where pruned, and what is kept; with N = M nothing happens."""
    if common.n == common.m:
        return before, np.ones(before.shape, dtype=bool)
    keep = nm_mask(
        score(kind, before, columns, original, gram, damped_inverse(gram, common.damping)), common.n, common.m
    )
    return prune_column_by_column(before, keep, upper) if compensated else np.where(keep, before, 0.0), keep


# --- BiLLM ------------------------------------------------------------------------------------------------------------


def billm_linear(weight: Floats, gram: Floats, common: Blockwise, choices: BillmChoices) -> ReferenceLinear:
    """BiLLM: salient columns by the Hessian metric, residual binarization there, two regions elsewhere."""

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        current, keep = prune(before, columns, upper, weight, gram, common, choices.score, choices.prune_compensation)
        diagonal = upper.diagonal()
        salient = choose_salient(current, keep, diagonal, common.salient_columns, common.residual_order)
        search = current if choices.search_on == "weights" else current**2 / diagonal**2
        thresholds = search_thresholds(search, keep & ~salient, choices.grouping, choices.candidates)
        block = binarize_block(current, keep, salient, search, thresholds, choices.grouping, common.residual_order)
        if choices.scales == "gram":
            block.refit(before, metric)
        return block

    return run_blocks(weight, gram, common, one)


# --- ARB: one set of one row ------------------------------------------------------------------------------------------


@dataclass
class RowSet:
    """The weights of a row that share μ and α (and β): ``value`` is μ + α·sign (+ β·residual) on the mask, else 0."""

    mask: Bools
    shift: float
    scales: list[float]  # one of order 1, two of order 2
    signs: list[Floats]  # ±1 everywhere

    def value(self) -> Floats:
        total = self.shift + sum(scale * sign for scale, sign in zip(self.scales, self.signs, strict=True))
        return np.where(self.mask, total, 0.0)


def start_set(row: Floats, mask: Bools, order: int) -> RowSet:
    """The closed forms of BiLLM."""
    if order == 1:
        once = binarize_row(row, mask)
        return RowSet(mask, once.shift, [once.scale], [np.where(once.positive, 1.0, -1.0)])
    twice = binarize_row_twice(row, mask)
    second = twice.residual_positive if mask.any() else np.zeros_like(mask)
    signs = [np.where(twice.positive, 1.0, -1.0), np.where(second, 1.0, -1.0)]
    return RowSet(mask, twice.shift, [twice.scale, twice.residual_scale], signs)


def nearest_pair(wanted: float, first: float, second: float) -> tuple[float, float]:
    """The signs (s, t) whose s·first + t·second is nearest to ``wanted``; the first of equals in the paper's order."""
    pairs = [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]
    return min(pairs, key=lambda pair: abs(wanted - pair[0] * first - pair[1] * second))


def arb_on_weights(row: Floats, mask: Bools, order: int, iterations: int) -> RowSet:
    """ARB: μ moves by the mean of the residual, α (then β) by its closed form, then the signs; again and again."""
    part = start_set(row, mask, order)
    if not mask.any():
        return part
    for _ in range(iterations):
        part.shift += float((row - part.value())[mask].mean())
        for i in range(order):
            others = sum((part.scales[j] * part.signs[j] for j in range(order) if j != i), np.zeros(len(row)))
            part.scales[i] = float((part.signs[i] * (row - part.shift - others))[mask].mean())
        for j in np.flatnonzero(mask):
            if order == 1:
                part.signs[0][j] = 1.0 if row[j] - part.shift >= 0 else -1.0
            else:
                pair = nearest_pair(float(row[j] - part.shift), part.scales[0], part.scales[1])
                part.signs[0][j], part.signs[1][j] = pair
    return part


def arb_on_output(row: Floats, metric: Floats, part: RowSet, iterations: int) -> RowSet:
    """ARB-X with the signs fixed: μ = mᵀS(w⊙m − αv) / mᵀSm, α = vᵀS(w⊙m − μm) / vᵀSv, by turns.

    Kept only if it is better, once rounded to float16, than what was there before.
    """
    m = part.mask.astype(np.float64)
    target = row * m
    result = replace(part, scales=list(part.scales))
    vectors = [sign * m for sign in part.signs]
    for _ in range(iterations):
        if m @ metric @ m > 0:
            signed = sum(scale * v for scale, v in zip(result.scales, vectors, strict=True))
            result.shift = float(m @ metric @ (target - signed) / (m @ metric @ m))
        for i, v in enumerate(vectors):
            others = sum((result.scales[j] * vectors[j] for j in range(len(vectors)) if j != i), np.zeros(len(row)))
            if v @ metric @ v > 0:
                result.scales[i] = float(v @ metric @ (target - result.shift * m - others) / (v @ metric @ v))
    numbers = to_half(np.array([result.shift, *result.scales]))
    rounded = replace(result, shift=float(numbers[0]), scales=[float(x) for x in numbers[1:]])
    better = quadratic(target - rounded.value(), metric) < quadratic(target - part.value(), metric)
    return result if better else part


# --- ARB: a block -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArbChoices:
    """The options of ARB-LLM, named as in the package."""

    variant: str = "rc"
    score: str = "sparsegpt"
    prune_compensation: bool = True
    split_salient: bool = True
    grouping: str = "bell"
    candidates: int = 80
    iterations: int = 15
    output_iterations: int = 15
    scales: str = "alternate"


@dataclass
class ArbReferenceBlock(ReferenceBlock):
    """With two regions of salient columns, maybe, and column scales, maybe; a salient symbol is 2·region + residual."""

    column_scales: Floats | None = None
    salient_regions: int = 1

    def basis(self, i: int) -> Floats:
        sign = np.where(self.positive[i], 1.0, -1.0)
        residual = np.where(self.symbol[i] % 2 == 1, 1.0, -1.0)
        masks = [self.keep[i] & ~self.salient & (self.symbol[i] == r) for r in range(self.regions)]
        rows = [m.astype(float) for m in masks] + [m * sign for m in masks]
        for r in range(self.salient_regions):
            twice = self.keep[i] & self.salient & (self.symbol[i] // 2 == r)
            rows += [twice * 1.0, twice * sign, twice * residual]
        return np.array(rows)

    def dense(self) -> Floats:
        dense = super().dense()
        return dense if self.column_scales is None else dense * self.column_scales


def round_all_scales(index: int, block: ReferenceBlock, target: Floats, metric: Floats) -> None:
    """Store the scales of a block, and of its columns, in float16."""
    round_scales(index, block, target, metric)
    if isinstance(block, ArbReferenceBlock) and block.column_scales is not None:
        block.column_scales = to_half(block.column_scales)


@dataclass
class Partition:
    """Which set every weight of a block is in: a region of the ordinary columns, or one of the salient columns."""

    keep: Bools
    salient: Bools
    region: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    regions: int
    salient_regions: int

    def sets(self) -> list[tuple[Bools, int, list[int]]]:
        """(mask (rows, k), order, places of its numbers) of every set."""
        R = self.regions
        ordinary = [(self.keep & ~self.salient & (self.region == r), 1, [r, R + r]) for r in range(R)]
        triples = [[2 * R + 3 * t + i for i in range(3)] for t in range(self.salient_regions)]
        twice = self.keep & self.salient
        return ordinary + [(twice & (self.region == t), 2, triples[t]) for t in range(self.salient_regions)]


def find_partition(current: Floats, keep: Bools, diagonal: Floats, limit: int, choices: ArbChoices) -> Partition:
    """Salient columns and regions as in BiLLM, and, for the column-group bitmap, regions of the salient columns."""
    salient = choose_salient(current, keep, diagonal, limit)
    thresholds = search_thresholds(current, keep & ~salient, choices.grouping, choices.candidates)
    region = region_of(current, thresholds)
    if choices.split_salient:
        inner = search_thresholds(current, keep & salient, "bell", choices.candidates)
        region = np.where(salient, region_of(current, inner), region)
    else:
        region = np.where(salient, 0, region)
    regions = {"none": 1, "bell": 2, "trisection": 3}[choices.grouping]
    return Partition(keep, salient, region, regions, 2 if choices.split_salient else 1)


def sets_of_row(
    row: Floats, masks: Sequence[tuple[Bools, int]], iterations: int, metric: Floats | None, output_iterations: int
) -> list[RowSet]:
    """ARB, and with a metric ARB-X, of every set of a row on its own."""
    parts = []
    for mask, order in masks:
        part = arb_on_weights(row, mask, order, iterations)
        parts.append(part if metric is None else arb_on_output(row, metric, part, output_iterations))
    return parts


def assemble(partition: Partition, rows: list[list[RowSet]], column_scales: Floats | None = None) -> ArbReferenceBlock:
    """The block that the sets of all rows make."""
    keep = partition.keep
    sets = partition.sets()
    positive, symbol = np.zeros_like(keep), np.where(partition.salient, 2, 1) * partition.region
    scales = np.zeros((len(keep), 2 * partition.regions + 3 * partition.salient_regions))
    moot = np.zeros_like(keep)
    for i, parts in enumerate(rows):
        for (_, order, slots), part in zip(sets, parts, strict=True):
            scales[i, slots] = part.shift, *part.scales
            positive[i] |= part.mask & (part.signs[0] > 0)
            if order == 2:
                symbol[i] += part.mask & (part.signs[1] > 0)
            moot[i] |= part.mask & (part.mask.sum() <= order)  # met exactly: what is left to a sign is rounding
    symbol = np.where(keep, symbol, 0)
    return ArbReferenceBlock(
        keep,
        positive,
        symbol,
        partition.salient,
        partition.regions,
        scales,
        moot,
        column_scales,
        partition.salient_regions,
    )


def arb_block(current: Floats, partition: Partition, metric: Floats | None, choices: ArbChoices) -> ArbReferenceBlock:
    """ARB (without a metric) or ARB-X of a block."""
    masks = [(mask, order) for mask, order, _ in partition.sets()]
    rows = [
        sets_of_row(
            current[i],
            [(mask[i], order) for mask, order in masks],
            choices.iterations,
            metric,
            choices.output_iterations,
        )
        for i in range(len(current))
    ]
    return assemble(partition, rows)


def row_column_block(current: Floats, partition: Partition, iterations: int) -> ArbReferenceBlock:
    """ARB-RC with one scale a column: α of every (row, set) and c of every column by turns, and the signs of order 2.

    A row scale is Σ c b (w − c·others) / Σ c²; a column scale is Σ t w / Σ t² with t the value of the row scales.
    """
    rows = []
    for i, row in enumerate(current):
        parts = [start_set(row, mask[i], order) for mask, order, _ in partition.sets()]
        for part in parts:
            part.shift = 0.0
            part.signs[0] = np.where(row >= 0, 1.0, -1.0)
            part.scales[0] = float(np.abs(row[part.mask]).mean()) if part.mask.any() else 0.0
        rows.append(parts)
    c = start_columns(current, rows)
    for row, parts in zip(current, rows, strict=True):
        for part in (p for p in parts if len(p.signs) == 2):
            left = row - c * part.scales[0] * part.signs[0]
            part.signs[1] = np.where(left >= 0, 1.0, -1.0)
            part.scales[1] = float(np.abs(left[part.mask]).mean()) if part.mask.any() else 0.0
    for _ in range(iterations):
        for row, parts in zip(current, rows, strict=True):
            for part in parts:
                solve_row_scales(row, part, c)
        values = np.array([sum(part.value() for part in parts) for parts in rows])
        for j in range(current.shape[1]):
            kept = partition.keep[:, j]
            if (values[kept, j] ** 2).sum() > 0:
                c[j] = (values[kept, j] * current[kept, j]).sum() / (values[kept, j] ** 2).sum()
        for row, parts in zip(current, rows, strict=True):
            for part in (p for p in parts if len(p.signs) == 2):
                for place in np.flatnonzero(part.mask):
                    pair = nearest_pair(float(row[place]), c[place] * part.scales[0], c[place] * part.scales[1])
                    part.signs[0][place], part.signs[1][place] = pair
    mean = float(c.mean())
    for part in (part for parts in rows for part in parts):
        part.scales = [scale * mean for scale in part.scales]
    return assemble(partition, rows, c / mean)


def start_columns(current: Floats, rows: list[list[RowSet]]) -> Floats:
    """c_j = mean over the rows of |w_ij| / α, with the α of the set that the weight is in."""
    columns = []
    for j in range(current.shape[1]):
        ratios = [
            abs(row[j]) / part.scales[0]
            for row, parts in zip(current, rows, strict=True)
            for part in parts
            if part.mask[j] and part.scales[0] > 0
        ]
        columns.append(float(np.mean(ratios)) if ratios else 1.0)
    return np.array(columns)


def solve_row_scales(row: Floats, part: RowSet, c: Floats) -> None:
    """One scale after the other."""
    m = part.mask
    below = float((c[m] ** 2).sum())
    for i, sign in enumerate(part.signs):
        others = sum((part.scales[j] * part.signs[j] for j in range(len(part.signs)) if j != i), np.zeros(len(row)))
        if below > 0:
            part.scales[i] = float((c * sign * (row - c * others))[m].sum() / below)


def published_rc(weight: Floats, mask: Bools, order: int, iterations: int) -> Floats:
    """ARB-RC of one set as published: every sign has row scales and column scales of its own.

    Returns:
        (rows, k), zero outside the mask.
    """
    w = np.where(mask, weight, 0.0)
    signs: list[Floats] = []
    alphas: list[Floats] = []
    gammas: list[Floats] = []
    left = w.copy()
    for _ in range(order):
        sign = np.where(left >= 0, 1.0, -1.0) * mask
        alpha = np.array([np.abs(left[i, mask[i]]).mean() if mask[i].any() else 0.0 for i in range(len(w))])
        gamma = np.zeros(w.shape[1])
        for j in range(w.shape[1]):
            ratios = [abs(left[i, j]) / alpha[i] for i in range(len(w)) if mask[i, j] and alpha[i] > 0]
            gamma[j] = np.mean(ratios) if ratios else 0.0
        signs, alphas, gammas = [*signs, sign], [*alphas, alpha], [*gammas, gamma]
        left = left - np.outer(alpha, gamma) * sign
    for _ in range(iterations):
        for o in range(order):
            others = sum((np.outer(alphas[p], gammas[p]) * signs[p] for p in range(order) if p != o), 0 * w)
            below = (gammas[o] ** 2 * mask).sum(axis=1)
            above = (gammas[o] * signs[o] * (w - others)).sum(axis=1)
            alphas[o] = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
            below = (alphas[o][:, None] ** 2 * mask).sum(axis=0)
            above = (alphas[o][:, None] * signs[o] * (w - others)).sum(axis=0)
            gammas[o] = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        if order == 2:
            pairs = [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]  # as in `nearest_pair`
            first, second = (np.outer(alpha, gamma) for alpha, gamma in zip(alphas, gammas, strict=True))
            nearest = np.argmin([np.abs(w - s * first - t * second) for s, t in pairs], axis=0)
            signs = [np.where(mask, np.array(pairs)[nearest, o], 0.0) for o in range(2)]
    return np.asarray(sum(np.outer(a, g) * s for a, g, s in zip(alphas, gammas, signs, strict=True)), dtype=np.float64)


@dataclass
class PublishedBlock(ReferenceBlock):
    """A block of which only the values are known: the published ARB-RC has more numbers than `scales` has room for."""

    values: Floats = field(default_factory=lambda: np.zeros((0, 0)))

    def dense(self) -> Floats:
        return self.values


def published_rc_linear(weight: Floats, gram: Floats, common: Blockwise, choices: ArbChoices) -> ReferenceLinear:
    """ARB-LLM_RC with `published_rc` for every set of a block; its numbers are not rounded to float16."""

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        current, keep = prune(before, columns, upper, weight, gram, common, choices.score, choices.prune_compensation)
        sets = find_partition(current, keep, upper.diagonal(), common.salient_columns, choices)
        values = sum(
            (published_rc(current, mask, order, choices.iterations) for mask, order, _ in sets.sets()), 0 * current
        )
        unknown, none = np.zeros_like(keep), np.zeros((len(keep), 2 * sets.regions + 3))
        return PublishedBlock(keep, unknown, 0 * sets.region, sets.salient, sets.regions, none, unknown, values)

    return run_blocks(weight, gram, common, one)


def arb_linear(weight: Floats, gram: Floats, common: Blockwise, choices: ArbChoices) -> ReferenceLinear:
    """ARB-LLM: BiLLM's sets (and regions of the salient columns), then the alternations of the variant."""

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        current, keep = prune(before, columns, upper, weight, gram, common, choices.score, choices.prune_compensation)
        partition = find_partition(current, keep, upper.diagonal(), common.salient_columns, choices)
        if choices.variant == "rc":
            return row_column_block(current, partition, choices.iterations)
        block = arb_block(current, partition, metric if choices.scales == "alternate" else None, choices)
        if choices.scales == "gram":
            block.refit(before, metric)
        return block

    return run_blocks(weight, gram, common, one)


# --- STBLLM as released -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReleasedChoices:
    """The options of the released STBLLM, named as in the package."""

    score: str = "ria"
    activation_exponent: float = 0.5
    candidates: int = 160


def released_salient(saliency: Floats, ranking: Sequence[int], limit: int) -> Bools:
    """The count of columns whose two sides, both binarized twice, leave the least error of the saliency."""
    everything = np.ones(saliency.shape[1], dtype=bool)
    best, best_error = np.zeros_like(everything), np.inf
    for count in range(1, min(limit, len(ranking) - 1) + 1):
        salient = np.isin(np.arange(len(ranking)), ranking[:count])
        error = 0.0
        for row in saliency:
            for side in (salient, ~salient):
                error += squared_error(row, side, binarize_row_twice(row, side).value)
        if error < best_error:
            best, best_error = salient, error
    return best


def released_regions(
    saliency: Floats, salient: Bools, candidates: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """0 below p1, 1 from p1 on, 2 from 2·p1 on; percentiles of the block with zeros for the salient columns."""
    values = np.quantile(np.abs(np.where(salient, 0.0, saliency)), np.linspace(0.1, 0.9, candidates))
    best, best_error = np.full(saliency.shape, 2), np.inf
    for p in values:
        if 2 * p > values[-1]:
            continue
        region = (saliency >= p).astype(np.int64) + (saliency >= 2 * p)
        error = 0.0
        for i, row in enumerate(saliency):
            for r in range(3):
                mask = ~salient & (region[i] == r)
                error += squared_error(row, mask, binarize_row(row, mask).value)
        if error < best_error:
            best, best_error = region, error
    return best


def residual_ties(row: Floats, mask: Bools) -> Bools:
    """Weights that order 2 leaves in the middle of its two values, as it does when half of a salient row is pruned."""
    left = row - binarize_row(row, mask).value
    return mask & (np.abs(left - left[mask].mean()) < 1e-9) if mask.any() else mask


def released_linear(weight: Floats, gram: Floats, common: Blockwise, choices: ReleasedChoices) -> ReferenceLinear:
    """Prune everything, then binarize everything, pruned or not."""
    inverse = damped_inverse(gram, common.damping)
    scores = score(
        choices.score, weight, slice(None), weight, gram, inverse, choices.activation_exponent, standardize=False
    )
    pruned = np.where(nm_mask(scores, common.n, common.m), weight, 0.0)

    def one(before: Floats, columns: slice, upper: Floats, metric: Floats) -> ReferenceBlock:
        everything = np.ones(before.shape, dtype=bool)
        diagonal = upper.diagonal()
        saliency = before**2 / diagonal**2
        salient = np.zeros(before.shape[1], dtype=bool)
        if common.salient_columns:
            salient = released_salient(saliency, rank_columns(before, diagonal), common.salient_columns)
        region = released_regions(saliency, salient, choices.candidates)
        # region_of() of these gives the regions back
        block = binarize_block(before, everything, salient, region.astype(np.float64), (0.5, 1.5), "trisection")
        block.moot |= np.array([residual_ties(row, salient) for row in before])
        return block

    return run_blocks(pruned, gram, common, one)
