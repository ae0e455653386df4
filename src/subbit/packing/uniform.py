"""``uniform``: codes of 1 to 4 bits on an even grid, a float16 minimum and step for every (row, group) (RTN, GPTQ).

The codes of a (row, group) are padded to whole bytes, so that a packed linear can be sliced along rows and, at group
borders, along columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subbit.linears import UniformLinear
from subbit.packing.codec import pack_bits, packed_bytes, unpack_bits
from subbit.packing.spec import LinearSpec, Shapes

__all__ = ["UniformSpec", "pack_uniform"]

CODES_AT_ONCE = 1 << 20  # pack_bits takes eight bytes for every bit


@dataclass(frozen=True)
class UniformSpec(LinearSpec):
    """All that is needed to read the packed tensors of one :class:`~subbit.linears.UniformLinear`."""

    kind: ClassVar[str] = "uniform"

    bits: int
    group_size: int

    @property
    def groups(self) -> list[int]:
        """Columns of every group of a row; the last one may be short."""
        starts = range(0, self.in_features, self.group_size)
        return [min(self.group_size, self.in_features - start) for start in starts]

    def group_bytes(self, columns: int) -> int:
        """Bytes of the codes of one row of a group of ``columns``."""
        return packed_bytes(columns, self.bits)

    @property
    def label(self) -> str:
        """``4 bits``."""
        return "1 bit" if self.bits == 1 else f"{self.bits} bits"

    def nominal(self, salient_share: float = 0.0) -> float:
        """The bits of a code, as the papers count."""
        return float(self.bits)

    def tensors(self) -> Shapes:
        """Name → (shape, dtype) of every stored tensor."""
        row_bytes = sum(map(self.group_bytes, self.groups))
        return {
            "codes": ((self.out_features, row_bytes), torch.uint8),
            "scales": ((self.out_features, len(self.groups), 2), torch.float16),
        }

    def decode_rows(self, tensors: dict[str, Tensor]) -> Tensor:
        """(rows, in) float32, see :meth:`LinearSpec.decode_rows`."""
        return self.unpack(tensors).dense()

    def unpack(self, tensors: dict[str, Tensor]) -> UniformLinear:
        """The inverse of :func:`pack_uniform`; every bit pattern is a code, so there is nothing to refuse."""
        full, tail = divmod(self.in_features, self.group_size)
        whole = full * self.group_bytes(self.group_size)
        codes = []
        if full:
            packed = tensors["codes"][:, :whole].unflatten(1, (full, -1))
            codes.append(unpack_bits(packed, self.group_size, self.bits).flatten(1).to(torch.uint8))
        if tail:
            codes.append(unpack_bits(tensors["codes"][:, whole:], tail, self.bits).to(torch.uint8))
        return UniformLinear(self.bits, self.group_size, torch.cat(codes, dim=1), tensors["scales"])


def pack_uniform(linear: UniformLinear) -> tuple[UniformSpec, dict[str, Tensor]]:
    """The description and the stored tensors of a linear."""
    spec = UniformSpec(*linear.shape, linear.bits, linear.group_size)
    rows_at_once = max(1, CODES_AT_ONCE // spec.in_features)
    codes = [pack_rows(rows, spec) for rows in linear.codes.split(rows_at_once)]
    return spec, {"codes": torch.cat(codes), "scales": linear.scales.contiguous()}


def pack_rows(codes: Tensor, spec: UniformSpec) -> Tensor:
    """(rows, bytes) uint8 of ``codes`` (rows, in) uint8: one group after the other, each in whole bytes."""
    return torch.cat([pack_bits(group.long(), spec.bits) for group in codes.split(spec.group_size, dim=1)], dim=1)
