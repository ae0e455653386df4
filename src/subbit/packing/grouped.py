"""``grouped_binary``: the packed form of BiLLM, ARB-LLM, STBLLM and PBS²P (docs/format.md).

Everything of a (row, block) is padded to whole bytes and nothing crosses a block, so that a packed linear can be sliced
along rows and, at block borders, along columns.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from subbit.binary.nm import Sparsity
from subbit.errors import CheckpointError
from subbit.linears import GroupedBinaryLinear, level_index, levels, scale_count, scale_slots
from subbit.packing.codec import (
    check_codewords,
    check_symbol_bytes,
    codeword_bits,
    decode_groups,
    encode_groups,
    pack_bits,
    pack_symbols,
    packed_bytes,
    symbol_bytes,
    unpack_bits,
    unpack_symbols,
)
from subbit.packing.spec import LinearSpec, Shapes

__all__ = ["GroupedBinarySpec", "pack_grouped"]


@dataclass(frozen=True)
class GroupedBinarySpec(LinearSpec):
    """All that is needed to read the packed tensors of one :class:`~subbit.linears.GroupedBinaryLinear`."""

    kind: ClassVar[str] = "grouped_binary"
    column_tensors: ClassVar[frozenset[str]] = frozenset({"salient", "column_scales"})

    n: int
    m: int
    block_size: int
    regions: int
    has_salient: bool
    # What only ARB-LLM has; a description that lacks them, from before there was ARB-LLM, means these.
    salient_regions: int = 1  # 2: the symbol of a salient column is its region, the residual signs are in ``residuals``
    residual_bytes: int = 0  # of a row
    has_column_scales: bool = False  # and with them no shifts

    @property
    def radix(self) -> int:
        """Values of a symbol: the region, or in a salient column the residual sign."""
        return max(self.regions, 2 if self.has_salient else 1)

    @property
    def blocks(self) -> int:
        """Blocks of columns; the last one may be short."""
        return -(-self.in_features // self.block_size)

    def block_bytes(self, columns: int) -> tuple[int, int]:
        """Bytes of the codes and of the symbols of one row of a block of ``columns``."""
        groups = columns // self.m
        return packed_bytes(groups, codeword_bits(self.n, self.m)), symbol_bytes(groups * self.n, self.radix)

    @property
    def label(self) -> str:
        """``4:8``."""
        return f"{self.n}:{self.m}"

    def nominal(self, salient_share: float = 0.0) -> float:
        """N/M · (1 + share of salient columns), the bits that both papers print."""
        return self.n / self.m * (1 + salient_share)

    @property
    def scale_count(self) -> int:
        """Numbers of a (row, block) in memory: shifts and scales."""
        return scale_count(self.regions, self.has_salient, self.salient_regions)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`LinearSpec.to_dict`; what only ARB-LLM has is left out of all others."""
        optional = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {key: value for key, value in super().to_dict().items() if value != optional.get(key, MISSING)}

    def tensors(self) -> Shapes:
        """Name → (shape, dtype) of every stored tensor."""
        full, tail = divmod(self.in_features, self.block_size)
        sizes = [
            full * whole + part
            for whole, part in zip(self.block_bytes(self.block_size), self.block_bytes(tail), strict=True)
        ]
        slots = scale_slots(self.regions, self.scale_count)
        scales = len(slots) if self.has_column_scales else self.scale_count
        shapes: Shapes = {
            "codes": ((self.out_features, sizes[0]), torch.uint8),
            "scales": ((self.out_features, self.blocks, scales), torch.float16),
        }
        if self.radix > 1:
            shapes["symbols"] = ((self.out_features, sizes[1]), torch.uint8)
        if self.has_salient:
            shapes["salient"] = ((packed_bytes(self.in_features, 1),), torch.uint8)
        if self.salient_regions > 1:
            shapes["residuals"] = ((self.out_features, self.residual_bytes), torch.uint8)
        if self.has_column_scales:
            shapes["column_scales"] = ((self.in_features,), torch.float16)
        return shapes

    def decode_rows(self, tensors: dict[str, Tensor]) -> Tensor:
        """(rows, in) float32, see :meth:`LinearSpec.decode_rows`."""
        table = levels(all_scales(self, tensors), self.regions)
        dense = []
        for blocks, part in split_blocks(self, tensors):
            index = level_index(part.positive, part.symbol, part.salient, self.regions)
            values = table[:, blocks].gather(2, index.flatten(2)).view_as(part.columns)
            empty = values.new_zeros(*part.columns.shape[:3], self.m)
            dense.append(empty.scatter_(3, part.columns, values).flatten(1))
        weight = torch.cat(dense, dim=1)
        return weight * tensors["column_scales"].float() if self.has_column_scales else weight

    def check(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`LinearSpec.check`."""
        full, tail = divmod(self.in_features, self.block_size)
        start = 0
        for count, width in ((full, self.block_size), (1, tail)):
            size = self.block_bytes(width)[0]
            codes = tensors["codes"][:, start : start + count * size]
            start += count * size
            if codes.numel():
                check_codewords(codes.unflatten(1, (count, size)), width // self.m, self.n, self.m)
        if self.radix > 1:
            check_symbol_bytes(tensors["symbols"], self.radix)
        if self.salient_regions > 1:
            unpack_residuals(self, tensors["residuals"][:0], salient_columns(self, tensors))  # their number of bytes

    def unpack(self, tensors: dict[str, Tensor]) -> GroupedBinaryLinear:
        """The inverse of :func:`pack_grouped`; CheckpointError for codewords or symbols that no encoder writes."""
        keep, positive, symbol = [], [], []
        for _, part in split_blocks(self, tensors):
            empty = torch.zeros(*part.columns.shape[:3], self.m, dtype=torch.bool, device=part.columns.device)
            keep.append(empty.scatter(3, part.columns, True).flatten(1))
            positive.append(empty.scatter(3, part.columns, part.positive).flatten(1))
            symbol.append(empty.to(torch.uint8).scatter(3, part.columns, part.symbol).flatten(1))
        return GroupedBinaryLinear(
            Sparsity(self.n, self.m),
            self.block_size,
            self.regions,
            torch.cat(keep, dim=1),
            torch.cat(positive, dim=1),
            torch.cat(symbol, dim=1),
            salient_columns(self, tensors),
            all_scales(self, tensors),
            tensors.get("column_scales"),
        )


def spec_of(linear: GroupedBinaryLinear) -> GroupedBinarySpec:
    """The description that belongs to a linear."""
    rows, columns = linear.shape
    return GroupedBinarySpec(
        rows,
        columns,
        linear.sparsity.n,
        linear.sparsity.m,
        linear.block_size,
        linear.regions,
        linear.has_salient,
        linear.salient_regions,
        residual_bytes(linear) if linear.salient_regions > 1 else 0,
        linear.column_scales is not None,
    )


def pack_grouped(linear: GroupedBinaryLinear) -> tuple[GroupedBinarySpec, dict[str, Tensor]]:
    """The description and the stored tensors of a linear; ValueError for shifts beside column scales."""
    spec = spec_of(linear)
    in_salient = linear.symbol >> 1 if spec.salient_regions > 1 else linear.symbol
    stored = torch.where(linear.salient, in_salient, linear.symbol)
    codes, symbols = [], []
    for start in range(0, spec.in_features, spec.block_size):
        block = slice(start, start + spec.block_size)
        keep = linear.keep[:, block]
        codewords = encode_groups(keep, linear.positive[:, block], spec.n, spec.m)
        codes.append(pack_bits(codewords, codeword_bits(spec.n, spec.m)))
        kept = stored[:, block][keep].reshape(len(keep), -1)
        symbols.append(pack_symbols(kept, spec.radix))
    tensors = {"codes": torch.cat(codes, dim=1), "scales": stored_scales(spec, linear.scales)}
    if spec.radix > 1:
        tensors["symbols"] = torch.cat(symbols, dim=1)
    if spec.has_salient:
        tensors["salient"] = pack_bits(linear.salient[None].long(), 1)[0]
    if spec.salient_regions > 1:
        tensors["residuals"] = pack_residuals(linear)
    if linear.column_scales is not None:
        tensors["column_scales"] = linear.column_scales.contiguous()
    return spec, tensors


@dataclass(frozen=True)
class UnpackedBlocks:
    """Kept weights of some rows in equally wide blocks."""

    columns: Tensor  # (rows, blocks, groups, N) int64: the kept columns within their group
    positive: Tensor  # (rows, blocks, groups, N) bool
    symbol: Tensor  # (rows, blocks, groups, N) uint8
    salient: Tensor  # (rows, blocks, groups, N) bool: the weight is in a salient column


def unpack_blocks(
    spec: GroupedBinarySpec, codes: Tensor, symbols: Tensor | None, salient: Tensor, residual: Tensor | None
) -> UnpackedBlocks:
    """Read equally wide blocks.

    Args:
        codes: (rows, blocks, bytes) uint8.
        symbols: (rows, blocks, bytes) uint8; None where there are none.
        salient: (blocks, groups, M) bool.
        residual: (rows, blocks, groups, M) uint8, the residual signs; None where they are among the symbols.
    """
    groups = salient.shape[1]
    codewords = unpack_bits(codes, groups, codeword_bits(spec.n, spec.m))
    kept, positive = decode_groups(codewords, spec.n, spec.m)
    in_salient = (
        salient.expand(len(codes), -1, -1, -1).gather(3, kept) if spec.has_salient else torch.zeros_like(positive)
    )
    if symbols is None:
        return UnpackedBlocks(kept, positive, torch.zeros_like(kept, dtype=torch.uint8), in_salient)
    symbol = unpack_symbols(symbols, groups * spec.n, spec.radix).unflatten(-1, (groups, spec.n))
    check_symbols(spec, symbol, in_salient)
    if residual is not None:
        symbol = torch.where(in_salient, 2 * symbol + residual.gather(3, kept), symbol)
    return UnpackedBlocks(kept, positive, symbol, in_salient)


def split_blocks(spec: GroupedBinarySpec, tensors: dict[str, Tensor]) -> list[tuple[slice, UnpackedBlocks]]:
    """The whole blocks, then the short last one: (which blocks, contents) of each."""
    full, tail = divmod(spec.in_features, spec.block_size)
    parts = []
    code_start = symbol_start = 0
    symbols = tensors.get("symbols")
    salient = salient_columns(spec, tensors)
    residuals = unpack_residuals(spec, tensors["residuals"], salient) if spec.salient_regions > 1 else None
    for count, width, first in ((full, spec.block_size, 0), (1 if tail else 0, tail, full)):
        if not count:
            continue
        code_bytes, symbol_size = spec.block_bytes(width)
        codes = tensors["codes"][:, code_start : code_start + count * code_bytes].unflatten(1, (count, code_bytes))
        part = None
        if symbols is not None:
            part = symbols[:, symbol_start : symbol_start + count * symbol_size].unflatten(1, (count, symbol_size))
        inside = slice(first * spec.block_size, first * spec.block_size + count * width)
        columns = salient[inside].view(count, -1, spec.m)
        residual = None if residuals is None else residuals[:, inside].unflatten(1, columns.shape)
        parts.append((slice(first, first + count), unpack_blocks(spec, codes, part, columns, residual)))
        code_start += count * code_bytes
        symbol_start += count * symbol_size
    return parts


def salient_columns(spec: GroupedBinarySpec, tensors: dict[str, Tensor]) -> Tensor:
    """(in,) bool."""
    if not spec.has_salient:
        return torch.zeros(spec.in_features, dtype=torch.bool, device=tensors["codes"].device)
    return unpack_bits(tensors["salient"][None], spec.in_features, 1)[0].bool()


def salient_places(salient: Tensor, block_size: int) -> list[Tensor]:
    """The salient columns, int64, of every block."""
    return [mask.nonzero()[:, 0] + i * block_size for i, mask in enumerate(salient.split(block_size))]


def residual_bytes(linear: GroupedBinaryLinear) -> int:
    """Bytes of a row of residual signs: a bit for every salient column, whole bytes for every block."""
    return sum(packed_bytes(len(columns), 1) for columns in salient_places(linear.salient, linear.block_size))


def pack_residuals(linear: GroupedBinaryLinear) -> Tensor:
    """(out, residual_bytes) uint8: the residual signs of the salient columns; 0 where the weight is pruned."""
    residual = (linear.symbol & 1).long()
    places = salient_places(linear.salient, linear.block_size)
    return torch.cat([pack_bits(residual[:, columns], 1) for columns in places], dim=1)


def unpack_residuals(spec: GroupedBinarySpec, packed: Tensor, salient: Tensor) -> Tensor:
    """(rows, in) uint8: the residual signs of ``packed`` (rows, residual_bytes), 0 in ordinary columns.

    Raises:
        CheckpointError: ``salient`` (in,) bool needs more or fewer bytes.
    """
    result = torch.zeros(len(packed), spec.in_features, dtype=torch.uint8, device=packed.device)
    places = salient_places(salient, spec.block_size)
    sizes = [packed_bytes(len(columns), 1) for columns in places]
    if sum(sizes) != spec.residual_bytes:
        raise CheckpointError(f"the salient columns need {sum(sizes)} bytes a row, but {spec.residual_bytes} are there")
    for columns, part in zip(places, packed.split(sizes, dim=1), strict=True):
        result[:, columns] = unpack_bits(part, len(columns), 1).to(torch.uint8)
    return result


def stored_scales(spec: GroupedBinarySpec, scales: Tensor) -> Tensor:
    """(out, blocks, numbers) float16: what the file holds of all shifts and scales."""
    if not spec.has_column_scales:
        return scales.contiguous()
    slots = scale_slots(spec.regions, spec.scale_count)
    shifts = [slot for slot in range(spec.scale_count) if slot not in slots]
    if bool(scales[..., shifts].any()):
        raise ValueError("a linear with column scales has a shift that is not zero")
    return scales[..., slots]


def all_scales(spec: GroupedBinarySpec, tensors: dict[str, Tensor]) -> Tensor:
    """(rows, blocks, scale_count) float16: the stored numbers, zeros for shifts that have no place in the file."""
    stored = tensors["scales"]
    if not spec.has_column_scales:
        return stored
    full = stored.new_zeros(*stored.shape[:-1], spec.scale_count)
    full[..., scale_slots(spec.regions, spec.scale_count)] = stored
    return full


def check_symbols(spec: GroupedBinarySpec, symbol: Tensor, in_salient: Tensor) -> None:
    """CheckpointError for a symbol that its column cannot have; with two regions every symbol is possible."""
    if spec.regions == 2 or not spec.has_salient:
        return
    impossible = in_salient & (symbol > 1) if spec.regions > 2 else ~in_salient & (symbol >= spec.regions)
    if bool(impossible.any()):
        raise CheckpointError(f"a symbol is {int(symbol[impossible].max())}, which no encoder writes in its column")
