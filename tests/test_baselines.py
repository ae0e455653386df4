"""BiLLM, ARB-LLM and the released STBLLM against the slow transcriptions in `reference_baselines.py`, and their files.

Run with `pytest tests/test_baselines.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import logits_of
from grouped_linears import random_grouped
from reference import Blockwise, Floats, ReferenceBlock, ReferenceLinear, Settle
from reference_baselines import (
    ArbChoices,
    ArbReferenceBlock,
    BillmChoices,
    ReleasedChoices,
    arb_linear,
    arb_on_output,
    arb_on_weights,
    billm_linear,
    published_rc,
    released_linear,
)
from test_methods import AWKWARD, BLOCK, COLUMNS, REFERENCE_ROWS, ROWS, awkward, condition, output_error, problem
from test_pipeline import dense_equivalent, dense_weights
from torch import Tensor

import subbit
from subbit import CheckpointError, Recipe
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity, keep_top
from subbit.binary.scales import quadratic_error
from subbit.linears import GroupedBinaryLinear
from subbit.methods import METHODS
from subbit.methods.arb import (
    ArbOptions,
    alternate_on_output,
    alternate_on_weights,
    alternate_rows_and_columns,
    arb,
    weight_sets,
)
from subbit.methods.billm import BillmOptions, billm
from subbit.methods.blockwise import BinaryBlock, binarize_searched
from subbit.methods.stbllm import StbllmOptions, stbllm
from subbit.methods.stbllm_as_released import ReleasedStbllmOptions, stbllm_as_released
from subbit.packing.grouped import GroupedBinarySpec, pack_grouped

Options = BillmOptions | ArbOptions | ReleasedStbllmOptions
NONE = Sparsity(1, 1)

# Fewer salient columns than by default, see test_methods.py.
B = BillmOptions(block_size=BLOCK, candidates=20, salient_columns=12)
RC = ArbOptions(block_size=BLOCK, candidates=20, salient_columns=12)
X = replace(RC, variant="x")
REL = ReleasedStbllmOptions(block_size=BLOCK, candidates=20, salient_columns=12)


def compress(weight: Tensor, gram: Tensor, sparsity: Sparsity, options: Options) -> GroupedBinaryLinear:
    factor = inverse_factor(gram, options.damping)
    if isinstance(options, BillmOptions):
        return billm(weight, gram, factor, sparsity, options)
    if isinstance(options, ArbOptions):
        return arb(weight, gram, factor, sparsity, options)
    return stbllm_as_released(weight, gram, factor, sparsity, options)


# --- against the reference --------------------------------------------------------------------------------------------


def follow(linear: GroupedBinaryLinear, solved: bool, released: bool) -> Settle:
    """Check a block of the reference against ``linear``, and let the reference go on with what ``linear`` stores.

    As in test_methods.py: otherwise one scale in the middle of two float16 numbers would change all that comes after.

    Args:
        solved: the scales are solved jointly on the output error.
        released: what is ``moot`` has two values that are equally near.
    """

    def settle(index: int, block: ReferenceBlock, target: Floats, metric: Floats) -> None:
        columns = slice(index * linear.block_size, (index + 1) * linear.block_size)
        assert np.array_equal(linear.keep[:, columns].numpy(), block.keep)
        assert np.array_equal(linear.salient[columns].numpy(), block.salient)
        positive, symbol = linear.positive[:, columns].numpy(), linear.symbol[:, columns].long().numpy()
        assert np.array_equal(positive[~block.moot], block.positive[~block.moot])
        assert np.array_equal(symbol[~block.moot], block.symbol[~block.moot])
        if isinstance(block, ArbReferenceBlock):
            assert np.array_equal(symbol // 2 * block.salient, block.symbol // 2 * block.salient)
        exact, values = block.scales.copy(), block.dense()
        stored = np.zeros_like(exact)
        stored[:, : linear.scales.shape[2]] = linear.scales[:, index].double().numpy()
        sharp = np.ones(len(exact), dtype=bool)
        if solved:  # jointly: a nearly singular system has many solutions, and then only the values must agree
            sharp = np.array([condition(block.basis(i), metric) < 1e3 for i in range(len(exact))])
        slack = (2e-4 if solved else 1e-5) * np.abs(exact).max(axis=1, keepdims=True)
        assert (np.abs(stored - exact) <= half_step(exact) + slack)[sharp].all()
        largest = np.maximum(np.abs(exact), np.abs(stored)).max(axis=1, keepdims=True)
        if isinstance(block, ArbReferenceBlock) and block.column_scales is not None:
            assert linear.column_scales is not None
            own = linear.column_scales[columns].double().numpy()
            assert (np.abs(own - block.column_scales) <= half_step(block.column_scales) + 1e-5).all()
            largest = largest * 2 * np.abs(own)
            block.column_scales = own
        block.positive, block.symbol, block.scales = positive, symbol, stored
        near = np.abs(block.dense() - values) <= 3 * 2**-11 * largest + 1e-7
        assert near[~block.moot].all() if released else near.all()

    return settle


def half_step(values: Floats) -> Floats:
    """The distance of neighbouring float16 numbers."""
    return np.asarray(np.abs(np.spacing(values.astype(np.float16)).astype(np.float64)))


def reference_of(
    weight: Tensor, gram: Tensor, sparsity: Sparsity, options: Options, linear: GroupedBinaryLinear
) -> ReferenceLinear:
    solved = not isinstance(options, ReleasedStbllmOptions) and options.scales == "gram"
    common = Blockwise(
        sparsity.n,
        sparsity.m,
        options.block_size,
        options.damping,
        options.salient_columns,
        options.residual_order if isinstance(options, BillmOptions) else 2,
        options.compensation,
        options.metric,
        follow(linear, solved, isinstance(options, ReleasedStbllmOptions)),
    )
    W, H = weight.double().numpy(), gram.double().numpy()
    values = asdict(options)
    if isinstance(options, BillmOptions):
        return billm_linear(W, H, common, BillmChoices(**{k: values[k] for k in BillmChoices.__dataclass_fields__}))
    if isinstance(options, ArbOptions):
        return arb_linear(W, H, common, ArbChoices(**{k: values[k] for k in ArbChoices.__dataclass_fields__}))
    names = ReleasedChoices.__dataclass_fields__
    return released_linear(W, H, common, ReleasedChoices(**{k: values[k] for k in names}))


CASES: dict[str, tuple[Sparsity, Options]] = {
    "billm": (NONE, B),
    "billm-paper": (NONE, replace(B, compensation="diagonal", metric="gram")),
    "billm-candidates": (NONE, replace(B, candidates=80)),
    "billm-saliency": (NONE, replace(B, search_on="saliency")),
    "billm-no-salient": (NONE, replace(B, salient_columns=0)),
    "billm-no-split": (NONE, replace(B, grouping="none")),
    "billm-uncompensated": (NONE, replace(B, compensation="off")),
    "billm-gram": (NONE, replace(B, scales="gram")),
    "billm-4:8": (Sparsity(4, 8), B),
    "billm-1:4-magnitude": (Sparsity(1, 4), replace(B, score="magnitude")),
    "billm-6:16-wanda": (Sparsity(6, 16), replace(B, score="wanda", prune_compensation=False)),
    "rc": (NONE, RC),
    "rc-paper": (NONE, replace(RC, compensation="diagonal")),
    "rc-one-salient-region": (NONE, replace(RC, split_salient=False)),
    "rc-no-salient": (NONE, replace(RC, salient_columns=0)),
    "rc-no-split": (NONE, replace(RC, grouping="none", split_salient=False)),
    "rc-trisection": (NONE, replace(RC, grouping="trisection")),
    "rc-one-iteration": (NONE, replace(RC, iterations=1)),
    "rc-4:8": (Sparsity(4, 8), RC),
    "rc-1:4": (Sparsity(1, 4), replace(RC, prune_compensation=False)),
    "x": (NONE, X),
    "x-paper": (NONE, replace(X, compensation="diagonal", metric="gram")),
    "x-one-salient-region": (NONE, replace(X, split_salient=False)),
    "x-no-salient": (NONE, replace(X, salient_columns=0)),
    "x-no-split": (NONE, replace(X, grouping="none", split_salient=False)),
    "x-weights-only": (NONE, replace(X, output_iterations=0)),
    "x-output-only": (NONE, replace(X, iterations=0)),
    "x-joint": (NONE, replace(X, scales="gram", metric="gram")),
    "x-4:8": (Sparsity(4, 8), X),
    "x-5:16-magnitude": (Sparsity(5, 16), replace(X, score="magnitude")),
    "released-4:8": (Sparsity(4, 8), REL),
    "released-6:8": (Sparsity(6, 8), replace(REL, candidates=160)),
    "released-2:8": (Sparsity(2, 8), REL),
    "released-1:4-no-salient": (Sparsity(1, 4), replace(REL, salient_columns=0)),
    "released-none": (NONE, REL),
    "billm-salient-once": (Sparsity(4, 8), replace(B, residual_order=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str) -> None:
    """Masks, regions, signs, scales of every block; `follow` compares."""
    sparsity, options = CASES[case]
    weight, gram = problem(300 + list(CASES).index(case), REFERENCE_ROWS)
    linear = compress(weight, gram, sparsity, options)
    expected = reference_of(weight, gram, sparsity, options, linear)
    assert linear.scales.shape == expected.scales.shape
    assert np.allclose(linear.dense().double().numpy(), expected.dense, rtol=1e-6, atol=1e-9)


def test_billm_is_stbllm_with_another_score_and_two_regions() -> None:
    weight, gram = problem(0)
    factor = inverse_factor(gram)
    for sparsity in (Sparsity(8, 8), Sparsity(4, 8)):
        other = StbllmOptions(score="sparsegpt", grouping="bell", candidates=80)
        one, two = billm(weight, gram, factor, sparsity, BillmOptions()), stbllm(weight, gram, factor, sparsity, other)
        assert torch.equal(one.dense(), two.dense())


# --- the alternations -------------------------------------------------------------------------------------------------


def started(
    seed: int, options: ArbOptions, sparsity: Sparsity = NONE, rows: int = ROWS
) -> tuple[BinaryBlock, Tensor, Tensor]:
    """BiLLM's binarization of one block, its weights, and a metric."""
    weight, gram = problem(seed, rows=rows, columns=BLOCK)
    shuffled = torch.rand(rows, BLOCK, generator=torch.Generator().manual_seed(seed))
    keep = keep_top(shuffled, sparsity.n, sparsity.m)
    upper = inverse_factor(gram).upper
    return binarize_searched(weight, keep, upper, options, split_salient=options.split_salient), weight, gram


@pytest.mark.parametrize("sparsity", [NONE, Sparsity(4, 8)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_alternations_of_a_row(seed: int, sparsity: Sparsity) -> None:
    """Numbers to 1e-5 before they are rounded, and the same signs."""
    start, weight, gram = started(seed, X, sparsity)
    refined = alternate_on_weights(start, weight, 15)
    final = alternate_on_output(refined, weight, gram, 15)
    W, S = weight.double().numpy(), gram.double().numpy()
    for part, end in zip(weight_sets(refined, weight), weight_sets(final, weight), strict=True):
        mask = np.zeros((ROWS, BLOCK), dtype=bool)
        mask[:, part.columns.numpy()] = part.mask.numpy()
        for i in range(ROWS):
            row = arb_on_weights(W[i], mask[i], len(part.scales), 15)
            numbers = [float(part.shift[i]), *(float(scale[i]) for scale in part.scales)]
            largest = np.abs([row.shift, *row.scales]).max()
            assert np.allclose(numbers, [row.shift, *row.scales], rtol=0, atol=1e-5 * largest)
            if mask[i].sum() > 2:
                for sign, expected in zip(part.signs, row.signs, strict=True):
                    assert np.array_equal(sign[i][part.mask[i]].numpy(), expected[mask[i]])
            row = arb_on_output(W[i], S, row, 15)
            numbers = [float(end.shift[i]), *(float(scale[i]) for scale in end.scales)]
            assert np.allclose(numbers, [row.shift, *row.scales], rtol=0, atol=1e-5 * largest + 1e-9)


def weight_error(block: BinaryBlock, weight: Tensor) -> Tensor:
    """(rows,) squared error of the kept weights."""
    return torch.where(block.keep, weight.double() - block.dense().double(), 0.0).square().sum(dim=1)


@pytest.mark.parametrize("options", [X, replace(X, split_salient=False), replace(X, grouping="none")], ids=str)
@pytest.mark.parametrize("sparsity", [NONE, Sparsity(4, 8)], ids=str)
def test_alternating_never_increases_the_weight_error(sparsity: Sparsity, options: ArbOptions) -> None:
    """Per row for ARB, over the block for ARB-RC, whose column scales join the rows."""
    start, weight, _ = started(3, options, sparsity)
    before = weight_error(start, weight)
    for iterations in range(1, 16):
        after = weight_error(alternate_on_weights(start, weight, iterations), weight)
        assert bool((after <= before * (1 + 1e-6) + 1e-12).all())
        before = after
    assert float(before.sum()) < float(weight_error(start, weight).sum())
    total = [float(weight_error(alternate_rows_and_columns(start, weight, n), weight).sum()) for n in range(16)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(total))
    assert total[-1] < total[0]


def set_errors(block: BinaryBlock, weight: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """(sets, rows) output error of every set's weights alone, and what they put out themselves."""
    errors, own = [], []
    for part in weight_sets(block, weight):
        value = torch.where(part.mask, part.shift[:, None] + part.signed(), 0.0)
        inner = metric[part.columns][:, part.columns].double()
        errors.append(quadratic_error((part.target - value).double(), inner))
        own.append(quadratic_error(part.target.double(), inner))
    return torch.stack(errors), torch.stack(own)


@pytest.mark.parametrize("sparsity", [NONE, Sparsity(4, 8)], ids=str)
def test_alternating_on_the_output_never_increases_its_error(sparsity: Sparsity) -> None:
    start, weight, gram = started(4, X, sparsity)
    refined = alternate_on_weights(start, weight, 15)
    before, own = set_errors(refined, weight, gram)
    first = before.sum()
    for iterations in range(1, 16):
        after, _ = set_errors(alternate_on_output(refined, weight, gram, iterations), weight, gram)
        assert bool((after <= before * (1 + 1e-5) + 1e-6 * own).all())
        before = after
    assert float(before.sum()) < 0.99 * float(first)


def test_row_and_column_scales_of_one_set_are_the_published_ones() -> None:
    """With one region and no salient columns there is nothing that a shared column scale would have to serve."""
    options = replace(RC, grouping="none", split_salient=False, salient_columns=0)
    for seed in range(4):
        start, weight, _ = started(seed, options, Sparsity(4, 8) if seed % 2 else NONE)
        block = alternate_rows_and_columns(start, weight, 15)
        expected = published_rc(weight.double().numpy(), block.keep.numpy(), 1, 15)
        assert np.allclose(block.dense().double().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_a_shared_column_scale_loses_little_to_the_published_form(split: bool) -> None:
    """The published form has a scale for every (column, set, sign), 2 to 4 times as many numbers."""
    ours = published = 0.0
    for seed in range(2):
        start, weight, _ = started(seed, replace(RC, split_salient=split), rows=96)
        ours += float(weight_error(alternate_rows_and_columns(start, weight, 15), weight).sum())
        W = weight.double().numpy()
        value = np.zeros_like(W)
        for part in weight_sets(start, weight):
            mask = np.zeros(W.shape, dtype=bool)
            mask[:, part.columns.numpy()] = part.mask.numpy()
            value += published_rc(W, mask, len(part.scales), 15)
        published += float(((W - value) ** 2).sum())
    assert ours < 1.05 * published, (ours, published)


def test_each_method_improves_on_billm() -> None:
    """In the mean output error; and the choices that the papers claim to help do."""

    @cache
    def mean(options: Options) -> float:
        relative = []
        for seed in range(4):
            weight, gram = problem(seed, rows=64)
            linear = compress(weight, gram, NONE, options)
            relative.append(output_error(weight, gram, linear) / float(quadratic_error(weight, gram).sum()))
        return float(np.mean(relative))

    assert mean(RC) < mean(replace(RC, split_salient=False)) < mean(B)
    assert mean(X) < mean(replace(X, split_salient=False)) < mean(B)
    assert mean(X) < mean(replace(X, output_iterations=0))
    assert mean(B) < mean(replace(B, salient_columns=0))
    assert mean(B) < mean(replace(B, grouping="none"))


# --- what must hold for any input -------------------------------------------------------------------------------------

SPARSE: list[Options] = [
    B,
    replace(B, scales="gram", salient_columns=0),
    RC,
    replace(RC, split_salient=False),
    X,
    replace(X, scales="gram", metric="gram"),
    replace(X, grouping="none", salient_columns=0),
]
EVERY: list[Options] = [*SPARSE, REL]


def name(options: Options) -> str:
    return f"{type(options).__name__}-{EVERY.index(options)}"


@pytest.mark.parametrize("options", SPARSE, ids=name)
@pytest.mark.parametrize("sparsity", ["1:4", "4:8", "7:8", "3:16"])
def test_pruned_is_zero(sparsity: str, options: Options) -> None:
    nm = Sparsity.parse(sparsity)
    linear = compress(*problem(5), nm, options)
    assert bool((linear.keep.reshape(ROWS, -1, nm.m).sum(dim=2) == nm.n).all())
    assert not bool(linear.dense()[~linear.keep].any())
    assert not bool(linear.positive[~linear.keep].any())
    assert not bool(linear.symbol[~linear.keep].any())


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "2:8"])
def test_as_released_pruned_is_not_zero(sparsity: str) -> None:
    """What is offered for comparison is dense, says so, and its bits are those of a dense matrix."""
    nm = Sparsity.parse(sparsity)
    linear = compress(*problem(6), nm, REL)
    pruned = (1 - nm.density) * ROWS * COLUMNS
    # A set of nothing but pruned weights, in the first block, is zero all the same.
    assert int((linear.dense() == 0).sum()) < 0.1 * pruned
    assert bool(linear.keep.all())
    assert linear.sparsity == NONE
    spec, _ = pack_grouped(linear)
    assert spec.nominal(0.1) == pytest.approx(1.1)
    assert 8 * spec.stored_bytes / (ROWS * COLUMNS) > 1 + 8 / 5  # a sign, a region of three, and scales


@pytest.mark.parametrize("options", EVERY, ids=name)
def test_every_weight_kept(options: Options) -> None:
    weight, gram = problem(7)
    linear = compress(weight, gram, NONE, options)
    assert bool(linear.keep.all())
    assert linear.sparsity == NONE
    assert output_error(weight, gram, linear) < 0.5 * float(quadratic_error(weight, gram).sum())


@pytest.mark.parametrize("options", EVERY, ids=name)
def test_inputs_are_not_changed_and_two_runs_are_equal(options: Options) -> None:
    weight, gram = problem(8)
    before = [weight.clone(), gram.clone()]
    first, second = (compress(weight, gram, Sparsity(4, 8), options) for _ in range(2))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert_same(first, second)


@pytest.mark.parametrize("options", EVERY, ids=name)
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_input_gives_a_finite_sensible_result(kind: str, options: Options) -> None:
    weight, gram = awkward(kind)
    if isinstance(options, ArbOptions):  # what can go wrong does so in the first iterations
        options = replace(options, iterations=4, output_iterations=4)
    for sparsity in (NONE, Sparsity(4, 8)):
        linear = compress(weight, gram, sparsity, options)
        dense = linear.dense()
        assert bool(dense.isfinite().all())
        before = float(quadratic_error(weight.double(), gram.double()).sum())
        assert output_error(weight, gram, linear) <= before * (1 + 1e-6) + 1e-12
        spec, tensors = pack_grouped(linear)
        assert torch.equal(spec.decode_rows(tensors), dense)


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": -1},
        {"output_iterations": -1},
        {"block_size": 60},
        {"candidates": 0},
        {"salient_columns": -1},
        {"damping": 0.0},
    ],
    ids=str,
)
def test_senseless_options(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(RC, **change).check(Sparsity(4, 8))


# --- the packed form --------------------------------------------------------------------------------------------------


def assert_same(one: GroupedBinaryLinear, other: GroupedBinaryLinear) -> None:
    assert (one.sparsity, one.block_size, one.regions) == (other.sparsity, other.block_size, other.regions)
    for field in ("keep", "positive", "symbol", "salient", "scales"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert (one.column_scales is None) == (other.column_scales is None)
    if one.column_scales is not None and other.column_scales is not None:
        assert torch.equal(one.column_scales, other.column_scales)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("salient_regions", [0, 1, 2])
@pytest.mark.parametrize("regions", [1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 8), (3, 4), (5, 16)])
def test_packing_is_exact(n: int, m: int, regions: int, salient_regions: int, columns: bool) -> None:
    linear = random_grouped(n, m, regions, salient_regions, columns)
    spec, tensors = pack_grouped(linear)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
    assert_same(linear, spec.unpack(tensors))
    assert torch.equal(spec.decode_rows(tensors), linear.dense())
    assert GroupedBinarySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for rows in (slice(0, 1), slice(2, 5)):
        assert torch.equal(spec.decode_rows(spec.row_slice(tensors, rows)), linear.dense()[rows])
    scales = (regions + 2 * salient_regions) if columns else 2 * regions + 3 * salient_regions
    assert tensors["scales"].shape == (5, 4, scales)


def value_of(linear: GroupedBinaryLinear, i: int, j: int) -> Tensor:
    """One weight, from the definition of the format; one float32 operation at a time."""
    numbers = linear.scales[i, j // linear.block_size].float()
    sign = 1.0 if linear.positive[i, j] else -1.0
    symbol, R = int(linear.symbol[i, j]), linear.regions
    if not linear.keep[i, j]:
        value = torch.tensor(0.0)
    elif linear.salient[j]:
        shift, scale, residual = numbers[2 * R + 3 * (symbol // 2) :][:3]
        value = (shift + sign * scale) + (1.0 if symbol % 2 else -1.0) * residual
    else:
        value = numbers[symbol] + sign * numbers[R + symbol]
    return value if linear.column_scales is None else value * linear.column_scales[j].float()


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("salient_regions", [1, 2])
def test_dense_follows_the_definition(salient_regions: int, columns: bool) -> None:
    linear = random_grouped(4, 8, 2, salient_regions, columns)
    expected = torch.stack([torch.stack([value_of(linear, i, j) for j in range(208)]) for i in range(5)])
    assert torch.equal(linear.dense(), expected)


def test_files_of_other_methods_do_not_change() -> None:
    """No new key, no new tensor; a description without the keys means what it meant."""
    spec, tensors = pack_grouped(random_grouped(4, 8, 2, 1, columns=False))
    assert list(spec.to_dict()) == [
        "kind", "out_features", "in_features", "n", "m", "block_size", "regions", "has_salient"
    ]  # fmt: skip
    assert set(tensors) == {"codes", "symbols", "scales", "salient"}
    old = GroupedBinarySpec.from_dict(spec.to_dict())
    assert (old.salient_regions, old.residual_bytes, old.has_column_scales) == (1, 0, False)
    assert {"salient", "column_scales"} == GroupedBinarySpec.column_tensors


def test_corrupt_packed_forms() -> None:
    linear = random_grouped(4, 8, 2, 2, columns=True)
    spec, tensors = pack_grouped(linear)
    with pytest.raises(CheckpointError, match="bytes a row"):
        spec.decode_rows({**tensors, "salient": torch.zeros_like(tensors["salient"])})
    with pytest.raises(ValueError, match="shift"):
        pack_grouped(replace(linear, scales=torch.ones_like(linear.scales)))


def bits(linear: GroupedBinaryLinear) -> float:
    spec, tensors = pack_grouped(linear)
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values()) / (spec.out_features * spec.in_features)


def test_stored_bits_are_those_of_the_literature() -> None:
    """1 sign + 1 region + 7 (BiLLM) or 4 (ARB-LLM_RC) numbers a block of 128: 2.88 and 2.51 (NanoQuant, appendix F)."""
    weight, gram = problem(9, rows=512, columns=256)
    assert bits(compress(weight, gram, NONE, BillmOptions())) == pytest.approx(2 + 7 / 8, abs=0.01)
    plain = ArbOptions(split_salient=False)
    assert bits(compress(weight, gram, NONE, plain)) == pytest.approx(2 + 4 / 8 + 16 / 512, abs=0.01)
    linear = compress(weight, gram, NONE, ArbOptions())
    residual = sum(8 * -(-int(part.sum()) // 8) for part in linear.salient.split(128)) / 256
    assert bits(linear) == pytest.approx(2 + 6 / 8 + residual + 17 / 512)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("billm", {}),
        ("billm", {"sparsity": "4:8"}),
        ("arb", {}),
        ("arb", {"options": {"variant": "x"}, "sparsity": "6:8"}),
        ("arb", {"options": {"split_salient": False, "block_size": 64}}),
        ("stbllm-as-released", {}),
    ],
    ids=str,
)
def test_a_loaded_model_is_its_dense_equivalent(
    method: str,
    fields: dict[str, Any],
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    recipe = recipe_for(method, **fields)
    assert Sparsity.parse(recipe.sparsity) == Sparsity.parse(fields.get("sparsity", METHODS[method].default_sparsity))
    subbit.compress(tiny("llama-gqa"), recipe, out)
    model, _ = subbit.load(out)
    expected = logits_of(dense_equivalent(tiny("llama-gqa"), out))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1
    density = np.mean([float((weight != 0).float().mean()) for weight in dense_weights(out).values()])
    kept = {"4:8": 0.5, "6:8": 0.75}.get(str(fields.get("sparsity")), 1.0)
    assert density == pytest.approx(kept, abs=0.01)
