"""Whole linears: STBLLM and PBS²P against the slow transcription in `reference.py`, and what must hold for any input.

Run with `pytest tests/test_methods.py`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    Blockwise,
    Floats,
    Pbs2pChoices,
    ReferenceBlock,
    ReferenceLinear,
    Settle,
    StbllmChoices,
    pbs2p_linear,
    stbllm_linear,
)
from torch import Tensor

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.binary.scales import quadratic_error
from subbit.linears import GroupedBinaryLinear
from subbit.methods import METHODS
from subbit.methods.blockwise import BinaryBlock, refit_on_gram
from subbit.methods.pbs2p import Pbs2pOptions, pbs2p, pruning_schedule
from subbit.methods.stbllm import StbllmOptions, stbllm

ROWS, COLUMNS, BLOCK = 24, 160, 64  # the last block is short
REFERENCE_ROWS = 10  # the references go through them one by one

Options = StbllmOptions | Pbs2pOptions


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and some large columns, and the Gram of correlated inputs with some large ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 0.02 * (1 + 0.3 * torch.randn(rows, columns, generator=generator).square())
    weight[:, torch.randperm(columns, generator=generator)[: columns // 20]] *= 4
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    tokens = torch.randn(4 * columns, columns, generator=generator) @ mix
    tokens[:, torch.randperm(columns, generator=generator)[: columns // 30]] *= 8
    return weight, tokens.T @ tokens / len(tokens)


def compress(weight: Tensor, gram: Tensor, sparsity: str | Sparsity, options: Options) -> GroupedBinaryLinear:
    nm = Sparsity.parse(sparsity) if isinstance(sparsity, str) else sparsity
    factor = inverse_factor(gram, options.damping)
    if isinstance(options, StbllmOptions):
        return stbllm(weight, gram, factor, nm, options)
    return pbs2p(weight, gram, factor, nm, options)


def follow(linear: GroupedBinaryLinear, solved: bool) -> Settle:
    """Check a block of the reference against ``linear``, and let the reference go on with what ``linear`` stores.

    An exact scale near the middle of two float16 numbers may be rounded either way, and the residual signs of ``moot``
    weights are arbitrary; without following, everything to the right of such a block would differ a little.

    Args:
        solved: the scales are solved on the output error. A row whose joint system is (nearly) singular, for example
            because a region has one sign only, has many best scales, so there the values must agree, not the scales.
    """

    def settle(index: int, block: ReferenceBlock, target: Floats, metric: Floats) -> None:
        columns = slice(index * linear.block_size, (index + 1) * linear.block_size)
        assert np.array_equal(linear.keep[:, columns].numpy(), block.keep)
        assert np.array_equal(linear.salient[columns].numpy(), block.salient)
        assert np.array_equal(linear.positive[:, columns].numpy(), block.positive)
        symbol = linear.symbol[:, columns].long().numpy()
        assert np.array_equal(symbol[~block.moot], block.symbol[~block.moot])
        exact, values = block.scales.copy(), block.dense()
        stored = np.zeros_like(exact)
        stored[:, : linear.scales.shape[2]] = linear.scales[:, index].double().numpy()
        if solved:
            sharp = np.array([condition(block.basis(i), metric) < 1e3 for i in range(len(exact))])
        else:
            sharp = np.ones(len(exact), dtype=bool)
        ulp = np.abs(np.spacing(exact.astype(np.float16)).astype(np.float64))
        # The package multiplies in float32; a solution moves by that noise times the condition number, here below 1e3.
        slack = 2e-4 * np.abs(exact).max(axis=1, keepdims=True) if solved else 0.0
        assert (np.abs(stored - exact) <= ulp + slack)[sharp].all()
        block.symbol, block.scales = symbol, stored
        # A value is the sum of at most three rounded scales.
        bound = 3 * 2**-11 * np.maximum(np.abs(exact), np.abs(stored)).max(axis=1, keepdims=True) + 1e-7
        assert (np.abs(block.dense() - values) <= bound).all()

    return settle


def condition(basis: Floats, metric: Floats) -> float:
    """Condition number of the joint system of a row, without the basis vectors that are all zero."""
    used = basis[np.abs(basis).sum(axis=1) > 0]
    return float(np.linalg.cond(used @ metric @ used.T))


def reference_of(
    weight: Tensor, gram: Tensor, sparsity: str, options: Options, linear: GroupedBinaryLinear
) -> ReferenceLinear:
    nm = Sparsity.parse(sparsity)
    solved = isinstance(options, Pbs2pOptions) or options.scales == "gram"
    common = Blockwise(
        nm.n,
        nm.m,
        options.block_size,
        options.damping,
        options.salient_columns,
        options.residual_order,
        options.compensation,
        options.metric,
        follow(linear, solved),
    )
    W, H = weight.double().numpy(), gram.double().numpy()
    if isinstance(options, StbllmOptions):
        fields = StbllmChoices.__dataclass_fields__
        return stbllm_linear(W, H, common, StbllmChoices(**{name: getattr(options, name) for name in fields}))
    fields = Pbs2pChoices.__dataclass_fields__
    return pbs2p_linear(W, H, common, Pbs2pChoices(**{name: getattr(options, name) for name in fields}))


def assert_equals_reference(seed: int, sparsity: str, options: Options) -> None:
    """Masks, signs and regions exactly, scales to one unit in the last place of float16: :func:`follow` compares."""
    short_block = options.salient_columns <= 12
    weight, gram = problem(seed, REFERENCE_ROWS, COLUMNS if short_block else 3 * BLOCK)
    linear = compress(weight, gram, sparsity, options)
    expected = reference_of(weight, gram, sparsity, options, linear)
    assert linear.scales.shape == expected.scales.shape
    assert np.allclose(linear.dense().double().numpy(), expected.dense, rtol=1e-6, atol=1e-9)


# Fewer salient columns than by default: the short last block has 32, and when all but two of them are salient, every
# split of the rest is exact. Then all candidates tie at an error of zero, and rounding decides which one is taken.
S = StbllmOptions(block_size=BLOCK, candidates=20, salient_columns=12)
P = Pbs2pOptions(block_size=BLOCK, candidates=20, salient_columns=12)

STBLLM_CASES: dict[str, tuple[str, StbllmOptions]] = {
    "defaults": ("4:8", replace(S, candidates=160, salient_columns=30)),
    "paper": ("4:8", replace(S, compensation="diagonal", metric="gram")),
    "not-standardized": ("6:8", replace(S, standardize=False)),
    "exponent": ("4:8", replace(S, activation_exponent=0.5)),
    "magnitude": ("2:4", replace(S, score="magnitude")),
    "wanda": ("1:4", replace(S, score="wanda")),
    "ria": ("8:16", replace(S, score="ria", activation_exponent=0.5)),
    "sparsegpt": ("5:16", replace(S, score="sparsegpt")),
    "obs": ("3:8", replace(S, score="obs")),
    "ungrouped": ("4:8", replace(S, grouping="none")),
    "bell": ("4:8", replace(S, grouping="bell")),
    "no-salient": ("4:8", replace(S, salient_columns=0)),
    "one-salient": ("4:8", replace(S, salient_columns=1)),
    "more-salient-than-columns": ("4:8", replace(S, salient_columns=49)),
    "saliency": ("4:8", replace(S, search_on="saliency")),
    "uncompensated": ("4:8", replace(S, compensation="off")),
    "diagonal": ("4:8", replace(S, compensation="diagonal")),
    "no-prune-compensation": ("4:8", replace(S, prune_compensation=False)),
    "damping": ("4:8", replace(S, damping=0.1)),
    "salient-once": ("4:8", replace(S, residual_order=1)),
}


@pytest.mark.parametrize("case", STBLLM_CASES)
def test_stbllm_equals_the_reference(case: str) -> None:
    sparsity, options = STBLLM_CASES[case]
    assert_equals_reference(list(STBLLM_CASES).index(case), sparsity, options)


STBLLM_GRAM_CASES: dict[str, tuple[str, StbllmOptions]] = {
    "conditional": ("4:8", replace(S, scales="gram")),
    "gram": ("4:8", replace(S, scales="gram", metric="gram")),
    "bell-diagonal": ("2:4", replace(S, scales="gram", grouping="bell", compensation="diagonal")),
    "no-salient": ("6:16", replace(S, scales="gram", salient_columns=0)),
    "salient-once": ("4:8", replace(S, scales="gram", residual_order=1)),
}


@pytest.mark.parametrize("case", STBLLM_GRAM_CASES)
def test_stbllm_with_scales_on_the_output_equals_the_reference(case: str) -> None:
    sparsity, options = STBLLM_GRAM_CASES[case]
    assert_equals_reference(100 + list(STBLLM_GRAM_CASES).index(case), sparsity, options)


PBS2P_CASES: dict[str, tuple[str, Pbs2pOptions]] = {
    "defaults": ("4:8", replace(P, candidates=80, salient_columns=30)),
    "paper": ("4:8", replace(P, rescore=False, compensation="diagonal", metric="gram")),
    "at-once": ("4:8", replace(P, steps=1)),
    "at-once-paper": ("4:8", replace(P, steps=1, rescore=False, metric="gram")),
    "two-steps": ("4:8", replace(P, steps=2)),
    "gram": ("2:4", replace(P, metric="gram")),
    "sixteen": ("6:16", replace(P, steps=5)),
    "uncompensated": ("6:8", replace(P, compensation="off")),
    "diagonal": ("6:8", replace(P, compensation="diagonal")),
    "no-salient": ("4:8", replace(P, salient_columns=0)),
    "ungrouped": ("4:8", replace(P, grouping="none")),
    "trisection": ("4:8", replace(P, grouping="trisection")),
    "magnitude": ("5:8", replace(P, score="magnitude", rescore=False)),
    "sparsegpt": ("5:8", replace(P, score="sparsegpt", rescore=False)),
    "salient-once": ("4:8", replace(P, residual_order=1)),
}


@pytest.mark.parametrize("case", PBS2P_CASES)
def test_pbs2p_equals_the_reference(case: str) -> None:
    sparsity, options = PBS2P_CASES[case]
    assert_equals_reference(200 + list(PBS2P_CASES).index(case), sparsity, options)


# --- what must hold for any input -------------------------------------------------------------------------------------

EVERY_METHOD: list[Options] = [
    S,
    replace(S, scales="gram", compensation="diagonal"),
    replace(S, scales="gram", metric="gram", salient_columns=0, grouping="none"),
    P,
    replace(P, metric="gram", rescore=False, steps=1, salient_columns=0),
]


def name(options: Options) -> str:
    return f"{type(options).__name__}-{EVERY_METHOD.index(options)}"


def output_error(weight: Tensor, gram: Tensor, linear: GroupedBinaryLinear) -> float:
    """tr((W − Q) H (W − Q)ᵀ) in float64."""
    return float(quadratic_error(weight.double() - linear.dense().double(), gram.double()).sum())


@pytest.mark.parametrize("options", EVERY_METHOD, ids=name)
@pytest.mark.parametrize("sparsity", ["1:4", "3:4", "1:8", "4:8", "7:8", "3:16", "15:16"])
def test_pruned_is_zero(sparsity: str, options: Options) -> None:
    nm = Sparsity.parse(sparsity)
    weight, gram = problem(3)
    linear = compress(weight, gram, nm, options)
    groups = linear.keep.reshape(ROWS, -1, nm.m).sum(dim=2)
    assert bool((groups == nm.n).all())
    dense = linear.dense()
    assert bool((dense[~linear.keep] == 0).all())
    assert int((dense != 0).reshape(ROWS, -1, nm.m).sum(dim=2).max()) <= nm.n
    assert not bool(linear.positive[~linear.keep].any())
    assert not bool(linear.symbol[~linear.keep].any())


@pytest.mark.parametrize("options", EVERY_METHOD, ids=name)
def test_structure(options: Options) -> None:
    weight, gram = problem(4)
    linear = compress(weight, gram, "4:8", options)
    regions = {"none": 1, "bell": 2, "trisection": 3}[options.grouping]
    assert linear.shape == (ROWS, COLUMNS)
    assert linear.sparsity == Sparsity(4, 8)
    assert (linear.block_size, linear.regions) == (BLOCK, regions)
    assert linear.has_salient == (options.salient_columns > 0)
    assert linear.scales.shape == (ROWS, 3, 2 * regions + (3 if linear.has_salient else 0))
    assert linear.scales.dtype == torch.float16
    assert (linear.keep.dtype, linear.positive.dtype, linear.salient.dtype) == (torch.bool,) * 3
    assert linear.symbol.dtype == torch.uint8
    assert int(linear.symbol[:, ~linear.salient].max()) < regions
    counts = [int(linear.salient[start : start + BLOCK].sum()) for start in range(0, COLUMNS, BLOCK)]
    if options.salient_columns:
        assert all(1 <= count <= options.salient_columns for count in counts)
        assert int(linear.symbol[:, linear.salient].max()) <= 1
    else:
        assert counts == [0, 0, 0]


@pytest.mark.parametrize("options", EVERY_METHOD, ids=name)
def test_inputs_are_not_changed_and_two_runs_are_equal(options: Options) -> None:
    weight, gram = problem(5)
    factor = inverse_factor(gram)
    before = [tensor.clone() for tensor in (weight, gram, factor.upper)]
    first, second = compress(weight, gram, "4:8", options), compress(weight, gram, "4:8", options)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gram, factor.upper), strict=True))
    for field in ("keep", "positive", "symbol", "salient", "scales"):
        assert torch.equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize("options", EVERY_METHOD, ids=name)
def test_dense_sparsity_keeps_everything(options: Options) -> None:
    """The allocator may give a linear N = M."""
    weight, gram = problem(6)
    linear = compress(weight, gram, Sparsity(8, 8), options)
    assert bool(linear.keep.all())
    assert bool(linear.dense().isfinite().all())
    assert output_error(weight, gram, linear) < float(quadratic_error(weight, gram).sum())


@pytest.mark.parametrize("options", [S, P, replace(P, metric="gram", rescore=False)], ids=["stbllm", "pbs2p", "paper"])
def test_better_compensation_loses_less_on_average(options: Options) -> None:
    """exact <= diagonal <= off in the mean of tr((W − Q) H (W − Q)ᵀ) relative to the weight's own output."""
    means = []
    for mode in ("exact", "diagonal", "off"):
        relative = []
        for seed in range(5):
            weight, gram = problem(seed)
            linear = compress(weight, gram, "4:8", replace(options, compensation=mode))
            relative.append(output_error(weight, gram, linear) / float(quadratic_error(weight, gram).sum()))
        means.append(float(np.mean(relative)))
    assert means[0] <= means[1] <= means[2], means


@pytest.mark.parametrize("metric", ["gram", "conditional"])
def test_pbs2p_without_rescoring_does_not_depend_on_the_steps(metric: Any) -> None:
    weight, gram = problem(7)
    results = [
        compress(weight, gram, "3:8", replace(P, rescore=False, metric=metric, steps=steps)) for steps in (0, 1, 2, 3)
    ]
    for other in results[1:]:
        for field in ("keep", "positive", "symbol", "salient", "scales"):
            assert torch.equal(getattr(other, field), getattr(results[0], field))


def test_pbs2p_rescoring_beats_the_plain_score_on_average() -> None:
    def total(**changes: Any) -> float:
        options = replace(P, **changes)
        return sum(output_error(*problem(seed), compress(*problem(seed), "4:8", options)) for seed in range(6))

    assert total() < total(rescore=False)
    assert total() < total(steps=1)


def test_pruning_schedule() -> None:
    assert pruning_schedule(Sparsity(4, 8), 0) == [7, 6, 5, 4]
    assert pruning_schedule(Sparsity(4, 8), 4) == [7, 6, 5, 4]
    assert pruning_schedule(Sparsity(4, 8), 2) == [6, 4]
    assert pruning_schedule(Sparsity(4, 8), 1) == [4]
    assert pruning_schedule(Sparsity(6, 8), 99) == [7, 6]
    assert pruning_schedule(Sparsity(8, 8), 3) == [8]
    for n in range(1, 16):
        for steps in range(17):
            schedule = pruning_schedule(Sparsity(n, 16), steps)
            assert schedule[-1] == n
            assert len(schedule) == min(steps or 16 - n, 16 - n)
            assert all(later < earlier for earlier, later in pairwise([16, *schedule]))


@pytest.mark.parametrize("options", [P, replace(P, metric="gram"), replace(P, grouping="trisection")], ids=str)
def test_refitting_never_loses(options: Pbs2pOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per row, after every pruning step: solved scales are no worse than the scales they replace."""
    seen: list[bool] = []

    def watched(block: BinaryBlock, target: Tensor, metric: Tensor) -> Tensor:
        solved = refit_on_gram(block, target, metric)
        exact = metric.double()
        before = quadratic_error(target.double() - block.dense().double(), exact)
        after = quadratic_error(target.double() - replace(block, scales=solved).dense().double(), exact)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < float(before.sum())
        seen.append(True)
        return solved

    monkeypatch.setattr(import_module("subbit.methods.pbs2p"), "refit_on_gram", watched)
    weight, gram = problem(8)
    compress(weight, gram, "4:8", options)
    assert len(seen) == 4 * 3


def awkward(kind: str) -> tuple[Tensor, Tensor]:
    """Problems that divide by zero or overflow in a careless implementation."""
    weight, gram = problem(9)
    if kind == "zero-gram":
        gram = torch.zeros_like(gram)
    elif kind == "dead-columns":
        dead = [3, 4, 5, 100, 159]
        gram[dead], gram[:, dead] = 0.0, 0.0
    elif kind == "dead-block":
        gram[BLOCK : 2 * BLOCK], gram[:, BLOCK : 2 * BLOCK] = 0.0, 0.0
    elif kind == "one-token":
        token = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(0))
        gram = token.T @ token
    elif kind == "constant-row":
        weight[2] = 0.125
    elif kind == "constant-weight":
        weight = torch.full_like(weight, 0.01)
    elif kind == "zero-rows":
        weight[[0, 7]] = 0.0
    elif kind == "zero-columns":
        weight[:, [0, 1, 2, 3, 64, 150]] = 0.0
    elif kind == "zero-weight":
        weight = torch.zeros_like(weight)
    elif kind == "positive":
        weight = weight.abs()
    elif kind == "two-values":
        weight = weight.sign() * 0.5
    elif kind == "large":
        weight = weight * 2**16
    elif kind == "tiny":
        weight = weight * 1e-12
    elif kind == "huge-gram":
        gram = gram * 1e12
    elif kind == "tiny-gram":
        gram = gram * 1e-12
    elif kind == "massive-activation":
        gram[17] *= 300
        gram[:, 17] *= 300
    return weight, gram


AWKWARD = [
    "zero-gram",
    "dead-columns",
    "dead-block",
    "one-token",
    "constant-row",
    "constant-weight",
    "zero-rows",
    "zero-columns",
    "zero-weight",
    "positive",
    "two-values",
    "large",
    "tiny",
    "huge-gram",
    "tiny-gram",
    "massive-activation",
]


@pytest.mark.parametrize("options", EVERY_METHOD, ids=name)
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_input_gives_a_finite_sensible_result(kind: str, options: Options) -> None:
    weight, gram = awkward(kind)
    linear = compress(weight, gram, "4:8", options)
    dense = linear.dense()
    assert bool(dense.isfinite().all())
    assert bool((linear.keep.reshape(ROWS, -1, 8).sum(dim=2) == 4).all())
    before = float(quadratic_error(weight.double(), gram.double()).sum())
    assert output_error(weight, gram, linear) <= before * (1 + 1e-6) + 1e-12


def test_a_row_of_zeros_stays_zero() -> None:
    for options in EVERY_METHOD:
        weight, gram = awkward("zero-rows")
        assert not bool(compress(weight, gram, "4:8", options).dense()[[0, 7]].any())


def test_scaling_the_weight_by_a_power_of_two_scales_the_result() -> None:
    weight, gram = problem(10)
    for options in (S, replace(P, rescore=False)):
        one, four = compress(weight, gram, "4:8", options), compress(4 * weight, gram, "4:8", options)
        for field in ("keep", "positive", "symbol", "salient"):
            assert torch.equal(getattr(one, field), getattr(four, field))
        assert torch.allclose(four.scales.float(), 4 * one.scales.float(), rtol=1e-3, atol=1e-5)


def test_rows_are_independent_given_the_searches() -> None:
    """Permuting the output rows permutes the result: nothing of a row leaks into another one."""
    weight, gram = problem(11)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for options in EVERY_METHOD:
        plain, permuted = compress(weight, gram, "4:8", options), compress(weight[order], gram, "4:8", options)
        assert torch.equal(plain.keep[order], permuted.keep)
        assert torch.allclose(plain.dense()[order], permuted.dense(), rtol=2e-3, atol=1e-5)


def test_method_table() -> None:
    weight, gram = problem(12)
    for method in METHODS.values():
        if method.default_sparsity == "none":
            continue
        options = method.options(block_size=BLOCK) if hasattr(method.options, "block_size") else method.options()
        factor = InverseFactor(inverse_factor(gram, options.damping).upper, options.damping)
        linear = method.run(weight, gram, factor, Sparsity(4, 8), options)
        assert linear.shape == (ROWS, COLUMNS)
