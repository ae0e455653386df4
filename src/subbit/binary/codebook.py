"""The codewords of N:M: which N of a group's M weights are kept, and their signs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["kept_columns", "sign_codebook"]


@lru_cache(maxsize=64)
def kept_columns(n: int, m: int) -> Tensor:
    """(C(M, N), N) int64: the kept columns of every mask, in ascending order of their bit patterns."""
    patterns = torch.arange(2**m)
    bits = (patterns[:, None] >> torch.arange(m)) & 1
    chosen = bits[bits.sum(dim=1) == n]
    return chosen.nonzero()[:, 1].reshape(-1, n)


@lru_cache(maxsize=64)
def sign_codebook(n: int, m: int) -> Tensor:
    """(C(M, N) · 2^(N−1), M) float32: every codeword up to its sign; the first kept weight is +1."""
    masks = kept_columns(n, m)
    signs = 1.0 - 2.0 * ((torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n - 1)) & 1)
    signs = torch.cat([torch.ones(len(signs), 1), signs], dim=1)
    words = torch.zeros(len(masks), len(signs), m)
    words.scatter_(2, masks[:, None, :].expand(-1, len(signs), -1), signs.expand(len(masks), -1, -1))
    return words.flatten(0, 1)
