"""Which backend runs a packed linear: the native kernels where they can, the torch reference everywhere else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from subbit.packing.codes import CodesSpec
from subbit.packing.embedding import EmbeddingSpec
from subbit.packing.grouped import GroupedBinarySpec
from subbit.packing.spec import LinearSpec
from subbit.runtime import native

__all__ = ["Backend", "choose", "summary"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """``native`` or ``torch``, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        """One phrase for a table."""
        return f"{self.name} ({self.reason})"


def choose(
    spec: LinearSpec, device: str = "cpu", dtype: torch.dtype = torch.float32, needs_grad: bool = False
) -> Backend:
    """The backend of a linear for inputs on a type of device, of a dtype; ``needs_grad``: of the inputs."""
    if not isinstance(spec, (CodesSpec, GroupedBinarySpec, EmbeddingSpec)):
        return Backend("torch", f"no native kernel for {spec.kind}")
    if not supported(spec):
        return Backend("torch", f"no native kernel for {spec.label}")
    if device != "cpu":
        return Backend("torch", f"native kernels run on the CPU, not on {device}")
    if dtype not in native.DTYPES:
        return Backend("torch", f"no native kernel for {dtype}")
    if needs_grad:
        return Backend("torch", "native kernels have no gradients")
    missing = native.reason_missing()
    if missing:
        say_once(missing)
        return Backend("torch", missing)
    slow = isinstance(spec, CodesSpec) and not native.is_fast(spec.n, spec.m)
    return Backend("native", "portable" if slow else native.variant())


def supported(spec: CodesSpec | GroupedBinarySpec | EmbeddingSpec) -> bool:
    """Whether there is a native kernel for its numbers."""
    if isinstance(spec, CodesSpec):
        return native.supports(spec.n, spec.m)
    return native.supports_grouped(spec) if isinstance(spec, GroupedBinarySpec) else native.supports_rows(spec)


def summary() -> str:
    """What ``subbit env`` says."""
    missing = native.reason_missing()
    if missing:
        return f"torch reference (unpacks a tile of rows at a time; {missing})"
    there = ", ".join(native.variants())
    return f"native {native.variant()} (of {there}) for all linears but RTN's and GPTQ's, and packed heads"


@lru_cache(maxsize=4)
def say_once(missing: str) -> None:
    """The one line about kernels that could be there and are not."""
    logger.warning("%s: compressed linears run on the torch backend, which is slow", missing)
