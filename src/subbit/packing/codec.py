"""Numbers as bits: N:M masks as combination ranks, codewords of any width, small symbols in mixed radix.

A *codeword* of one group of M weights says which N are kept and their signs: ``rank << N | signs``, where ``rank`` is
the place of the mask among the C(M, N) masks in ascending order of their bit patterns (column 0 is the lowest bit), and
bit j of ``signs`` is 1 when the j-th kept weight is positive. It takes ⌈log₂ C(M, N)⌉ + N bits: 11 for 4:8.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import torch
from torch import Tensor

from subbit.binary.codebook import kept_columns
from subbit.errors import CheckpointError

__all__ = [
    "check_codewords",
    "check_symbol_bytes",
    "codeword_bits",
    "decode_groups",
    "encode_groups",
    "kept_columns",
    "pack_bits",
    "pack_symbols",
    "packed_bytes",
    "symbol_bytes",
    "unpack_bits",
    "unpack_symbols",
]

CODEWORDS_AT_ONCE = 1 << 18  # that are checked: they fit a second-level cache


def codeword_bits(n: int, m: int) -> int:
    """Bits of one codeword of N:M."""
    return (comb(m, n) - 1).bit_length() + n


@lru_cache(maxsize=64)
def mask_ranks(n: int, m: int) -> Tensor:
    """(2^M,) int64: rank of every bit pattern with N ones; −1 for the others."""
    patterns = (1 << kept_columns(n, m)).sum(dim=1)
    ranks = torch.full((2**m,), -1)
    ranks[patterns] = torch.arange(len(patterns))
    return ranks


def encode_groups(keep: Tensor, positive: Tensor, n: int, m: int) -> Tensor:
    """(rows, groups) int64 codewords of ``keep`` and ``positive`` (rows, groups · M) bool.

    Raises:
        ValueError: a group does not keep exactly N weights.
    """
    rows, columns = keep.shape
    grouped = keep.reshape(rows, columns // m, m)
    rank = mask_ranks(n, m).to(keep.device)[(grouped.long() << torch.arange(m, device=keep.device)).sum(dim=2)]
    if bool((rank < 0).any()):
        raise ValueError(f"a group does not keep exactly {n} of {m} weights")
    signs = positive.reshape(rows, columns // m, m)[grouped].reshape(rows, columns // m, n)
    return rank << n | (signs.long() << torch.arange(n, device=keep.device)).sum(dim=2)


def decode_groups(codewords: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Kept columns within the group, and signs, (..., N) int64 and bool, of codewords (...) int64.

    Raises:
        CheckpointError: a rank that no encoder writes.
    """
    columns = kept_columns(n, m).to(codewords.device)
    rank = codewords >> n
    if int(rank.max()) >= len(columns):
        raise unknown_mask(int(rank.max()), n, m)
    signs = (codewords[..., None] >> torch.arange(n, device=codewords.device)) & 1
    # index_select, not indexing: several times faster on the CPU
    kept = columns.index_select(0, rank.flatten()).view(*rank.shape, n)
    return kept, signs.bool()


def check_codewords(packed: Tensor, count: int, n: int, m: int) -> None:
    """CheckpointError for a rank that no encoder writes, among ``count`` codewords in each of (..., bytes) uint8.

    Only ranks are read, of some rows at a time, and all that have the same place within eight codewords at once.
    """
    width, ranks = codeword_bits(n, m), len(kept_columns(n, m))
    if ranks == 1 << (width - n):
        return  # every number is a codeword
    for rows in packed.flatten(0, -2).split(max(1, CODEWORDS_AT_ONCE // count)):
        for place in range(min(8, count)):  # eight codewords take a whole number of bytes, `width`
            first, shift = divmod(place * width + n, 8)
            there = -(-(count - place) // 8)
            rank = rows[:, first::width][:, :there].int()
            for byte in range(1, (shift + width - n + 7) // 8):
                rank |= rows[:, first + byte :: width][:, :there].int() << 8 * byte
            largest = int(((rank >> shift) & ((1 << (width - n)) - 1)).max())
            if largest >= ranks:
                raise unknown_mask(largest, n, m)


def unknown_mask(rank: int, n: int, m: int) -> CheckpointError:
    """The error of a codeword with a rank that no encoder writes."""
    return CheckpointError(f"a codeword names mask {rank}, but {n}:{m} has only {len(kept_columns(n, m))}")


def packed_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` numbers of ``width`` bits, padded to a whole byte."""
    return (count * width + 7) // 8


def pack_bits(values: Tensor, width: int) -> Tensor:
    """(rows, packed_bytes) uint8 of ``values`` (rows, count) int64 below 2^width; lowest bits first."""
    rows, count = values.shape
    shifts = torch.arange(width, device=values.device)
    bits = ((values[:, :, None] >> shifts) & 1).to(torch.uint8).reshape(rows, count * width)
    padded = torch.nn.functional.pad(bits, (0, -count * width % 8)).reshape(rows, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse of :func:`pack_bits`: (..., count) int64 of ``packed`` (..., bytes) uint8; width at most 25."""
    first = torch.arange(count, device=packed.device) * width
    words = packed.to(torch.int32)
    last = packed.shape[-1] - 1
    total = torch.zeros((), dtype=torch.int32, device=packed.device)
    for byte in range((width + 7 + 7) // 8):
        total = total | words[..., (first // 8 + byte).clamp_max(last)] << 8 * byte
    return ((total >> (first % 8).to(torch.int32)) & ((1 << width) - 1)).long()


def symbols_per_byte(radix: int) -> int:
    """8 for radix 2, 5 for radix 3."""
    return {2: 8, 3: 5}[radix]


def symbol_bytes(count: int, radix: int) -> int:
    """Bytes of ``count`` symbols below ``radix``; 0 for radix 1, which says nothing."""
    return 0 if radix == 1 else -(-count // symbols_per_byte(radix))


def pack_symbols(symbols: Tensor, radix: int) -> Tensor:
    """(rows, symbol_bytes) uint8 of ``symbols`` (rows, count) uint8 < ``radix``: base-radix digits, low first."""
    rows, count = symbols.shape
    if radix == 1:
        return symbols.new_zeros(rows, 0)
    digits = symbols_per_byte(radix)
    padded = torch.nn.functional.pad(symbols, (0, -count % digits)).reshape(rows, -1, digits)
    power = radix ** torch.arange(digits, dtype=torch.int64, device=symbols.device)
    return (padded.long() * power).sum(dim=2).to(torch.uint8)


@lru_cache(maxsize=4)
def symbol_table(radix: int) -> Tensor:
    """(256, symbols_per_byte) uint8: the digits of every byte."""
    digits = symbols_per_byte(radix)
    return (torch.arange(256)[:, None] // radix ** torch.arange(digits) % radix).to(torch.uint8)


def check_symbol_bytes(packed: Tensor, radix: int) -> None:
    """CheckpointError for a byte of symbols that no encoder writes."""
    if radix == 3 and int(packed.max()) >= 3**5:
        raise CheckpointError(f"a symbol byte is {int(packed.max())}, but five symbols of radix 3 end at 242")


def unpack_symbols(packed: Tensor, count: int, radix: int) -> Tensor:
    """The inverse of :func:`pack_symbols`: (..., count) uint8 of ``packed`` (..., bytes) uint8.

    Raises:
        CheckpointError: a byte that no encoder writes.
    """
    if radix == 1:
        return packed.new_zeros(*packed.shape[:-1], count)
    check_symbol_bytes(packed, radix)
    table = symbol_table(radix).to(packed.device)
    digits = table.index_select(0, packed.flatten().int())
    return digits.view(*packed.shape[:-1], -1)[..., :count]
