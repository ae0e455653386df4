"""Binarizing a masked row, once (order 1) and twice (order 2, the residual approximation)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Binary", "ResidualBinary", "binarize", "binarize_residual"]


class Binary(NamedTuple):
    """Order 1 over the masked entries of every row: ``shift + scale · sign``."""

    shift: Tensor  # (rows,) μ
    scale: Tensor  # (rows,) α >= 0
    positive: Tensor  # (rows, k) bool: sign is +1; False outside the mask


class ResidualBinary(NamedTuple):
    """Order 2: ``shift + scale · sign + residual_scale · residual_sign``."""

    shift: Tensor  # (rows,)
    scale: Tensor  # (rows,)
    residual_scale: Tensor  # (rows,)
    positive: Tensor  # (rows, k) bool
    residual_positive: Tensor  # (rows, k) bool


def binarize(weight: Tensor, mask: Tensor) -> Binary:
    """Order-1 binarization of ``weight`` (rows, k) over ``mask`` (rows, k) bool.

    μ = mean(w), α = mean|w − μ|: the least squared error for the signs of w − μ (BiLLM, eq. 3-5). A row without
    masked entries gets zeros.
    """
    count = mask.sum(dim=1).clamp_min(1)
    shift = torch.where(mask, weight, 0.0).sum(dim=1) / count
    centred = torch.where(mask, weight - shift[:, None], 0.0)
    return Binary(shift, centred.abs().sum(dim=1) / count, (centred >= 0) & mask)


def binarize_residual(weight: Tensor, mask: Tensor, order: int = 2) -> ResidualBinary:
    """Order-2 binarization: binarize, then binarize what is left, and add (BiLLM, eq. 6-7; STBLLM, section 3.4).

    Args:
        order: 1: what is left stays, and the residual scale is zero.
    """
    first = binarize(weight, mask)
    if order == 1:
        nothing = torch.zeros_like(first.positive)
        return ResidualBinary(first.shift, first.scale, torch.zeros_like(first.scale), first.positive, nothing)
    left = weight - first.shift[:, None] - first.scale[:, None] * torch.where(first.positive, 1.0, -1.0)
    second = binarize(left, mask)
    return ResidualBinary(first.shift + second.shift, first.scale, second.scale, first.positive, second.positive)
