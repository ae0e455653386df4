"""The torch backend: unpack a tile of rows, multiply, forget it. Correct everywhere, fast nowhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subbit.packing.spec import LinearSpec

__all__ = ["packed_linear"]

TILE_WEIGHTS = 1 << 19  # dense weights in memory at a time


def packed_linear(
    inputs: Tensor,
    spec: LinearSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    decode: Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """``inputs`` (..., in) times the packed weight, (..., out) in the dtype of ``inputs``.

    The dense matrix exists only a tile of rows at a time.

    Args:
        decode: gives the dense rows, float32, where there is something faster than ``spec.decode_rows``.
    """
    rows_at_once = max(1, TILE_WEIGHTS // spec.in_features)
    output = inputs.new_empty(*inputs.shape[:-1], spec.out_features)
    for start in range(0, spec.out_features, rows_at_once):
        rows = slice(start, start + rows_at_once)
        dense = spec.decode_rows(spec.row_slice(tensors, rows)) if decode is None else decode(rows)
        tile = dense.to(inputs.dtype)
        part = None if bias is None else bias[rows].to(inputs.dtype)
        output[..., rows] = torch.nn.functional.linear(inputs, tile, part)
    return output
