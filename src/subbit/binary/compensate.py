"""Error compensation (OBC / GPTQ): later columns absorb what earlier ones lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Compensation", "InverseFactor", "compensate", "inverse_factor", "prune_sequentially"]

Compensation = Literal["off", "diagonal", "exact"]


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor of the damped inverse Gram."""

    upper: Tensor  # (in, in) float32, UᵀU = (H + damping·mean(diag H)·I)⁻¹
    damping: float  # the damping that succeeded; larger than asked for when the Gram was too ill-conditioned


def inverse_factor(gram: Tensor, damping: float = 0.01) -> InverseFactor:
    """U with UᵀU = (H + λ·mean(diag H)·I)⁻¹ (GPTQ, section 3.3), in float64, returned in float32.

    With J the reversal of the columns, J·H·J = LLᵀ gives H = (JLJ)(JLJ)ᵀ, and U is the inverse of the upper factor
    JLJ: one factorization and one triangular inverse instead of GPTQ's three steps. λ grows tenfold until the
    factorization succeeds. A Gram of zeros (no token ever reached the linear) counts as the identity.

    Args:
        gram: (in, in), symmetric, finite.
        damping: λ, relative to the mean of the diagonal.
    """
    size = gram.shape[0]
    H = gram.double()
    mean = float(H.diagonal().mean())
    if mean <= 0:
        return InverseFactor(torch.eye(size, dtype=torch.float32, device=gram.device), damping)
    while True:
        damped = H + damping * mean * torch.eye(size, dtype=torch.float64, device=gram.device)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            break
        damping = max(damping * 10, 1e-4)
    upper = lower.flip(0, 1).contiguous()
    identity = torch.eye(size, dtype=torch.float64, device=gram.device)
    return InverseFactor(torch.linalg.solve_triangular(upper, identity, upper=True).float(), damping)


def compensate(weight: Tensor, error: Tensor, upper: Tensor, start: int, mode: Compensation) -> None:
    """Let the columns after a block absorb the block's ``error`` (rows, k); changes ``weight`` (rows, in) in place.

    ``diagonal`` is what BiLLM, STBLLM and PBS²P do: W[:, e:] −= (error / diag U_bb) · U[b, e:], which forgets that the
    columns of one block could have compensated each other. ``exact`` is the optimum for the error of a whole block,
    W[:, e:] −= error · U_bb⁻¹ · U[b, e:] (OBS with several fixed weights; the two agree for a block of one column).
    """
    if mode == "off":
        return
    end = start + error.shape[1]
    block = upper[start:end, start:end]
    if mode == "diagonal":
        spread = error / block.diagonal()
    else:
        spread = torch.linalg.solve_triangular(block, error, upper=True, left=False)
    weight[:, end:] -= spread @ upper[start:end, end:]


def prune_sequentially(weight: Tensor, keep: Tensor, upper: Tensor) -> Tensor:
    """SparseGPT inside one block: zero the pruned weights column by column, the later columns of the block absorb it.

    Args:
        weight: (rows, k) float32, not changed.
        keep: (rows, k) bool.
        upper: (k, k), the block of U.

    Returns:
        (rows, k) float32: the compensated weights, zero where pruned (SparseGPT, algorithm 1).
    """
    columns = weight.T.contiguous()  # a column of the weight is one contiguous row here
    lost = torch.where(keep.T, 0.0, 1.0) / upper.diagonal()[:, None]
    for j in range(len(columns)):
        columns[j + 1 :].addr_(upper[j, j + 1 :], columns[j] * lost[j], alpha=-1)
    return torch.where(keep, columns.T, 0.0)
