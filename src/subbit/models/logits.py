"""How much of a softmax over a vocabulary to compute at a time."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rows_at_once"]

CACHED = 1 << 20  # numbers: in a processor's cache a softmax is three times as fast
ON_GPU = 1 << 27  # numbers: half a gigabyte


def rows_at_once(logits: Tensor) -> int:
    """How many rows of ``logits`` (tokens, vocabulary) to take a softmax of at a time; at least 1."""
    return max(1, (CACHED if logits.is_cpu else ON_GPU) // logits.shape[-1])
