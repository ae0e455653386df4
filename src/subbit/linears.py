"""What a method returns: a compressed linear that can say its own dense value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subbit.binary.nm import Sparsity

__all__ = [
    "CodesLinear",
    "CompressedLinear",
    "GroupedBinaryLinear",
    "UniformLinear",
    "grouped_weight",
    "level_index",
    "levels",
    "scale_count",
    "scale_slots",
    "uniform_values",
]


class CompressedLinear(Protocol):
    """What every type of compressed linear has."""

    @property
    def scales(self) -> Tensor:
        """Its float16 numbers; the pipeline refuses those that are not finite."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def dense(self) -> Tensor:
        """(out, in) float32: the weights. Every kernel and every format must give exactly these numbers."""


def scale_count(regions: int, has_salient: bool, salient_regions: int = 1) -> int:
    """Numbers per (row, block): a shift and a scale for every region, three for every region of the salient columns."""
    return 2 * regions + (3 * salient_regions if has_salient else 0)


def scale_slots(regions: int, count: int) -> list[int]:
    """Which of the ``count`` numbers of a (row, block) are scales, not shifts; in the order of :func:`levels`."""
    triples = range(2 * regions, count, 3)
    return [*range(regions, 2 * regions), *(slot for first in triples for slot in (first + 1, first + 2))]


def levels(scales: Tensor, regions: int) -> Tensor:
    """The values that a kept weight can take in its (row, block).

    Args:
        scales: (..., 2R, 2R + 3 or 2R + 6) float16: R shifts, R scales, then shift, scale and residual scale of the
            salient columns, or of each of their two regions.

    Returns:
        (..., 2R + 4 or 2R + 8) float32: μ_r − α_r and μ_r + α_r for every region; then, for salient columns (each of
        their regions), μ ∓ α ∓ β in the order (−−, −+, +−, ++). Zeros where there are no salient columns.
    """
    values = scales.float()
    shift, scale = values[..., :regions], values[..., regions : 2 * regions]
    ordinary = torch.stack([shift - scale, shift + scale], dim=-1).flatten(-2)
    if values.shape[-1] == 2 * regions:
        return torch.cat([ordinary, torch.zeros_like(ordinary[..., :1]).expand(*ordinary.shape[:-1], 4)], dim=-1)
    shift, scale, residual = values[..., 2 * regions :].unflatten(-1, (-1, 3)).unbind(-1)
    low, high = shift - scale, shift + scale
    twice = torch.stack([low - residual, low + residual, high - residual, high + residual], dim=-1)
    return torch.cat([ordinary, twice.flatten(-2)], dim=-1)


def level_index(positive: Tensor, symbol: Tensor, salient: Tensor, regions: int) -> Tensor:
    """Which of :func:`levels` a kept weight takes, int64; ``salient`` (bool) broadcasts against the other two."""
    sign = positive.to(torch.uint8)  # bytes until the end: a quarter of the time of 64-bit arithmetic
    twice = 2 * regions + 2 * sign + symbol + (symbol & 2)  # four levels for each region of the salient columns
    return torch.where(salient, twice, 2 * symbol + sign).long()


def grouped_weight(
    table: Tensor, index: Tensor, keep: Tensor, block_size: int, column_scales: Tensor | None = None
) -> Tensor:
    """(out, in) float32: every kept weight looked up in the levels of its (row, block), zero elsewhere.

    Args:
        table: (out, blocks, levels) float32, see :func:`levels`.
        index: (out, in) integer, see :func:`level_index`.
        keep: (out, in) bool.
        column_scales: (in,), multiply the values.
    """
    blocks = [table[:, block].gather(1, part.long()) for block, part in enumerate(index.split(block_size, dim=1))]
    weight = torch.where(keep, torch.cat(blocks, dim=1), 0.0)
    return weight if column_scales is None else weight * column_scales.float()


@dataclass(frozen=True)
class GroupedBinaryLinear:
    """N:M-sparse binary weights with regions and residual columns (BiLLM, ARB-LLM, STBLLM, PBS²P).

    A kept weight is ``μ + α·sign`` with the μ, α of its (row, block, region); in a salient column it is
    ``μ + α·sign + β·residual sign``. The salient columns can have two regions as well. With column scales (ARB-LLM_RC)
    every shift μ is zero, and the value is multiplied by the scale of its column. A pruned weight is zero.
    """

    sparsity: Sparsity  # n == m means dense: nothing pruned
    block_size: int  # columns that share scales; the last block may be shorter
    regions: int
    keep: Tensor  # (out, in) bool: exactly n of every m are True
    positive: Tensor  # (out, in) bool: the sign is +1; False where pruned
    # (out, in) uint8: the region; in a salient column the residual sign (1 is +), plus 2 · its region; 0 where pruned
    symbol: Tensor
    salient: Tensor  # (in,) bool
    scales: Tensor  # (out, blocks, scale_count) float16, see levels()
    column_scales: Tensor | None = None  # (in,) float16

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.keep.shape[0], self.keep.shape[1]

    @property
    def has_salient(self) -> bool:
        """Whether the scales carry the three numbers of salient columns."""
        return self.scales.shape[-1] > 2 * self.regions

    @property
    def salient_regions(self) -> int:
        """Regions of the salient columns: 1 or 2; 1 where there are no salient columns."""
        return max(1, (self.scales.shape[-1] - 2 * self.regions) // 3)

    def dense(self) -> Tensor:
        """(out, in) float32: the weights. Every kernel and every format must give exactly these numbers."""
        table = levels(self.scales, self.regions)
        index = level_index(self.positive, self.symbol, self.salient, self.regions)
        return grouped_weight(table, index, self.keep, self.block_size, self.column_scales)


@dataclass(frozen=True)
class CodesLinear:
    """One codeword a group: ŵ_ij = r_i · c_j · z_ij, z in {−1, 0, +1} with exactly N non-zeros of every M."""

    sparsity: Sparsity
    signs: Tensor  # (out, in) int8, z
    row_scales: Tensor  # (out,) float16, r
    column_scales: Tensor | None  # (in,) float16, c; None is one everywhere

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.signs.shape[0], self.signs.shape[1]

    @property
    def scales(self) -> Tensor:
        """(out,) or (out + in,) float16: all of its scales."""
        return self.row_scales if self.column_scales is None else torch.cat([self.row_scales, self.column_scales])

    def size(self) -> Tensor:
        """(out, in) or (out, 1) float32: r_i · c_j, the size of a kept weight."""
        row = self.row_scales.float()[:, None]
        return row if self.column_scales is None else row * self.column_scales.float()

    def dense(self) -> Tensor:
        """(out, in) float32: (r_i · c_j) · z_ij, exact in float32 since both factors are float16."""
        return self.size() * self.signs


def uniform_values(scales: Tensor, codes: Tensor) -> Tensor:
    """minimum + step · code, float32.

    The product of a float16 number and a code below 16 is exact in float32, so it is rounded once, by the addition: a
    kernel gets the same bits with a fused multiply-add and without.

    Args:
        scales: (..., 2) float16: minimum, step.
        codes: (...) uint8, broadcast against ``scales[..., 0]``.
    """
    minimum, step = scales.float().unbind(-1)
    return minimum + step * codes


@dataclass(frozen=True)
class UniformLinear:
    """Codes of a few bits on an even grid (RTN, GPTQ): in every (row, group) ŵ = minimum + step · code.

    The minimum is a float16 number, as in llama.cpp's Q4_1, not the integer zero point of GPTQ's code. That costs
    16 − bits more bits a group, under 1/8 bit a weight for groups of 128, and makes one formula do for every width:
    both ends of the range are on the grid. An integer zero point would put 0 there, one of only two values at 1 bit.
    """

    bits: int  # 1, 2, 3 or 4
    group_size: int  # columns that share a grid; the last group may be shorter
    codes: Tensor  # (out, in) uint8, below 2^bits
    scales: Tensor  # (out, groups, 2) float16: minimum, step

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """(out, in) float32: the weights, see :func:`uniform_values`."""
        parts = enumerate(self.codes.split(self.group_size, dim=1))
        return torch.cat([uniform_values(self.scales[:, [group]], codes) for group, codes in parts], dim=1)
