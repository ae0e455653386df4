"""What a method returns: a compressed linear that can say its own dense value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subbit.binary.nm import Sparsity

__all__ = ["CodesLinear", "CompressedLinear", "GroupedBinaryLinear", "level_index", "levels", "scale_count"]


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


def scale_count(regions: int, has_salient: bool) -> int:
    """float16 numbers per (row, block): a shift and a scale for every region, three more for the salient columns."""
    return 2 * regions + (3 if has_salient else 0)


def levels(scales: Tensor, regions: int) -> Tensor:
    """The values that a kept weight can take in its (row, block).

    Args:
        scales: (..., 2R or 2R + 3) float16: R shifts, R scales, then shift, scale and residual scale of the salient
            columns.

    Returns:
        (..., 2R + 4) float32: μ_r − α_r and μ_r + α_r for every region; then, for salient columns,
        μ ∓ α ∓ β in the order (−−, −+, +−, ++). Zeros where there are no salient columns.
    """
    values = scales.float()
    shift, scale = values[..., :regions], values[..., regions : 2 * regions]
    ordinary = torch.stack([shift - scale, shift + scale], dim=-1).flatten(-2)
    if values.shape[-1] == 2 * regions:
        return torch.cat([ordinary, torch.zeros_like(ordinary[..., :1]).expand(*ordinary.shape[:-1], 4)], dim=-1)
    shift, scale, residual = values[..., 2 * regions :].unbind(-1)
    low, high = shift - scale, shift + scale
    return torch.cat(
        [ordinary, torch.stack([low - residual, low + residual, high - residual, high + residual], -1)], -1
    )


def level_index(positive: Tensor, symbol: Tensor, salient: Tensor, regions: int) -> Tensor:
    """Which of :func:`levels` a kept weight takes, int64; ``salient`` (bool) broadcasts against the other two."""
    sign = positive.to(torch.uint8)  # bytes until the end: a quarter of the time of 64-bit arithmetic
    return torch.where(salient, 2 * regions + 2 * sign + symbol, 2 * symbol + sign).long()


@dataclass(frozen=True)
class GroupedBinaryLinear:
    """N:M-sparse binary weights with regions and residual columns (BiLLM, ARB-LLM, STBLLM, PBS²P).

    A kept weight is ``μ + α·sign`` with the μ, α of its (row, block, region); in a salient column it is
    ``μ + α·sign + β·residual sign``. A pruned weight is zero.
    """

    sparsity: Sparsity  # n == m means dense: nothing pruned
    block_size: int  # columns that share scales; the last block may be shorter
    regions: int
    keep: Tensor  # (out, in) bool: exactly n of every m are True
    positive: Tensor  # (out, in) bool: the sign is +1; False where pruned
    symbol: Tensor  # (out, in) uint8: the region, or in a salient column the residual sign (1 is +); 0 where pruned
    salient: Tensor  # (in,) bool
    scales: Tensor  # (out, blocks, scale_count) float16, see levels()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.keep.shape[0], self.keep.shape[1]

    @property
    def has_salient(self) -> bool:
        """Whether the scales carry the three numbers of salient columns."""
        return self.scales.shape[-1] > 2 * self.regions

    def dense(self) -> Tensor:
        """(out, in) float32: the weights. Every kernel and every format must give exactly these numbers."""
        table = levels(self.scales, self.regions)
        index = level_index(self.positive, self.symbol, self.salient, self.regions)
        blocks = [
            table[:, block].gather(1, columns) for block, columns in enumerate(index.split(self.block_size, dim=1))
        ]
        return torch.where(self.keep, torch.cat(blocks, dim=1), 0.0)


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

    def dense(self) -> Tensor:
        """(out, in) float32: (r_i · c_j) · z_ij, exact in float32 since both factors are float16."""
        scale = self.row_scales.float()[:, None]
        if self.column_scales is not None:
            scale = scale * self.column_scales.float()
        return scale * self.signs
