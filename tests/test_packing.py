"""Packing: linears as bytes and back, bit for bit, and what corrupt bytes do.

Run with `pytest tests/test_packing.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product
from math import ceil, comb, log2

import pytest
import torch
from grouped_linears import random_grouped
from torch import Tensor

from subbit.errors import CheckpointError
from subbit.linears import GroupedBinaryLinear
from subbit.packing.codec import (
    codeword_bits,
    decode_groups,
    encode_groups,
    kept_columns,
    pack_bits,
    pack_symbols,
    packed_bytes,
    symbol_bytes,
    unpack_bits,
    unpack_symbols,
)
from subbit.packing.grouped import GroupedBinarySpec, pack_grouped

EVERY_NM = [(n, m) for m in (4, 8, 16) for n in range(1, m + 1)]
FIELDS = ("keep", "positive", "symbol", "salient", "scales")


def random_keep(rows: int, columns: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    order = torch.rand(rows, columns // m, m, generator=generator).argsort(dim=2)
    return (order < n).reshape(rows, columns)


def random_linear(
    n: int, m: int, *, regions: int = 3, salient: bool = True, rows: int = 5, columns: int = 160, block: int = 64
) -> GroupedBinaryLinear:
    """Random bits in every field, as a method could have returned them."""
    return random_grouped(n, m, regions, int(salient), columns=False, shape=(rows, columns), block=block)


def assert_same(one: GroupedBinaryLinear, other: GroupedBinaryLinear) -> None:
    assert (one.sparsity, one.block_size, one.regions) == (other.sparsity, other.block_size, other.regions)
    for field in FIELDS:
        left, right = getattr(one, field), getattr(other, field)
        assert left.dtype == right.dtype, field
        assert torch.equal(left, right), field


def value_of(linear: GroupedBinaryLinear, i: int, j: int) -> float:
    """One weight, from the definition of the format."""
    if not linear.keep[i, j]:
        return 0.0
    scales = linear.scales[i, j // linear.block_size].float()
    sign = 1.0 if linear.positive[i, j] else -1.0
    symbol, R = int(linear.symbol[i, j]), linear.regions
    if not linear.salient[j]:
        return float(scales[symbol] + sign * scales[R + symbol])
    return float(scales[2 * R] + sign * scales[2 * R + 1] + (1.0 if symbol else -1.0) * scales[2 * R + 2])


# --- whole linears ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_round_trip_of_every_sparsity(n: int, m: int) -> None:
    for regions, salient in product((1, 2, 3), (True, False)):
        linear = random_linear(n, m, regions=regions, salient=salient)
        spec, tensors = pack_grouped(linear)
        back = spec.unpack(tensors)
        assert_same(linear, back)
        assert torch.equal(back.dense(), linear.dense())
        assert torch.equal(spec.decode_rows(tensors), linear.dense())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("columns", [16, 48, 64, 112, 128, 192, 256, 272])
def test_round_trip_of_every_shape(columns: int, block: int) -> None:
    for rows, (n, m) in product((1, 7), ((4, 8), (3, 16), (1, 4))):
        linear = random_linear(n, m, rows=rows, columns=columns, block=block)
        spec, tensors = pack_grouped(linear)
        assert_same(linear, spec.unpack(tensors))
        assert torch.equal(spec.decode_rows(tensors), linear.dense())


@pytest.mark.parametrize(("regions", "salient"), list(product((1, 2, 3), (True, False))))
def test_dense_follows_the_definition(regions: int, salient: bool) -> None:
    linear = random_linear(4, 8, regions=regions, salient=salient, rows=3)
    expected = torch.tensor([[value_of(linear, i, j) for j in range(160)] for i in range(3)])
    assert torch.equal(linear.dense(), expected)


@pytest.mark.parametrize(("n", "m"), [(4, 8), (2, 4), (6, 16), (16, 16)])
@pytest.mark.parametrize("salient", [True, False])
def test_slices_of_rows_decode_to_the_same_rows(n: int, m: int, salient: bool) -> None:
    linear = random_linear(n, m, rows=9, salient=salient)
    spec, tensors = pack_grouped(linear)
    for rows in (slice(0, 1), slice(2, 5), slice(8, 9), slice(0, 9, 2)):
        part = {name: tensor if name == "salient" else tensor[rows] for name, tensor in tensors.items()}
        assert torch.equal(spec.decode_rows(part), linear.dense()[rows])


@pytest.mark.parametrize(("n", "m"), [(4, 8), (3, 4), (5, 16)])
@pytest.mark.parametrize("salient", [True, False])
def test_slices_of_whole_blocks_equal_packing_the_sliced_linear(n: int, m: int, salient: bool) -> None:
    linear = random_linear(n, m, columns=320, salient=salient, regions=3)  # five whole blocks
    spec, tensors = pack_grouped(linear)
    code_bytes, symbol_size = spec.block_bytes(64)
    for first, last in ((0, 2), (1, 4), (4, 5)):
        columns = slice(64 * first, 64 * last)
        part = replace(
            linear,
            keep=linear.keep[:, columns],
            positive=linear.positive[:, columns],
            symbol=linear.symbol[:, columns],
            salient=linear.salient[columns],
            scales=linear.scales[:, first:last],
        )
        sliced_spec, sliced = pack_grouped(part)
        assert sliced_spec == replace(spec, in_features=64 * (last - first))
        assert torch.equal(sliced["codes"], tensors["codes"][:, first * code_bytes : last * code_bytes])
        assert torch.equal(sliced["symbols"], tensors["symbols"][:, first * symbol_size : last * symbol_size])
        assert torch.equal(sliced["scales"], tensors["scales"][:, first:last])
        if salient:
            assert torch.equal(sliced["salient"], tensors["salient"][8 * first : 8 * last])
        assert torch.equal(sliced_spec.decode_rows(sliced), linear.dense()[:, columns])


def expected_bytes(linear: GroupedBinaryLinear) -> int:
    """Bytes of a linear, counted on its own: codewords and symbols of a (row, block) each fill whole bytes."""
    rows, columns = linear.shape
    n, m = linear.sparsity.n, linear.sparsity.m
    width = ceil(log2(comb(m, n))) + n if n < m else n
    most = max(linear.regions, 2) if linear.has_salient else linear.regions
    total = 0
    for start in range(0, columns, linear.block_size):
        groups = min(linear.block_size, columns - start) // m
        per_row = ceil(groups * width / 8)
        if most > 1:
            per_row += ceil(groups * n / (8 if most == 2 else 5))
        per_row += 2 * (2 * linear.regions + (3 if linear.has_salient else 0))
        total += rows * per_row
    return total + (ceil(columns / 8) if linear.has_salient else 0)


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_described_shapes_and_bytes_are_what_pack_returns(n: int, m: int) -> None:
    for regions, salient, columns in product((1, 2, 3), (True, False), (128, 160)):
        linear = random_linear(n, m, regions=regions, salient=salient, columns=columns)
        spec, tensors = pack_grouped(linear)
        described = spec.tensors()
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == described
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected_bytes(linear)
        assert all(t.is_contiguous() for t in tensors.values())


def test_stored_bits_of_a_large_linear() -> None:
    """4:8, three regions, salient columns, blocks of 128: (11·16 + 8·13 + 16·9) bits a block and row."""
    spec = GroupedBinarySpec(4096, 4096, 4, 8, 128, 3, True)
    total = sum(int(torch.Size(shape).numel()) * dtype.itemsize for shape, dtype in spec.tensors().values())
    assert 8 * total == 4096 * 32 * (11 * 16 + 8 * 13 + 16 * 9) + 4096


def test_description_survives_json() -> None:
    spec, _ = pack_grouped(random_linear(4, 8))
    assert GroupedBinarySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for change in ({"kind": "other"}, {"kind": None}, {"surprise": 1}):
        with pytest.raises(CheckpointError):
            GroupedBinarySpec.from_dict({**spec.to_dict(), **change})
    lacking = spec.to_dict()
    del lacking["regions"]
    with pytest.raises(CheckpointError):
        GroupedBinarySpec.from_dict(lacking)


# --- codewords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [pair for pair in EVERY_NM if pair[1] <= 8])
def test_every_mask_with_every_sign_round_trips(n: int, m: int) -> None:
    masks = sorted(combinations(range(m), n), key=lambda kept: sum(1 << j for j in kept))
    rows = []
    for kept in masks:
        for bits in range(2**n):
            kept_row, positive_row = [False] * m, [False] * m
            for place, column in enumerate(kept):
                kept_row[column], positive_row[column] = True, bool(bits >> place & 1)
            rows.append((kept_row, positive_row))
    keep, positive = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    codewords = encode_groups(keep, positive, n, m)
    assert codewords[:, 0].tolist() == list(range(comb(m, n) * 2**n))  # rank << n | signs, ranks in mask order
    assert int(codewords.max()).bit_length() <= codeword_bits(n, m)
    columns, signs = decode_groups(codewords, n, m)
    assert columns[:, 0].tolist() == [list(kept) for kept in masks for _ in range(2**n)]
    assert torch.equal(signs[:, 0], positive[keep].reshape(-1, n))


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_codewords_take_the_bits_they_should(n: int, m: int) -> None:
    assert kept_columns(n, m).shape == (comb(m, n), n)
    assert 2 ** (codeword_bits(n, m) - n) >= comb(m, n) > (2 ** (codeword_bits(n, m) - n)) // 2


def test_codeword_bits_of_the_table() -> None:
    table = {(1, 4): 3, (1, 8): 4, (2, 8): 7, (3, 8): 9, (4, 8): 11, (2, 16): 9, (3, 16): 13}
    assert {pair: codeword_bits(*pair) for pair in table} == table


@pytest.mark.parametrize(("n", "m"), [(1, 16), (3, 16), (8, 16), (15, 16), (16, 16)])
def test_random_wide_groups_round_trip(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    keep = random_keep(50, 5 * m, n, m, generator)
    positive = keep & (torch.rand(50, 5 * m, generator=generator) < 0.5)
    codewords = encode_groups(keep, positive, n, m)
    assert int(codewords.max()) < comb(m, n) << n
    columns, signs = decode_groups(codewords, n, m)
    again = torch.zeros(50, 5, m, dtype=torch.bool)
    assert torch.equal(again.scatter(2, columns, True).flatten(1), keep)
    assert torch.equal(again.scatter(2, columns, signs).flatten(1), positive)


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 1, 2, 3, 4], []])
def test_a_wrong_count_cannot_be_encoded(kept: list[int]) -> None:
    keep = random_keep(3, 16, 4, 8, torch.Generator().manual_seed(0))
    keep[1, 8:] = False
    keep[1, [8 + j for j in kept]] = True
    with pytest.raises(ValueError, match="4 of 8"):
        encode_groups(keep, torch.zeros_like(keep), 4, 8)


# --- bits and symbols -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 26))
def test_bits_equal_big_integers(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for count in (1, 2, 3, 7, 8, 9, int(torch.randint(10, 90, (), generator=generator))):
        values = torch.randint(2**width, (4, count), generator=generator)
        values[0], values[1] = 2**width - 1, 0
        packed = pack_bits(values, width)
        assert packed.shape == (4, packed_bytes(count, width))
        assert packed.dtype == torch.uint8
        for row, stored in zip(values.tolist(), packed.tolist(), strict=True):
            number = sum(value << width * place for place, value in enumerate(row))
            assert bytes(stored) == number.to_bytes((count * width + 7) // 8, "little")
        assert torch.equal(unpack_bits(packed, count, width), values)
        assert torch.equal(unpack_bits(packed.reshape(2, 2, -1), count, width), values.reshape(2, 2, -1))


@pytest.mark.parametrize(("radix", "per_byte"), [(2, 8), (3, 5)])
def test_symbols_equal_divmod(radix: int, per_byte: int) -> None:
    generator = torch.Generator().manual_seed(radix)
    for count in (1, 4, 5, 6, 8, 9, 40, 64, 77):
        symbols = torch.randint(radix, (3, count), generator=generator).to(torch.uint8)
        packed = pack_symbols(symbols, radix)
        assert packed.shape == (3, symbol_bytes(count, radix))
        assert symbol_bytes(count, radix) == ceil(count / per_byte)
        for row, stored in zip(symbols.tolist(), packed.tolist(), strict=True):
            digits = []
            for byte in stored:
                for _ in range(per_byte):
                    byte, digit = divmod(byte, radix)
                    digits.append(digit)
                assert byte == 0
            assert digits[:count] == row
            assert not any(digits[count:])
        assert torch.equal(unpack_symbols(packed, count, radix), symbols)


def test_one_symbol_takes_no_bytes() -> None:
    symbols = torch.zeros(3, 10, dtype=torch.uint8)
    assert pack_symbols(symbols, 1).shape == (3, 0)
    assert torch.equal(unpack_symbols(pack_symbols(symbols, 1), 10, 1), symbols)


# --- corrupt data -----------------------------------------------------------------------------------------------------


def test_a_codeword_out_of_range_is_refused() -> None:
    spec, tensors = pack_grouped(random_linear(4, 8, regions=2))  # 70 masks in seven bits; every symbol fits any column
    codes = tensors["codes"].clone()
    codes[2, :11] = pack_bits(torch.full((1, 8), 70 << 4), 11)[0]
    for read in (spec.unpack, spec.decode_rows):
        with pytest.raises(CheckpointError, match="70"):
            read({**tensors, "codes": codes})
    codes[2, :11] = pack_bits(torch.full((1, 8), 69 << 4), 11)[0]
    spec.unpack({**tensors, "codes": codes})
    for n, m in ((3, 8), (5, 16), (2, 4)):
        with pytest.raises(CheckpointError):
            decode_groups(torch.tensor([[comb(m, n) << n]]), n, m)


@pytest.mark.parametrize("byte", [243, 255])
def test_a_symbol_byte_out_of_range_is_refused(byte: int) -> None:
    spec, tensors = pack_grouped(random_linear(4, 8, regions=3))
    symbols = tensors["symbols"].clone()
    symbols[4, 3] = byte
    for read in (spec.unpack, spec.decode_rows):
        with pytest.raises(CheckpointError, match=str(byte)):
            read({**tensors, "symbols": symbols})
    unpack_symbols(torch.tensor([[242]], dtype=torch.uint8), 5, 3)


@pytest.mark.parametrize(("regions", "symbol"), [(3, 2), (1, 1)])
def test_a_symbol_that_its_column_cannot_have_is_refused(regions: int, symbol: int) -> None:
    """A third value in a salient column, a second region where there is one: digits that no encoder writes there."""
    linear = random_linear(4, 8, regions=regions)
    wrong = linear.salient if regions == 3 else ~linear.salient
    broken = replace(linear, symbol=torch.where(linear.keep & wrong, symbol, linear.symbol.long()).to(torch.uint8))
    spec, tensors = pack_grouped(broken)
    for read in (spec.unpack, spec.decode_rows):
        with pytest.raises(CheckpointError):
            read(tensors)
