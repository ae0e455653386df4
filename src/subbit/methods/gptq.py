"""GPTQ (arXiv 2210.17323): round column by column, the columns to the right absorb what each one lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.linears import UniformLinear, uniform_values
from subbit.methods.options import check_damping, check_unpruned
from subbit.methods.rtn import Bits, check_group_size, fit_grid, fit_grids, nearest_codes

__all__ = ["GptqOptions", "gptq"]

LAZY_COLUMNS = 128  # columns whose errors reach the rest of the matrix at once


@dataclass(frozen=True)
class GptqOptions:
    """Every choice of GPTQ."""

    bits: Bits = 4  # of a code
    group_size: int = 128  # columns of a row that share a grid; more than a row has: one grid a row
    damping: float = 0.01  # λ, relative to the mean of the Gram's diagonal
    act_order: bool = False  # columns with large activations first; the grids are then those of the original weights
    mse: bool = False  # shrink the range of a grid where that lessens the error, as in GPTQ's code

    def check(self, sparsity: Sparsity) -> None:
        """ValueError for what the types of the fields cannot say."""
        check_unpruned(sparsity, "gptq")
        check_group_size(self.group_size)
        check_damping(self.damping)


def gptq(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: Sparsity, options: GptqOptions
) -> UniformLinear:
    """Compress one linear with GPTQ (algorithm 1 of the paper).

    The grid of a group is fitted to its current weights when its first column is reached. With ``act_order`` columns
    are taken out of order, so the grids are fitted to the original weights beforehand (``static_groups`` in AutoGPTQ):
    groups stay those of neighbouring columns, and no permutation has to be stored.

    Args:
        weight: (out, in) float32.
        gram: (in, in) float32, H = XᵀX / tokens.
        factor: of the same Gram, with ``options.damping``.
        sparsity: 1:1.
    """
    size = options.group_size
    columns = weight.T.contiguous()  # a column of the weight is one contiguous row here
    scales, order, upper = None, torch.arange(len(columns), device=weight.device), factor.upper
    if options.act_order:
        scales = fit_grids(weight, options.bits, size, options.mse)
        order = gram.diagonal().argsort(descending=True, stable=True)
        upper = inverse_factor(gram[order][:, order], factor.damping).upper
    codes, scales = round_columns(columns[order], upper, (order // size).tolist(), scales, options)
    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return UniformLinear(options.bits, size, codes.T.contiguous(), scales)


def round_columns(
    columns: Tensor, upper: Tensor, groups: list[int], scales: Tensor | None, options: GptqOptions
) -> tuple[Tensor, Tensor]:
    """The loop of GPTQ over columns in the order in which they are rounded.

    Inside a lazy block every error reaches the rest of the block at once; what is behind the block gets the errors of
    all its columns in one product.

    Args:
        columns: (in, out) float32, the weight transposed; changed.
        upper: (in, in), U with UᵀU = (damped H)⁻¹, in the order of ``columns``.
        groups: of every column.
        scales: (out, groups, 2) float16 grids; None: fit those of a group when its first column is reached, for which
            groups must lie one after the other.

    Returns:
        (in, out) uint8 codes, (out, groups, 2) float16 grids.
    """
    codes = torch.empty_like(columns, dtype=torch.uint8)
    fit = scales is None
    if scales is None:
        scales = columns.new_empty(columns.shape[1], groups[-1] + 1, 2, dtype=torch.float16)
    for start, end in lazy_blocks(len(columns), options.group_size):
        lost = torch.empty_like(columns[start:end])
        for j in range(start, end):
            if fit and j % options.group_size == 0:
                current = columns[j : j + options.group_size]
                scales[:, groups[j]] = fit_grid(current.T, options.bits, options.mse)
            grid = scales[:, groups[j]]
            codes[j] = nearest_codes(columns[j], grid, options.bits)
            lost[j - start] = (columns[j] - uniform_values(grid, codes[j])) / upper[j, j]
            columns[j + 1 : end].addr_(upper[j, j + 1 : end], lost[j - start], alpha=-1)
        columns[end:] -= upper[start:end, end:].T @ lost
    return codes, scales


def lazy_blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of blocks of at most 128 columns, in order.

    A group lies in one block or starts one, so that its weights are all up to date when its grid is fitted.
    """
    stride = max(group_size, LAZY_COLUMNS - LAZY_COLUMNS % group_size)
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        for start in range(first, last, LAZY_COLUMNS):
            yield start, min(start + LAZY_COLUMNS, last)
