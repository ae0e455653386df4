"""Mixed precision: matrix products in bfloat16 where the hardware is made for them, all else in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Precision", "Products", "mixed_precision", "product_dtype", "products_here", "resolve_precision"]

Precision = Literal["auto", "float32", "bfloat16"]
Products = Literal["matrix units", "bfloat16", "float32"]


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; ``auto`` is bfloat16 where the hardware has instructions for it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def products_here() -> Products:
    """What this machine multiplies matrices with.

    Matrix units are those of a GPU, or AMX: many times as fast as float32. Instructions for bfloat16 alone (AVX-512
    BF16) are twice as fast.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch before 2.7 may not say
    if torch.cuda.is_available() or (amx and amx()):
        return "matrix units"
    return "bfloat16" if resolve_precision("auto", torch.device("cpu")) == torch.bfloat16 else "float32"


def mixed_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products are in ``dtype``; parameters, gradients and sums stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def product_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype of a product with ``inputs`` in here: that of :func:`mixed_precision`, or their own."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
