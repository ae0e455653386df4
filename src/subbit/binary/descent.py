"""Codewords chosen against the whole Gram: exact descent over groups, and closed forms for the scales.

With Ŵ = r_i · c_j · z_ij the output error of a linear is tr((W − Ŵ) H (W − Ŵ)ᵀ). All of this is written for columns
that have been divided by c already: weight W/c and metric c·H·c, so that only r and z are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subbit.binary.codebook import sign_codebook
from subbit.binary.nm import Sparsity

__all__ = ["descend", "nearest_codewords", "round_sequentially", "solve_column_scales", "solve_row_scales"]

BLOCK = 128  # columns whose updates are kept back, so that the large matrix is updated by matrix products
ENTRIES = 1 << 22  # scores in memory at a time
SMALLEST = 1e-7  # of z H zᵀ, relative to what it was if nothing cancelled: less is noise of float32


def nearest_codewords(slope: Tensor, metric: Tensor, row_scales: Tensor, sparsity: Sparsity) -> Tensor:
    """(rows, M) float32: for every row the codeword z that minimizes r²·z S zᵀ − 2·r·z·slope, exactly.

    Args:
        slope: (rows, M), S times the target.
        metric: (M, M), S.
        row_scales: (rows,), of any sign.
    """
    words = sign_codebook(sparsity.n, sparsity.m).to(slope.device)
    size = row_scales.abs()
    energy = ((words @ metric) * words).sum(dim=1)
    best = []
    step = max(1, ENTRIES // len(words))
    for first in range(0, len(slope), step):
        rows = slice(first, first + step)
        product = slope[rows] @ words.T
        cost = torch.addcmul(product.abs(), energy, size[rows, None], value=-0.5)  # the larger the better
        index = cost.argmax(dim=1)
        negative = (product.gather(1, index[:, None]) < 0) ^ (row_scales[rows, None] < 0)
        sign = torch.where(negative, -1.0, 1.0)
        best.append(words[index] * sign)
    return torch.cat(best)


def round_sequentially(weight: Tensor, upper: Tensor, row_scales: Tensor, sparsity: Sparsity) -> Tensor:
    """(out, in) float32 codewords, group after group, later columns absorbing every group's error (GPTQ).

    Args:
        weight: (out, in) float32, not changed.
        upper: (in, in) float32, U with UᵀU = (damped H)⁻¹.
        row_scales: (out,).
    """
    weight = weight.clone()
    signs = torch.empty_like(weight)
    m = sparsity.m
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        spread = torch.empty_like(weight[:, start:end])
        for first in range(start, end, m):
            group = slice(first, first + m)
            inverse = torch.linalg.inv(upper[group, group])
            metric = inverse @ inverse.T
            signs[:, group] = nearest_codewords(weight[:, group] @ metric, metric, row_scales, sparsity)
            error = (weight[:, group] - row_scales[:, None] * signs[:, group]) @ inverse
            spread[:, first - start : first - start + m] = error
            weight[:, first + m : end] -= error @ upper[group, first + m : end]
        weight[:, end:] -= spread @ upper[start:end, end:]
    return signs


def descend(weight: Tensor, gram: Tensor, signs: Tensor, row_scales: Tensor, sparsity: Sparsity) -> Tensor:
    """One sweep of exact group descent; returns better ``signs`` (out, in), never worse ones.

    Every group in turn takes the codeword that is best for all else as it stands, out of all codewords.

    Args:
        weight: (out, in) float32.
        gram: (in, in) float32, H.
        signs: (out, in) float32, z; not changed.
        row_scales: (out,) float32, r.
    """
    signs = signs.clone()
    scale = row_scales[:, None]
    slope = (weight - scale * signs) @ gram  # of the error: E·H
    m = sparsity.m
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        before = signs[:, start:end].clone()
        local = slope[:, start:end].clone()
        for first in range(0, end - start, m):
            group = slice(start + first, start + first + m)
            metric = gram[group, group]
            old = signs[:, group]
            target = local[:, first : first + m] + scale * (old @ metric)
            new = nearest_codewords(target, metric, row_scales, sparsity)
            local += (scale * (old - new)) @ gram[group, start:end]
            signs[:, group] = new
        slope += (scale * (before - signs[:, start:end])) @ gram[start:end]
    return signs


def solve_row_scales(weight: Tensor, gram: Tensor, signs: Tensor) -> Tensor:
    """(out,) float32: r_i = z H wᵀ / z H zᵀ, the best scale of every row; 0 for a row without signal."""
    product = signs @ gram
    least = SMALLEST * (signs.square() @ gram.diagonal())
    return (product * weight).sum(dim=1) / (product * signs).sum(dim=1).maximum(least).clamp_min(1e-30)


def solve_column_scales(weight: Tensor, gram: Tensor, scaled: Tensor) -> Tensor:
    """(in,) float32: the c that minimizes tr((W − Z̃·diag(c)) H (…)ᵀ), for Z̃ = r·z (out, in).

    Its normal equations are (H ∘ Z̃ᵀZ̃) c = diag(Z̃ᵀ W H), with a ridge ρ·‖c − 1‖² towards what they are without: a column
    that no token reaches keeps its scale.
    """
    system = (gram * (scaled.T @ scaled)).double()
    right = (scaled * (weight @ gram)).sum(dim=0).double()
    diagonal = system.diagonal()
    ridge = 1e-4 * diagonal.mean() + 1e-30
    diagonal += ridge
    right += ridge  # the same on both sides, so that it moves no solution of 1
    return torch.linalg.solve(system, right).float()
