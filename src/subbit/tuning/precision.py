"""Mixed precision: matrix products in bfloat16 where the hardware is made for them, all else in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Precision", "has_matrix_units", "mixed_precision", "product_dtype", "resolve_precision"]

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; ``auto`` is bfloat16 where the hardware has instructions for it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def has_matrix_units() -> bool:
    """Whether this machine multiplies bfloat16 matrices many times as fast as float32 ones: a GPU, or AMX."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch before 2.7 may not say
    return torch.cuda.is_available() or bool(amx and amx())


def mixed_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products are in ``dtype``; parameters, gradients and sums stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def product_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype of a product with ``inputs`` in here: that of :func:`mixed_precision`, or their own."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
