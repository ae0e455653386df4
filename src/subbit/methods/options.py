"""What the options of every method have, and the limits that several of them share."""

from __future__ import annotations

import math
from typing import Protocol

from subbit.binary.nm import Sparsity

__all__ = ["MethodOptions", "SearchOptions", "check_blocks", "check_damping", "check_unpruned"]


class MethodOptions(Protocol):
    """A frozen dataclass whose fields become the ``options`` section of the recipe."""

    @property
    def damping(self) -> float:
        """λ of the inverse factor that the method gets."""

    def check(self, sparsity: Sparsity) -> None:
        """Limits that the types of the fields cannot say; ValueError, one line."""


class SearchOptions(Protocol):
    """The options of the methods that binarize block by block and search for columns and thresholds."""

    @property
    def block_size(self) -> int: ...

    @property
    def damping(self) -> float: ...

    @property
    def candidates(self) -> int: ...

    @property
    def salient_columns(self) -> int: ...


def check_blocks(options: SearchOptions, sparsity: Sparsity) -> None:
    """ValueError unless blocks hold whole groups, the damping is one, and the searches have something to try."""
    if options.block_size < sparsity.m or options.block_size % sparsity.m:
        raise ValueError(f"block_size {options.block_size} must be a multiple of M = {sparsity.m}")
    check_damping(options.damping)
    if options.candidates < 1 or options.salient_columns < 0:
        raise ValueError("candidates must be at least 1 and salient_columns at least 0")


def check_damping(damping: float) -> None:
    """ValueError unless 0 < damping < ∞."""
    if not 0 < damping < math.inf:
        raise ValueError(f"damping {damping} must be positive and finite")


def check_unpruned(sparsity: Sparsity, method: str) -> None:
    """ValueError for a method that keeps every weight."""
    if not sparsity.dense:
        raise ValueError(f"sparsity {sparsity}: {method} keeps every weight; leave the sparsity out, or say none")
