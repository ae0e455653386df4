"""codes: one codeword a group, chosen against the whole Gram; below one bit in the file.

No regions, no shifts, no scale for every block: ŵ_ij = r_i · c_j · z_ij. What a codeword loses, the choice of all the
others makes good: groups are visited in turn, each takes the best of all codewords for all else as it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.descent import descend, round_sequentially, solve_column_scales, solve_row_scales
from subbit.binary.nm import Sparsity
from subbit.binary.scales import quadratic_error
from subbit.linears import CodesLinear

__all__ = ["CodesOptions", "codes"]

SMALLEST_COLUMN = 1e-2  # of a column's start scale, relative to the mean: a column of zeros must not divide by zero


@dataclass(frozen=True)
class CodesOptions:
    """The choices of ``codes``."""

    sweeps: int = 4  # visits of every group after the start
    column_scales: bool = True  # one scale a column beside the one a row; 16 / out bits a weight
    damping: float = 0.01  # λ of the start, relative to the mean of the Gram's diagonal

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for values that make no sense."""
        if self.sweeps < 0:
            raise ValueError("sweeps must be at least 0")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping {self.damping} must be positive and finite")


def codes(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: CodesOptions
) -> CodesLinear:
    """Compress one linear to codewords.

    Starts from rounding group by group with compensation, then sweeps; scales are solved in closed form after the
    start and every sweep. With float32 arithmetic the output error never rises from sweep to sweep by more than
    rounding noise.

    Args:
        weight: (out, in) float32; ``in`` a multiple of ``sparsity.m``.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram; used as it is when there are no column scales.
    """
    if not bool(gram.diagonal().sum() > 0):  # no token ever reached the linear: all its inputs count alike
        gram = torch.eye(len(gram), device=gram.device)
    column = start_columns(weight) if options.column_scales else torch.ones_like(weight[0])
    scaled, metric = weight / column, gram * column * column[:, None]
    upper = inverse_factor(metric, options.damping).upper if options.column_scales else factor.upper
    row = start_rows(scaled, sparsity)
    signs = round_sequentially(scaled, upper, row, sparsity)
    row = solve_row_scales(scaled, metric, signs)
    for _ in range(options.sweeps):
        signs = descend(scaled, metric, signs, row, sparsity)
        row = solve_row_scales(scaled, metric, signs)
        if options.column_scales:
            column = column * better_columns(scaled, metric, row[:, None] * signs)
            scaled, metric = weight / column, gram * column * column[:, None]
            row = solve_row_scales(scaled, metric, signs)
    columns = column.half() if options.column_scales else None
    return CodesLinear(sparsity, signs.to(torch.int8), row.half(), columns)


def start_columns(weight: Tensor) -> Tensor:
    """(in,) float32: the size of a column's weights, relative to the mean over the columns."""
    size = weight.square().mean(dim=0).sqrt()
    return (size / size.mean().clamp_min(1e-30)).clamp_min(SMALLEST_COLUMN)


def better_columns(weight: Tensor, metric: Tensor, scaled: Tensor) -> Tensor:
    """(in,) float32 factors of the column scales, the solved ones within bounds, or ones where these are no better."""
    solved = solve_column_scales(weight, metric, scaled).clamp(SMALLEST_COLUMN, 1 / SMALLEST_COLUMN)
    before = quadratic_error(weight - scaled, metric).sum()
    after = quadratic_error(weight - scaled * solved, metric).sum()
    return solved if bool(after < before) else torch.ones_like(solved)


def start_rows(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """(out,) float32: the mean size of the N largest weights of every group."""
    largest = weight.abs().unflatten(1, (-1, sparsity.m)).topk(sparsity.n, dim=2).values
    return largest.mean(dim=(1, 2)).clamp_min(1e-30)
