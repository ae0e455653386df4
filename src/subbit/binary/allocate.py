"""Layer-wise N:M: importance decides the order, an exact allocator the numbers."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

__all__ = [
    "AllocationKind",
    "Spread",
    "allocate",
    "allocate_bytes",
    "cosine_importance",
    "outlier_share",
    "ranks",
    "spread_importance",
]

AllocationKind = Literal["uniform", "sine", "l2", "outliers", "cosine", "budget"]
Spread = Literal["value", "rank"]

SMALLEST_COSINE = 1e-2  # a layer that turns its input around counts as a hundred times the average, not as infinite


def cosine_importance(before: Tensor, after: Tensor) -> float:
    """1 / cosine similarity of a decoder layer's input and output (tokens, hidden), mean over tokens (PBS²P, eq. 12).

    A layer that changes its input little is redundant. Zero and negative similarities count as 0.01.
    """
    dot = (before * after).sum(dim=-1)
    norm = before.norm(dim=-1) * after.norm(dim=-1)
    return 1 / max(float((dot / norm.clamp_min(1e-12)).mean()), SMALLEST_COSINE)


def outlier_share(weight: Tensor, activation_norm: Tensor) -> float:
    """Share of the entries of |W|·‖x_j‖ above six times their mean (OWL, arXiv 2310.05175; STBLLM's code)."""
    metric = weight.abs() * activation_norm
    return float((metric > 6 * metric.mean()).float().mean())


def spread_importance(importance: Sequence[float], n_low: float, n_high: float) -> list[float]:
    """Real-valued N of every unit: N_low for the least important … N_high for the most (PBS²P, eq. 14)."""
    least, most = min(importance), max(importance)
    if most - least < 1e-12:
        return [(n_low + n_high) / 2] * len(importance)
    return [n_low + (n_high - n_low) * (value - least) / (most - least) for value in importance]


def ranks(importance: Sequence[float]) -> list[float]:
    """Places in the order of importance, from the least on; equal ones share theirs.

    One unit that is far more important than all others, often the first decoder layer, leaves no difference between
    these when values are spread; their places are as far apart as any.
    """
    order = sorted(importance)
    return [(bisect_left(order, value) + bisect_right(order, value) - 1) / 2 for value in importance]


def allocate(desired: Sequence[float], sizes: Sequence[int], n: int, m: int) -> list[int]:
    """Whole N_i, 1 … M − 1 (M if ``n`` is M, which prunes nothing), as near to ``desired`` as the target allows.

    The weighted mean of N_i equals ``n`` to within half a step of one unit: starting from the rounded wishes, the unit
    that is furthest below (above) its wish is raised (lowered) as long as that brings the mean closer. Ties go to the
    earlier unit.

    Args:
        desired: real-valued N of every unit (linears that must share one N are one unit).
        sizes: weights of every unit.
        n: the target, N of N:M.
        m: the group size.
    """
    top = max(n, m - 1)
    numbers = [min(max(math.floor(wish + 0.5), 1), top) for wish in desired]
    target = n * sum(sizes)
    while True:
        missing = target - sum(number * size for number, size in zip(numbers, sizes, strict=True))
        step = 1 if missing > 0 else -1
        movable = [i for i, size in enumerate(sizes) if 1 <= numbers[i] + step <= top and size < 2 * abs(missing)]
        if not movable:
            return numbers
        numbers[max(movable, key=lambda i: (step * (desired[i] - numbers[i]), -i))] += step


def allocate_bytes(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which format every unit gets, so that the errors add up to little and the bytes to at most ``budget``.

    Starting from the smallest formats, of several the best, the step with the largest gain for its bytes is taken as
    long as one fits; a step may skip formats that gain less for theirs. Ties go to the earlier unit.

    Args:
        errors: of every unit in each of its formats.
        sizes: bytes, likewise.
        budget: bytes of all units together.

    Returns:
        The number of the format of every unit.

    Raises:
        ValueError: even the smallest formats take more than ``budget``.
    """
    chosen = [min(zip(size, lost, range(len(size)), strict=True))[2] for size, lost in zip(sizes, errors, strict=True)]
    left = budget - sum(unit[step] for unit, step in zip(sizes, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the smallest formats take {budget - left} bytes, more than {budget}")
    while True:
        best: tuple[float, int, int] | None = None
        for unit, now in enumerate(chosen):
            for step in range(len(errors[unit])):
                more, gain = sizes[unit][step] - sizes[unit][now], errors[unit][now] - errors[unit][step]
                if 0 < more <= left and gain > 0 and (best is None or gain / more > best[0]):
                    best = (gain / more, unit, step)
        if best is None:
            return chosen
        _, unit, step = best
        left -= sizes[unit][step] - sizes[unit][chosen[unit]]
        chosen[unit] = step
