"""``codes``: one codeword for every group of M weights, one scale a row and, where wanted, one a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subbit.binary.nm import Sparsity
from subbit.linears import CodesLinear
from subbit.packing.codec import (
    check_codewords,
    codeword_bits,
    decode_groups,
    encode_groups,
    pack_bits,
    packed_bytes,
    unpack_bits,
)
from subbit.packing.spec import LinearSpec, Shapes

__all__ = ["CodesSpec", "pack_codes"]


@dataclass(frozen=True)
class CodesSpec(LinearSpec):
    """All that is needed to read the packed tensors of one :class:`~subbit.linears.CodesLinear`."""

    kind: ClassVar[str] = "codes"
    column_tensors: ClassVar[frozenset[str]] = frozenset({"column_scales"})

    n: int
    m: int
    has_column_scales: bool

    @property
    def label(self) -> str:
        """``2:8``."""
        return f"{self.n}:{self.m}"

    def nominal(self, salient_share: float = 0.0) -> float:
        """N/M, as the papers would count."""
        return self.n / self.m

    def tensors(self) -> Shapes:
        """Name → (shape, dtype) of every stored tensor."""
        row_bytes = packed_bytes(self.in_features // self.m, codeword_bits(self.n, self.m))
        shapes: Shapes = {
            "codes": ((self.out_features, row_bytes), torch.uint8),
            "row_scales": ((self.out_features,), torch.float16),
        }
        if self.has_column_scales:
            shapes["column_scales"] = ((self.in_features,), torch.float16)
        return shapes

    def decode_rows(self, tensors: dict[str, Tensor]) -> Tensor:
        """(rows, in) float32, see :meth:`LinearSpec.decode_rows`."""
        return self.unpack(tensors).dense()

    def check(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`LinearSpec.check`."""
        check_codewords(tensors["codes"], self.in_features // self.m, self.n, self.m)

    def unpack(self, tensors: dict[str, Tensor]) -> CodesLinear:
        """The inverse of :func:`pack_codes`; CheckpointError for a codeword that no encoder writes."""
        codewords = unpack_bits(tensors["codes"], self.in_features // self.m, codeword_bits(self.n, self.m))
        kept, positive = decode_groups(codewords, self.n, self.m)
        empty = torch.zeros(*codewords.shape, self.m, dtype=torch.int8, device=codewords.device)
        signs = empty.scatter_(2, kept, positive.to(torch.int8) * 2 - 1).flatten(1)
        return CodesLinear(Sparsity(self.n, self.m), signs, tensors["row_scales"], tensors.get("column_scales"))


def pack_codes(linear: CodesLinear) -> tuple[CodesSpec, dict[str, Tensor]]:
    """The description and the stored tensors of a linear; codewords as in ``grouped_binary``, a row after the other."""
    rows, columns = linear.shape
    n, m = linear.sparsity.n, linear.sparsity.m
    codewords = encode_groups(linear.signs != 0, linear.signs > 0, n, m)
    tensors = {"codes": pack_bits(codewords, codeword_bits(n, m)), "row_scales": linear.row_scales.contiguous()}
    if linear.column_scales is not None:
        tensors["column_scales"] = linear.column_scales.contiguous()
    return CodesSpec(rows, columns, n, m, linear.column_scales is not None), tensors
