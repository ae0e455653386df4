"""Which columns are salient, and where to split the rest by size: exact searches with sorted prefix sums.

The squared error of an order-1 binarization of a set is Σw² − nμ² − A²/n with A = Σ|w − μ| = 2·Σ_{w>μ}(w − μ). With the
row sorted by value, every set that these searches try is a few index ranges, so its n, μ and A come from prefix sums:
no candidate is ever binarized. All in float64, since the differences between candidates are small.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["REGIONS", "Grouping", "assign_regions", "rank_columns", "search_salient_count", "search_split"]

Grouping = Literal["none", "bell", "trisection"]
REGIONS: dict[Grouping, int] = {"none": 1, "bell": 2, "trisection": 3}

ROWS_AT_ONCE = 256  # keeps the temporaries of a search in the cache


def candidate_thresholds(values: Tensor, mask: Tensor, candidates: int) -> Tensor:
    """(candidates,) float64: percentiles of |values| over ``mask``, evenly between the 10th and the 90th."""
    size = values[mask].abs().sort().values.double()
    position = torch.linspace(0.1, 0.9, candidates, dtype=torch.float64, device=values.device) * (len(size) - 1)
    low = position.floor().long()
    high = (low + 1).clamp_max(len(size) - 1)
    return torch.lerp(size[low], size[high], position - low)


def search_split(values: Tensor, mask: Tensor, grouping: Grouping, candidates: int) -> tuple[float, ...]:
    """Thresholds on |values| that split the masked entries in regions with the least squared error.

    One threshold for ``bell`` (BiLLM, section 3.3), two with p2 = 2·p1 for ``trisection`` (STBLLM, algorithm 2), none
    for ``none``. The thresholds hold for the whole block, each region is binarized per row.

    Args:
        values: (rows, k) what is binarized for the comparison.
        mask: (rows, k) bool, the entries that count.
        candidates: how many values of the first threshold are tried.
    """
    if grouping == "none" or not bool(mask.any()):
        return ()
    first = candidate_thresholds(values, mask, candidates)
    boundaries = torch.stack([first * 2**i for i in range(REGIONS[grouping] - 1)])
    gain = torch.zeros_like(first)
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        gain += split_gain(values[rows], mask[rows], boundaries)
    return tuple(boundaries[:, int(gain.argmax())].tolist())


def split_gain(values: Tensor, mask: Tensor, boundaries: Tensor) -> Tensor:
    """(candidates,) Σ over rows and regions of nμ² + A²/n: what each candidate split saves of Σw².

    Args:
        boundaries: (regions − 1, candidates) ascending thresholds on |values|.
    """
    ordered = torch.where(mask, values, torch.inf).sort(dim=1).values.double()
    zero = ordered.new_zeros(len(ordered), 1)
    prefix = torch.cat([zero, torch.where(ordered.isfinite(), ordered, 0.0).cumsum(dim=1)], dim=1)
    shape = (len(ordered), boundaries.shape[1])
    below = [torch.searchsorted(ordered, (-b).expand(shape).contiguous()) for b in boundaries]
    upto = [torch.searchsorted(ordered, b.expand(shape).contiguous(), right=True) for b in boundaries]
    below.append(torch.zeros(shape, dtype=torch.int64, device=values.device))
    upto.append(mask.sum(dim=1, keepdim=True).expand(shape))
    total = range_gain(ordered, prefix, [(below[0], upto[0])])
    for inner in range(len(boundaries)):
        total += range_gain(ordered, prefix, [(below[inner + 1], below[inner]), (upto[inner], upto[inner + 1])])
    return total


def range_gain(ordered: Tensor, prefix: Tensor, ranges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(candidates,) Σ over rows of nμ² + A²/n for the union of index ranges [low, high) of the sorted row."""
    count = sum(high - low for low, high in ranges)
    total = sum(prefix.gather(1, high) - prefix.gather(1, low) for low, high in ranges)
    assert isinstance(count, Tensor)
    assert isinstance(total, Tensor)
    size = count.clamp_min(1).double()
    mean = total / size
    cut = torch.searchsorted(ordered, mean, right=True)
    above_count = torch.zeros_like(count)
    above = torch.zeros_like(total)
    for low, high in ranges:
        low, high = torch.maximum(low, cut), torch.maximum(high, cut)
        above_count += high - low
        above += prefix.gather(1, high) - prefix.gather(1, low)
    deviation = 2 * (above - above_count * mean)
    return ((total.square() + deviation.square()) / size).sum(dim=0)


def assign_regions(values: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """(rows, k) uint8: 0 for |value| <= the first threshold (*dense*), and up to the last (*sparse*)."""
    size = values.abs().double()
    region = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for threshold in thresholds:
        region += size > threshold
    return region


def rank_columns(weight: Tensor, upper_diagonal: Tensor) -> Tensor:
    """(k,) int64: the block's columns by Σ_rows w² / U_jj², most salient first (BiLLM, section 3.2)."""
    saliency = (weight / upper_diagonal).square().sum(dim=0)
    return saliency.sort(descending=True, stable=True).indices


def search_salient_count(weight: Tensor, mask: Tensor, ranking: Tensor, limit: int, order: int = 2) -> int:
    """How many of the best-ranked columns to binarize twice: 1 … limit, least squared error of the whole block.

    Args:
        weight: (rows, k).
        mask: (rows, k) bool, the kept weights.
        ranking: (k,) int64 from :func:`rank_columns`.
        limit: at most this many; 0 turns salient columns off.
        order: 1: they are binarized once, apart from the others.
    """
    limit = min(limit, weight.shape[1] - 1)
    if limit < 1:
        return 0
    error = torch.zeros(limit, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        values, kept = weight[rows][:, ranking].double(), mask[rows][:, ranking]
        error += salient_error(values[:, :limit], kept[:, :limit], order) + rest_error(values, kept, limit)
    return int(error.argmin()) + 1


def salient_error(head: Tensor, kept: Tensor, order: int) -> Tensor:
    """(limit,) Σ over rows of the error of that order of the first 1, 2, … limit columns of ``head`` (rows, limit)."""
    limit = head.shape[1]
    first = torch.ones(limit, limit, dtype=torch.bool, device=head.device).tril()[:, :, None]  # [count − 1, column]
    # Rows last: the sums over columns then run over contiguous memory.
    chosen = (kept.T & first).double()
    size = chosen.sum(dim=1, keepdim=True).clamp_min(1)
    left = chosen * head.T
    for _ in range(order):
        left -= left.sum(dim=1, keepdim=True) / size * chosen
        left -= (left.abs().sum(dim=1, keepdim=True) / size) * torch.where(left >= 0, 1.0, -1.0) * chosen
    return left.square().sum(dim=(1, 2))


def rest_error(values: Tensor, kept: Tensor, limit: int) -> Tensor:
    """(limit,) Σ over rows of the order-1 error of all columns but the first 1, 2, … limit; ``values`` (rows, k)."""
    values = torch.where(kept, values, 0.0)
    # Column c of the reversed cumulative sums holds the set of the columns from c on.
    count = kept.double().flip(1).cumsum(1).flip(1)[:, 1 : limit + 1]
    total = values.flip(1).cumsum(1).flip(1)[:, 1 : limit + 1]
    square = values.square().flip(1).cumsum(1).flip(1)[:, 1 : limit + 1]
    size = count.clamp_min(1)
    mean = total / size
    tail = torch.where(kept[:, limit:], values[:, limit:], torch.inf).sort(dim=1).values
    prefix = torch.where(tail.isfinite(), tail, 0.0).cumsum(dim=1)
    prefix = torch.cat([prefix.new_zeros(len(prefix), 1), prefix], dim=1)
    cut = torch.searchsorted(tail, mean.contiguous(), right=True)
    tail_count = kept[:, limit:].sum(dim=1, keepdim=True)
    above = prefix[:, -1:] - prefix.gather(1, cut) - (tail_count - cut) * mean
    outside = torch.ones(limit, limit, dtype=torch.bool, device=values.device).triu(1)
    head = (values[:, None, :limit] - mean[:, :, None]).clamp_min(0)
    above += (head * (kept[:, None, :limit] & outside)).sum(dim=2)
    return (square - (total.square() + 4 * above.square()) / size).sum(dim=0)
