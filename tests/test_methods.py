"""Whole linears: STBLLM and PBS²P against the slow transcription in `reference.py`, and what must hold for any input.

Run with `pytest tests/test_methods.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    Blockwise,
    Floats,
    Pbs2pChoices,
    ReferenceLinear,
    Settle,
    StbllmChoices,
    pbs2p_linear,
    round_to_half,
    stbllm_linear,
)
from torch import Tensor

import subbit.methods.pbs2p as pbs2p_module
from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.binary.scales import quadratic_error
from subbit.linears import GroupedBinaryLinear
from subbit.methods import METHODS
from subbit.methods.blockwise import BinaryBlock, refit_on_gram
from subbit.methods.pbs2p import Pbs2pOptions, pbs2p, pruning_schedule
from subbit.methods.stbllm import StbllmOptions, stbllm

ROWS, COLUMNS, BLOCK = 24, 160, 64  # the last block is short

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


def follow(linear: GroupedBinaryLinear, slack: float) -> Settle:
    """Check the exact scales of a block against the stored ones, and go on with the stored ones.

    An exact scale near the middle of two float16 numbers may be rounded either way; without following, everything to
    the right of such a block would differ a little. The bound is one unit in the last place of float16 of the row's
    largest scale, plus ``slack`` of it.
    """

    def settle(block: int, scales: Floats) -> Floats:
        stored = linear.scales[:, block].double().numpy()
        assert stored.shape == scales.shape
        exact = np.abs(stored - scales) <= np.abs(np.spacing(scales.astype(np.float16)).astype(np.float64))
        loose = np.abs(stored - scales) <= slack * np.abs(scales).max(axis=1, keepdims=True)
        assert (exact | loose).all(), f"block {block}: scales differ by {np.abs(stored - scales).max()}"
        nearest = stored == round_to_half(block, scales)
        assert nearest.mean() > (0.95 if slack < 1e-4 else 0.7)
        return stored

    return settle


def reference_of(
    weight: Tensor, gram: Tensor, sparsity: str, options: Options, linear: GroupedBinaryLinear, slack: float
) -> ReferenceLinear:
    nm = Sparsity.parse(sparsity)
    common = Blockwise(
        nm.n,
        nm.m,
        options.block_size,
        options.damping,
        options.salient_columns,
        options.compensation,
        options.metric,
        follow(linear, slack),
    )
    W, H = weight.double().numpy(), gram.double().numpy()
    if isinstance(options, StbllmOptions):
        fields = StbllmChoices.__dataclass_fields__
        return stbllm_linear(W, H, common, StbllmChoices(**{name: getattr(options, name) for name in fields}))
    fields = Pbs2pChoices.__dataclass_fields__
    return pbs2p_linear(W, H, common, Pbs2pChoices(**{name: getattr(options, name) for name in fields}))


def assert_equals_reference(seed: int, sparsity: str, options: Options, slack: float = 1e-5) -> None:
    weight, gram = problem(seed)
    linear = compress(weight, gram, sparsity, options)
    expected = reference_of(weight, gram, sparsity, options, linear, slack)
    assert np.array_equal(linear.keep.numpy(), expected.keep)
    assert np.array_equal(linear.salient.numpy(), expected.salient)
    assert np.array_equal(linear.symbol.numpy(), expected.symbol)
    assert np.array_equal(linear.positive.numpy(), expected.positive)
    assert np.array_equal(linear.scales.double().numpy(), expected.scales)
    assert np.allclose(linear.dense().double().numpy(), expected.dense, rtol=1e-6, atol=1e-9)


S = StbllmOptions(block_size=BLOCK, candidates=40)
P = Pbs2pOptions(block_size=BLOCK, candidates=40)

STBLLM_CASES: dict[str, tuple[str, StbllmOptions]] = {
    "defaults": ("4:8", replace(S, candidates=160)),
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
}


@pytest.mark.parametrize("case", STBLLM_CASES)
def test_stbllm_equals_the_reference(case: str) -> None:
    sparsity, options = STBLLM_CASES[case]
    assert_equals_reference(1, sparsity, options)


STBLLM_GRAM_CASES: dict[str, tuple[str, StbllmOptions]] = {
    "conditional": ("4:8", replace(S, scales="gram")),
    "gram": ("4:8", replace(S, scales="gram", metric="gram")),
    "bell-diagonal": ("2:4", replace(S, scales="gram", grouping="bell", compensation="diagonal")),
    "no-salient": ("6:16", replace(S, scales="gram", salient_columns=0)),
}


@pytest.mark.parametrize("case", STBLLM_GRAM_CASES)
def test_stbllm_with_scales_on_the_output_equals_the_reference(case: str) -> None:
    sparsity, options = STBLLM_GRAM_CASES[case]
    assert_equals_reference(1, sparsity, options, slack=1e-3)


PBS2P_CASES: dict[str, tuple[str, Pbs2pOptions]] = {
    "defaults": ("4:8", replace(P, candidates=80)),
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
}


@pytest.mark.parametrize("case", PBS2P_CASES)
def test_pbs2p_equals_the_reference(case: str) -> None:
    sparsity, options = PBS2P_CASES[case]
    assert_equals_reference(2, sparsity, options, slack=1e-3)
