"""RTN, round to nearest: every weight to the next point of an even grid. The baseline of every quantization paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subbit.binary.compensate import InverseFactor
from subbit.binary.nm import Sparsity
from subbit.linears import UniformLinear, uniform_values
from subbit.methods.options import check_unpruned

__all__ = ["Bits", "RtnOptions", "check_group_size", "fit_grid", "fit_grids", "nearest_codes", "rtn"]

Bits = Literal[1, 2, 3, 4]

# The search of GPTQ's code (quant.py, `mse`): shrink the range by up to 80 %, errors to the power of 2.4.
SHRINK_STEPS, SHRINK_GRID, ERROR_POWER = 80, 100, 2.4


@dataclass(frozen=True)
class RtnOptions:
    """Every choice of RTN."""

    bits: Bits = 4  # of a code
    group_size: int = 128  # columns of a row that share a grid; more than a row has: one grid a row
    mse: bool = False  # shrink the range of a grid where that lessens the error, as in GPTQ's code

    damping: ClassVar[float] = 0.01  # of the inverse factor, which every method gets; rounding does not use it

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_unpruned(sparsity, "rtn")
        check_group_size(self.group_size)


def check_group_size(group_size: int) -> None:
    """ValueError unless a group has a column."""
    if group_size < 1:
        raise ValueError(f"group_size {group_size} must be at least 1")


def rtn(weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: RtnOptions) -> UniformLinear:
    """Round one linear to the nearest codes.

    Args:
        weight: (out, in) float32.
        gram: not used, like ``factor``: the weights alone decide.
        sparsity: 1:1.
    """
    scales = fit_grids(weight, options.bits, options.group_size, options.mse)
    parts = enumerate(weight.split(options.group_size, dim=1))
    codes = [nearest_codes(part, scales[:, [group]], options.bits) for group, part in parts]
    return UniformLinear(options.bits, options.group_size, torch.cat(codes, dim=1), scales)


def fit_grids(weight: Tensor, bits: int, group_size: int, mse: bool) -> Tensor:
    """(out, groups, 2) float16: the grid of every (row, group) of ``weight`` (out, in), see :func:`fit_grid`."""
    return torch.stack([fit_grid(group, bits, mse) for group in weight.split(group_size, dim=1)], dim=1)


def fit_grid(weight: Tensor, bits: int, mse: bool) -> Tensor:
    """The grid of every row of one group: from the smallest to the largest weight.

    Args:
        weight: (rows, k) float32.
        mse: try to shrink the range towards zero, 80 sizes as in GPTQ's code, and keep the one with the least error.

    Returns:
        (rows, 2) float16: minimum, step. The step of a row of equal weights is what the float16 minimum lacks of them.
    """
    low, high = weight.aminmax(dim=1)
    best = even_grid(low, high, bits)
    if not mse:
        return best
    least = grid_error(weight, best, bits)
    for step in range(1, SHRINK_STEPS):
        size = 1 - step / SHRINK_GRID
        grid = even_grid(size * low, size * high, bits)
        error = grid_error(weight, grid, bits)
        better = error < least
        best, least = torch.where(better[:, None], grid, best), torch.where(better, error, least)
    return best


def even_grid(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """(rows, 2) float16 minimum and step from ``low`` to ``high`` (rows,); the step starts at the rounded minimum."""
    minimum = low.half()
    step = (high - minimum.float()).clamp_min(0) / (2**bits - 1)
    return torch.stack([minimum, step.half()], dim=1)


def grid_error(weight: Tensor, grid: Tensor, bits: int) -> Tensor:
    """(rows,) Σ|w − ŵ|^2.4 of the nearest values."""
    scales = grid[:, None]
    value = uniform_values(scales, nearest_codes(weight, scales, bits))
    return (weight - value).abs().pow(ERROR_POWER).sum(dim=1)


def nearest_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """uint8 codes of ``weight`` (...) on its grids ``scales`` (..., 2), which broadcast; 0 where the step is 0."""
    minimum, step = scales.float().unbind(-1)
    places = torch.where(step > 0, (weight - minimum) / step, 0.0)
    return places.round().clamp(0, 2**bits - 1).to(torch.uint8)
