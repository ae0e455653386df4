"""Random linears of the kind that BiLLM, ARB-LLM, STBLLM and PBS²P return, for the tests of formats and kernels."""

from __future__ import annotations

import torch

from subbit.binary.nm import Sparsity
from subbit.linears import GroupedBinaryLinear, scale_slots


def random_grouped(
    n: int,
    m: int,
    regions: int,
    salient_regions: int,
    columns: bool,
    shape: tuple[int, int] = (5, 208),
    block: int = 64,
) -> GroupedBinaryLinear:
    """Random bits in every field; the second block has no salient columns.

    Args:
        salient_regions: 0: no salient columns at all.
        columns: whether there are column scales instead of shifts.
    """
    generator = torch.Generator().manual_seed(100 * n + m + 10 * regions + salient_regions)
    keep = (torch.rand(shape[0], shape[1] // m, m, generator=generator).argsort(dim=2) < n).reshape(shape)
    salient = torch.rand(shape[1], generator=generator) < 0.2
    salient[block : 2 * block] = False
    salient = salient & (salient_regions > 0)
    low, high = torch.randint(regions, shape, generator=generator), 2 * max(salient_regions, 1)
    symbol = torch.where(salient, torch.randint(high, shape, generator=generator), low)
    count = 2 * regions + 3 * salient_regions
    scales = torch.randn(shape[0], -(-shape[1] // block), count, generator=generator).half()
    if columns:
        shifts = set(range(count)) - set(scale_slots(regions, count))
        scales[..., sorted(shifts)] = 0
    return GroupedBinaryLinear(
        Sparsity(n, m),
        block,
        regions,
        keep,
        (torch.rand(shape, generator=generator) < 0.5) & keep,
        torch.where(keep, symbol, 0).to(torch.uint8),
        salient,
        scales,
        torch.randn(shape[1], generator=generator).half() if columns else None,
    )
