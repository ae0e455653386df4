"""The methods, one file each. A method is a function of tensors: it knows nothing of files, models or devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from subbit.linears import GroupedBinaryLinear
from subbit.methods.pbs2p import Pbs2pOptions, pbs2p
from subbit.methods.stbllm import StbllmOptions, stbllm

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A method as the pipeline sees it."""

    run: Callable[..., GroupedBinaryLinear]  # (weight, gram, factor, sparsity, options) -> linear
    options: type[Any]  # a frozen dataclass with block_size and damping among its fields
    allocation: str  # how it spreads N over the layers unless the recipe says otherwise
    source: str


METHODS = {
    "stbllm": Method(stbllm, StbllmOptions, "l2", "STBLLM, arXiv 2408.01803"),
    "pbs2p": Method(pbs2p, Pbs2pOptions, "cosine", "PBS²P, arXiv 2502.01705"),
}
