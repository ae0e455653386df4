"""How much faster the exact searches are than binarizing every candidate.

    python benchmarks/search_speed.py --blocks 32 --json speed.json

Two searches run on every block of 128 columns of a random 4096 x 4096 layer with a 4:8 mask: how many salient columns
(1 ... 30), and the trisection split (160 candidates). *direct* is the obvious code, one binarization of the block for
every candidate and region, vectorized over the rows; *sorted* is :mod:`subbit.binary.groups`. Both work in float64 and
must find the same counts and thresholds, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subbit.binary.groups import rank_columns, search_salient_count, search_split
from subbit.binary.nm import keep_top

SIZE, BLOCK = 4096, 128
CANDIDATES, LIMIT = 160, 30
SEARCHES = ("salient count", "trisection")


def random_layer() -> tuple[Tensor, Tensor]:
    """Gaussian weights (float32) with a few large columns, and the mask of the 4 largest of every 8."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
    weight[:, torch.randperm(SIZE, generator=generator)[: SIZE // 64]] *= 4
    return weight, keep_top(weight.abs(), 4, 8)


def binarized(weight: Tensor, mask: Tensor) -> Tensor:
    """The order-1 binarization of every masked row, zero elsewhere."""
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (weight * mask).sum(dim=1, keepdim=True) / count
    centred = (weight - mean) * mask
    scale = centred.abs().sum(dim=1, keepdim=True) / count
    return (mean + scale * torch.where(centred >= 0, 1.0, -1.0)) * mask


def error_of(weight: Tensor, mask: Tensor, order: int = 1) -> float:
    """Squared error of the masked entries, binarized ``order`` times."""
    left = weight * mask
    for _ in range(order):
        left = left - binarized(left, mask)
    return float(left.square().sum())


def direct_count(weight: Tensor, keep: Tensor, ranking: Tensor, limit: int) -> int:
    """The salient-count search, binarizing the block for every count."""
    weight = weight.double()
    best, best_error = 0, math.inf
    for count in range(1, limit + 1):
        salient = torch.zeros(weight.shape[1], dtype=torch.bool)
        salient[ranking[:count]] = True
        error = error_of(weight, keep & salient, order=2) + error_of(weight, keep & ~salient)
        if error < best_error:
            best, best_error = count, error
    return best


def direct_split(weight: Tensor, mask: Tensor, candidates: int) -> tuple[float, float]:
    """The trisection search, binarizing the three regions of the block for every candidate."""
    weight = weight.double()
    size = weight.abs()
    best, best_error = (math.nan, math.nan), math.inf
    for first in np.percentile(size[mask].numpy(), np.linspace(10, 90, candidates)).tolist():
        low, high = size <= first, size > 2 * first
        error = sum(error_of(weight, mask & region) for region in (low, ~low & ~high, high))
        if error < best_error:
            best, best_error = (first, 2 * first), error
    return best


def timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Result and seconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def compare(blocks: int) -> dict[str, dict[str, float]]:
    """Seconds of both ways for each search, over the first ``blocks`` blocks."""
    weight, keep = random_layer()
    seconds = {name: {"direct": 0.0, "sorted": 0.0} for name in SEARCHES}
    for start in range(0, blocks * BLOCK, BLOCK):
        block, mask = weight[:, start : start + BLOCK].clone(), keep[:, start : start + BLOCK].clone()
        ranking = rank_columns(block, torch.ones(BLOCK))
        count, took = timed(search_salient_count, block, mask, ranking, LIMIT)
        seconds[SEARCHES[0]]["sorted"] += took
        expected, took = timed(direct_count, block, mask, ranking, LIMIT)
        seconds[SEARCHES[0]]["direct"] += took
        assert count == expected, f"block at {start}: {count} salient columns, but binarizing all gives {expected}"
        mask[:, ranking[:count]] = False
        thresholds, took = timed(search_split, block, mask, "trisection", CANDIDATES)
        seconds[SEARCHES[1]]["sorted"] += took
        split, took = timed(direct_split, block, mask, CANDIDATES)
        seconds[SEARCHES[1]]["direct"] += took
        assert np.allclose(thresholds, split, rtol=1e-12, atol=0), f"block at {start}: {thresholds}, but {split}"
    return seconds


def report(seconds: dict[str, dict[str, float]], blocks: int) -> dict[str, Any]:
    """Ratios and a total, as written by ``--json``."""
    rows = {name: dict(times) for name, times in seconds.items()}
    rows["total"] = {way: sum(times[way] for times in seconds.values()) for way in ("direct", "sorted")}
    for times in rows.values():
        times["ratio"] = times["direct"] / times["sorted"]
    return {"rows": SIZE, "columns": SIZE, "blocks": blocks, "threads": torch.get_num_threads(), "searches": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help=f"blocks of {BLOCK} columns, at most {SIZE // BLOCK}")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    blocks = min(max(arguments.blocks, 1), SIZE // BLOCK)
    result = report(compare(blocks), blocks)
    print(f"{SIZE} x {SIZE}, {blocks} of {SIZE // BLOCK} blocks, {result['threads']} threads")
    print(f"{'search':<15}{'direct s':>10}{'sorted s':>10}{'ratio':>8}")
    for name, times in result["searches"].items():
        print(f"{name:<15}{times['direct']:>10.2f}{times['sorted']:>10.2f}{times['ratio']:>8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
