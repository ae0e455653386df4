"""The packed forms there are: from a linear to stored tensors, and from a description in config.json to its reader."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subbit.linears import CodesLinear, CompressedLinear, GroupedBinaryLinear, UniformLinear
from subbit.packing.codes import CodesSpec, pack_codes
from subbit.packing.grouped import GroupedBinarySpec, pack_grouped
from subbit.packing.spec import LinearSpec
from subbit.packing.uniform import UniformSpec, pack_uniform

__all__ = ["CodesSpec", "GroupedBinarySpec", "LinearSpec", "UniformSpec", "pack", "read_spec"]

SPECS: dict[str, type[LinearSpec]] = {spec.kind: spec for spec in (GroupedBinarySpec, CodesSpec, UniformSpec)}


def pack(linear: CompressedLinear) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The description and the stored tensors of a linear."""
    if isinstance(linear, GroupedBinaryLinear):
        return pack_grouped(linear)
    if isinstance(linear, CodesLinear):
        return pack_codes(linear)
    if isinstance(linear, UniformLinear):
        return pack_uniform(linear)
    raise TypeError(f"{type(linear).__name__} has no packed form")


def read_spec(values: dict[str, Any]) -> LinearSpec:
    """The description that :meth:`LinearSpec.to_dict` wrote; CheckpointError for one that this version cannot read."""
    return SPECS.get(str(values.get("kind")), GroupedBinarySpec).from_dict(values)
