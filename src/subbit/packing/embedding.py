"""``rows_uniform``: the embedding matrix and the head in 8 or 4 bits, a grid for every 64 weights of a row.

The grid is asymmetric with a byte for the zero point, which measured better than a symmetric one at the same size
(docs/format.md). Every row is by itself, so that the embedding decodes the rows of its tokens and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from subbit.errors import CheckpointError
from subbit.packing.codec import packed_bytes
from subbit.packing.spec import LinearSpec, Shapes

__all__ = ["EmbeddingSpec", "PackedEmbeddings", "UniformRows", "pack_matrix", "pack_rows", "quantize_rows"]

GROUP_SIZE = 64
WIDTHS = (4, 8)
TILE_WEIGHTS = 1 << 20  # weights in float32 at a time while a matrix is packed
# Clipping the largest weights pays at 4 bits, where these shares of the range lessen the error by 3 %; not at 8 bits.
SHRINKS = {8: (1.0,), 4: tuple(1 - 0.03 * step for step in range(10))}


@dataclass(frozen=True)
class UniformRows:
    """Rows of a matrix on even grids: ŵ = scale · (code − zero) with the scale and zero of its (row, group)."""

    bits: int
    group_size: int  # columns that share a grid; the last group may be shorter
    codes: Tensor  # (rows, columns) uint8, below 2^bits
    zeros: Tensor  # (rows, groups) uint8, below 2^bits: the code of 0
    scales: Tensor  # (rows, groups) float16

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """(rows, columns) float32. The product of a float16 number and 9 bits is exact, so no order can change it."""
        steps = grouped(self.codes, self.group_size).float() - self.zeros[:, :, None].float()
        return (steps * self.scales[:, :, None].float()).flatten(1)[:, : self.codes.shape[1]]


@dataclass(frozen=True)
class EmbeddingSpec(LinearSpec):
    """All that is needed to read the packed tensors of an embedding matrix: a row of ``in_features`` for every token.

    A head is such a matrix read as a linear, so this is a LinearSpec.
    """

    kind: ClassVar[str] = "rows_uniform"

    bits: int
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        """ValueError for a width that has no packed form."""
        if self.bits not in WIDTHS:
            raise ValueError(f"an embedding has codes of 4 or 8 bits, not of {self.bits}")

    @property
    def groups(self) -> int:
        """Grids of a row."""
        return -(-self.in_features // self.group_size)

    @property
    def label(self) -> str:
        """``8 bits``."""
        return f"{self.bits} bits"

    def nominal(self, salient_share: float = 0.0) -> float:
        """The bits of a code."""
        return float(self.bits)

    def tensors(self) -> Shapes:
        """Name → (shape, dtype) of every stored tensor."""
        return {
            "codes": ((self.out_features, packed_bytes(self.in_features, self.bits)), torch.uint8),
            "zeros": ((self.out_features, self.groups), torch.uint8),
            "scales": ((self.out_features, self.groups), torch.float16),
        }

    def decode_rows(self, tensors: dict[str, Tensor]) -> Tensor:
        """(rows, in) float32, see :meth:`LinearSpec.decode_rows`."""
        return self.unpack(tensors).dense()

    def check(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`LinearSpec.check`."""
        zeros = tensors["zeros"]
        if self.bits == 4 and zeros.numel() and int(zeros.max()) > 15:
            raise CheckpointError(f"a zero point is {int(zeros.max())}, but codes of 4 bits end at 15")

    def unpack(self, tensors: dict[str, Tensor]) -> UniformRows:
        """The inverse of :func:`pack_rows`; CheckpointError for a zero point that no encoder writes."""
        self.check(tensors)
        codes, zeros = tensors["codes"], tensors["zeros"]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, : self.in_features]
        return UniformRows(self.bits, self.group_size, codes, zeros, tensors["scales"])


def grouped(matrix: Tensor, size: int) -> Tensor:
    """(rows, groups, size) of (rows, columns); a short last group is filled up with zeros."""
    lacking = -matrix.shape[1] % size
    return (pad(matrix, (0, lacking)) if lacking else matrix).unflatten(1, (-1, size))


def quantize_rows(matrix: Tensor, bits: int, group_size: int = GROUP_SIZE) -> UniformRows:
    """The nearest codes for ``matrix`` (rows, columns) float32, on the grid with the least squared error.

    The range of a (row, group) is that of its weights and 0, which is always a code. A range too large for a float16
    scale gives an infinite scale; the caller refuses it.
    """
    weights = grouped(matrix, group_size)
    shrink = torch.ones(weights.shape[:2])
    least = torch.full_like(shrink, torch.inf)
    for candidate in SHRINKS[bits] if len(SHRINKS[bits]) > 1 else ():
        codes, zeros, scales = nearest(weights, torch.full_like(shrink, candidate), bits)
        error = ((codes - zeros[:, :, None]) * scales[:, :, None].float() - weights).square().sum(dim=2)
        shrink, least = torch.where(error < least, candidate, shrink), torch.minimum(error, least)
    codes, zeros, scales = nearest(weights, shrink, bits)
    codes = codes.to(torch.uint8).flatten(1)[:, : matrix.shape[1]]
    return UniformRows(bits, group_size, codes, zeros.to(torch.uint8), scales)


def nearest(weights: Tensor, shrink: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, groups, size), zeros (rows, groups), both float32, and float16 scales for a share of the range.

    Args:
        weights: (rows, groups, size) float32.
        shrink: (rows, groups) float32, the share.
    """
    top = 2**bits - 1
    low, high = weights.amin(dim=2).clamp_max(0) * shrink, weights.amax(dim=2).clamp_min(0) * shrink
    scales = ((high - low) / top).half()
    step = scales.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    zeros = (-low * inverse).round().clamp(0, top)
    return ((weights * inverse[:, :, None]).round() + zeros[:, :, None]).clamp(0, top), zeros, scales


def pack_rows(rows: UniformRows) -> tuple[EmbeddingSpec, dict[str, Tensor]]:
    """The description and the stored tensors of some rows; of two codes of 4 bits the first is the low half byte."""
    spec = EmbeddingSpec(*rows.shape, rows.bits, rows.group_size)
    codes = rows.codes
    if rows.bits == 4:
        low, high = pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
        codes = low | high << 4
    return spec, {"codes": codes.contiguous(), "zeros": rows.zeros.contiguous(), "scales": rows.scales.contiguous()}


def pack_matrix(matrix: Tensor, spec: EmbeddingSpec) -> tuple[dict[str, Tensor], float]:
    """Quantize and pack a matrix (tokens, columns) of any float dtype a tile of rows at a time.

    Returns:
        The stored tensors, and the relative root mean square error.

    Raises:
        OverflowError: a scale does not fit in float16.
        RuntimeError: the packed rows decode to something else than was quantized, a defect of ours.
    """
    tiles: list[dict[str, Tensor]] = []
    lost = total = 0.0
    for tile in row_tiles(matrix, spec.in_features):
        rows = quantize_rows(tile, spec.bits, spec.group_size)
        if not bool(rows.scales.isfinite().all()):
            raise OverflowError("the weights are too large for float16 scales")
        tiles.append(pack_rows(rows)[1])
        dense = rows.dense()
        if not torch.equal(spec.decode_rows(tiles[-1]), dense):
            raise RuntimeError("the packed rows differ from the quantized ones; please report this")
        lost += float((tile - dense).square().sum())
        total += float(tile.square().sum())
    packed = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
    return packed, (lost / total) ** 0.5 if total > 0 else 0.0


def row_tiles(matrix: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows of ``matrix``, float32, so many that they hold ``TILE_WEIGHTS`` weights."""
    for tile in matrix.split(max(1, TILE_WEIGHTS // columns)):
        yield tile.float()


# ---- the section in config.json --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedEmbeddings:
    """What the ``embeddings`` section of the quantization_config says, by module name."""

    specs: dict[str, EmbeddingSpec] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # head → the embedding whose packed matrix it shares
    left: dict[str, str] = field(default_factory=dict)  # left dense although the recipe asks otherwise → why

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` reads it."""
        return {
            **{name: spec.to_dict() for name, spec in self.specs.items()},
            **{name: {"kind": "tied", "to": other} for name, other in self.tied.items()},
            **{name: {"kind": "dense", "reason": reason} for name, reason in self.left.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: Any) -> PackedEmbeddings:
        """CheckpointError for a section that makes no sense, or that this version cannot read."""
        found = cls()
        try:
            for name, entry in values.items():
                if entry["kind"] == "tied":
                    found.tied[name] = entry["to"]
                elif entry["kind"] == "dense":
                    found.left[name] = entry["reason"]
                else:
                    found.specs[name] = EmbeddingSpec.from_dict(entry)
            sizes = [size for spec in found.specs.values() for shape, _ in spec.tensors().values() for size in shape]
            good = min(sizes, default=1) > 0 and all(other in found.specs for other in found.tied.values())
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            good = False
        if not good:
            raise CheckpointError(f"{where}: the description of the embeddings makes no sense: {values}")
        return found
