"""Scales in closed form: the least output error of a fixed pattern of signs, on a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quadratic_error", "solve_on_gram"]

RIDGE = 1e-7  # relative; breaks ties (a region of one sign) and bounds what a nearly singular metric may ask for


def quadratic_error(error: Tensor, metric: Tensor) -> Tensor:
    """(rows,) e S eᵀ of every row of ``error`` (rows, k) with ``metric`` S (k, k): the output error."""
    return ((error @ metric) * error).sum(dim=1)


def solve_on_gram(basis: Tensor, target: Tensor, metric: Tensor) -> Tensor:
    """(rows, p) float32: coefficients c that minimize (w − cΦ) S (w − cΦ)ᵀ for every row.

    With Φ = (v, m), the signs and the mask of a row, this is PBS²P's joint system
    ``[vᵀSv vᵀSm; vᵀSm mᵀSm] [α; μ] = [vᵀSw; mᵀSw]``; more regions and the residual signs only add rows to Φ.
    A basis vector that is all zero gets the coefficient 0.

    Args:
        basis: (rows, p, k) float32, Φ.
        target: (rows, k) float32, the **unmasked** weights w.
        metric: (k, k) float32, S.
    """
    weighted = basis @ metric
    system = (weighted @ basis.transpose(1, 2)).double()
    right = (weighted @ target[:, :, None]).double()
    # What a basis vector would weigh if its entries did not cancel: the measure of noise in its row of the system.
    own = (basis.abs() @ metric.diagonal().clamp_min(0)).double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(own > 0, RIDGE * own, 1.0)
    factor, info = torch.linalg.cholesky_ex(system)
    failed = info > 0
    if bool(failed.any()):  # float32 noise made a nearly singular system indefinite
        system[failed] += torch.diag_embed(1e3 * RIDGE * own[failed])
        factor[failed] = torch.linalg.cholesky_ex(system[failed]).L
    return torch.cholesky_solve(right, factor)[:, :, 0].float()
