"""N:M sparsity: which N of every M consecutive input weights of a row are kept, and the scores that choose them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subbit.errors import UserError

__all__ = [
    "GROUP_SIZES",
    "PRUNING_SCORES",
    "PruningScore",
    "ScoreStatistics",
    "Sparsity",
    "keep_top",
    "score_statistics",
]

GROUP_SIZES = (4, 8, 16)
PruningScore = Literal["magnitude", "wanda", "sparsegpt", "obs", "ria", "si"]
PRUNING_SCORES: tuple[PruningScore, ...] = ("magnitude", "wanda", "sparsegpt", "obs", "ria", "si")


@dataclass(frozen=True)
class Sparsity:
    """N:M sparsity: ``n`` of every ``m`` consecutive weights of a row are **kept** (the papers' 4:8 keeps four)."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """Read ``"4:8"``; raises UserError unless 1 <= N < M and M is 4, 8 or 16.

        ``"none"``, or ``"1:1"``, keeps every weight.
        """
        if re.fullmatch(r"\s*(none|1\s*:\s*1)\s*", text):
            return cls(1, 1)
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if not match:
            raise UserError(
                f"sparsity {text!r} is not of the form N:M, for example 4:8 (4 of every 8 weights are kept)"
            )
        sparsity = cls(int(match[1]), int(match[2]))
        if sparsity.m not in GROUP_SIZES:
            raise UserError(f"sparsity {text!r}: M must be one of {', '.join(map(str, GROUP_SIZES))}")
        if not 1 <= sparsity.n < sparsity.m:
            raise UserError(
                f"sparsity {text!r}: N weights of every M are kept, so N must be between 1 and {sparsity.m - 1}"
            )
        return sparsity

    @property
    def dense(self) -> bool:
        """Whether every weight is kept."""
        return self.n == self.m

    @property
    def density(self) -> float:
        """Kept weights / weights."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def keep_top(score: Tensor, n: int, m: int) -> Tensor:
    """Keep-mask (bool, shape of ``score`` (rows, columns)) of the N highest scores in every group of M columns.

    Ties go to the lower column, so that the mask is the same on every machine.
    """
    rows, columns = score.shape
    order = score.reshape(rows, columns // m, m).sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(order, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :n], True).reshape(rows, columns)


@dataclass(frozen=True)
class ScoreStatistics:
    """What a pruning score needs to know of the whole linear, so that it can be taken block by block.

    The statistics are those of the original weights; the weights scored are the current, compensated ones.
    """

    kind: PruningScore
    column_factor: Tensor  # (in,) float32: multiplies every score of a column
    row_sum: Tensor  # (out,) float32: Σ_j |W_ij|, used by ria and si
    column_sum: Tensor  # (in,) float32: Σ_i |W_ij|
    mean: float  # of the relative importance over the linear: si only
    std: float

    def score(self, weight: Tensor, columns: slice) -> Tensor:
        """Scores (rows, k) of the current block ``weight`` (rows, k) that stands at ``columns``."""
        size = weight.abs()
        if self.kind in ("sparsegpt", "obs"):
            size = size.square()
        elif self.kind in ("ria", "si"):
            size = (relative_importance(size, self.row_sum, self.column_sum[columns]) - self.mean) / self.std
        return size * self.column_factor[columns]


def relative_importance(size: Tensor, row_sum: Tensor, column_sum: Tensor) -> Tensor:
    """``|W_ij| / Σ_j|W_ij| + |W_ij| / Σ_i|W_ij|`` (RIA, ICLR 2024; STBLLM's μ(|W_ij|), section 3.2). All zero-safe."""
    return size / row_sum.clamp_min(1e-30)[:, None] + size / column_sum.clamp_min(1e-30)


def score_statistics(
    kind: PruningScore,
    weight: Tensor,
    gram: Tensor,
    inverse_factor: Tensor,
    activation_exponent: float = 1.0,
    standardize: bool = True,
) -> ScoreStatistics:
    """Prepare one of the pruning scores for a linear.

    Args:
        kind: ``magnitude`` |w|; ``wanda`` |w|·‖x_j‖; ``sparsegpt`` w²/U_jj²; ``obs`` w²/[H⁻¹]_jj (PBS²P's fine search);
            ``ria`` (relative importance)·‖x_j‖^a; ``si`` STBLLM's Standardized Importance, which
            standardizes the relative importance first.
        weight: (out, in) float32, original.
        gram: (in, in) float32, H = XᵀX / tokens; ‖x_j‖ is √H_jj, a common factor apart.
        inverse_factor: (in, in) upper factor U with UᵀU = H⁻¹.
        activation_exponent: a, for ria and si. STBLLM's paper has 1, its code 0.5.
        standardize: for si: subtract the mean over the linear and divide by the standard deviation, as the paper has
            it. Without it si is ria.
    """
    norm = gram.diagonal().clamp_min(0).sqrt()
    factor = {
        "magnitude": torch.ones_like(norm),
        "wanda": norm,
        "sparsegpt": inverse_factor.diagonal().square().reciprocal(),
        "obs": inverse_factor.square().sum(dim=0).reciprocal(),
        "ria": norm**activation_exponent,
        "si": norm**activation_exponent,
    }[kind]
    row_sum, column_sum = weight.abs().sum(dim=1), weight.abs().sum(dim=0)
    mean, std = 0.0, 1.0
    if kind == "si" and standardize:
        relative = relative_importance(weight.abs(), row_sum, column_sum)
        mean, std = float(relative.mean()), max(float(relative.std()), 1e-30)
    return ScoreStatistics(kind, factor, row_sum, column_sum, mean, std)
