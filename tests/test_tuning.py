"""Tuning: gradients against explicit formulas, reconstruction and distillation that lose less, runs killed anywhere.

Run with `pytest tests/test_tuning.py`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Lines, interrupt_at, logits_of, stored_tensors
from families import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from test_resume import contents, die, in_a_fork, smallest_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import subbit
from subbit import Recipe, UserError, distillation
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity, keep_top
from subbit.checkpoint.writer import CheckpointWriter
from subbit.job import Job
from subbit.layerwise import install
from subbit.linears import CodesLinear, GroupedBinaryLinear, UniformLinear
from subbit.methods import METHODS
from subbit.models.experts import split_experts
from subbit.models.layout import find_layout
from subbit.models.source import ModelSource, open_source
from subbit.models.streaming import LayerCall, capture_inputs, outside_on_demand, run_head, run_layer
from subbit.packing.layout import GroupedBinarySpec, pack, read_spec
from subbit.progress import SilentProgress
from subbit.runtime import native
from subbit.tuning import distill as distilling
from subbit.tuning.distill import (
    Student,
    distill,
    divergence,
    divergences,
    mean_divergence,
    optimizer_tensors,
    window_order,
)
from subbit.tuning.graph import Replayed
from subbit.tuning.optimizer import Rates, make_optimizer, set_rate, tuned_norms
from subbit.tuning.precision import mixed_precision, products_here, resolve_precision
from subbit.tuning.reconstruct import reconstruct, token_weights
from subbit.tuning.tunable import (
    TunableCodes,
    TunableGroupedBinary,
    latent_signs,
    make_tunable,
    round_all_pairs,
    separate,
)

pytestmark = pytest.mark.usefixtures("torch_backend")

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]

CPU = torch.device("cpu")
RATES = Rates(latents=1e-2, scales=2e-3, norms=1e-3)
FIRST_TOKEN = 0.1
WINDOWS = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_codes(sparsity: str, rows: int, columns: int, column_scales: bool, seed: int = 0) -> CodesLinear:
    """Random codewords and positive scales."""
    nm, generator = Sparsity.parse(sparsity), seeded(seed)
    keep = keep_top(torch.rand(rows, columns, generator=generator), nm.n, nm.m)
    signs = (2 * torch.randint(2, (rows, columns), generator=generator) - 1) * keep
    row = (0.01 + torch.rand(rows, generator=generator)).half()
    column = (0.5 + torch.rand(columns, generator=generator)).half() if column_scales else None
    return CodesLinear(nm, signs.to(torch.int8), row, column)


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_latent_signs_are_those_of_the_largest(
    n: int, m: int, kernel: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The N largest of every group with their signs, the lower column where sizes are equal; any number of groups."""
    if kernel == "native":
        monkeypatch.delenv("SUBBIT_NATIVE", raising=False)
        if native.reason_missing():
            pytest.skip(str(native.reason_missing()))
    many = torch.randn(9000, m, generator=seeded(10 * n + m))
    tied = (2 * torch.randn(30, 4 * m, generator=seeded(n))).round()  # many equal values
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for latent in (many, tied, many[:1], torch.zeros(2, m), many.T.contiguous().T):
        expected = torch.where(latent < 0, -1, 1) * keep_top(latent.abs(), n, m)
        assert torch.equal(latent_signs(latent, Sparsity(n, m)), expected.to(torch.int8))
        if kernel == "torch":  # what a GPU does
            assert torch.equal(round_all_pairs(latent, Sparsity(n, m), torch.int8), expected.to(torch.int8))
    torch.set_num_threads(before)


@pytest.mark.parametrize("column_scales", [True, False])
@pytest.mark.parametrize("sparsity", ["1:4", "1:8", "2:8", "3:8", "4:8", "2:16", "none"])
def test_a_fresh_tunable_is_the_linear_that_went_in(sparsity: str, column_scales: bool) -> None:
    """Signs and scales bit for bit, whatever the weights were; its product is that of the dense weights."""
    linear = random_codes(sparsity, 12, 48, column_scales)
    generator = seeded(1)
    weights = {
        "near": linear.dense() + 0.1 * torch.randn(12, 48, generator=generator),
        "unrelated": torch.randn(12, 48, generator=generator),
        "huge": 1e4 * torch.randn(12, 48, generator=generator),
        "zero": torch.zeros(12, 48),
        "opposite": -linear.dense(),
    }
    inputs = torch.randn(2, 5, 48, generator=generator)
    bias = nn.Parameter(torch.randn(12, generator=generator))
    for kind, weight in weights.items():
        tunable = make_tunable(linear, weight, bias)
        assert isinstance(tunable, TunableCodes)
        back = tunable.linear()
        assert torch.equal(back.signs, linear.signs), kind
        assert back.signs.dtype == torch.int8
        assert torch.equal(back.row_scales, linear.row_scales)
        assert (back.column_scales is None) == (linear.column_scales is None)
        assert torch.equal(back.scales, linear.scales)
        expected = functional.linear(inputs, linear.dense(), bias)
        assert torch.allclose(tunable(inputs), expected, rtol=1e-5, atol=1e-5)


def test_awkward_scales_do_not_break_the_latents() -> None:
    """Rows and columns of scale zero, and negative ones: finite latents, and what went in comes out."""
    linear = random_codes("2:8", 6, 24, True)
    assert linear.column_scales is not None
    linear.row_scales[0] = 0.0
    linear.row_scales[1] *= -1
    linear.column_scales[3] = 0.0
    tunable = TunableCodes(linear, torch.randn(6, 24, generator=seeded(0)), None)
    assert bool(tunable.latent.isfinite().all())
    assert torch.equal(tunable.linear().dense(), linear.dense())
    tunable(torch.randn(3, 24, generator=seeded(1))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in tunable.parameters())


def test_latents_start_at_the_weights_where_they_can() -> None:
    """A weight that is kept or pruned as its size asks for stands at W/(r·c): what lies near changes first."""
    linear = random_codes("2:8", 6, 24, True)
    assert linear.column_scales is not None
    scale = linear.row_scales.float()[:, None] * linear.column_scales.float()
    relative = torch.where(linear.signs != 0, 0.9 * linear.signs, 0.3 * torch.randn(6, 24, generator=seeded(0)).sign())
    tunable = TunableCodes(linear, scale * relative, None)
    assert torch.allclose(tunable.latent, relative, rtol=1e-5)


@pytest.mark.parametrize("column_scales", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_gradients_pass_straight_through_the_rounding(shape: tuple[int, ...], column_scales: bool) -> None:
    """With G = gradient of the output: ∂W = Gᵀx, ∂u = ∂W·r·c for all latents, pruned too; ∂x = G·Ŵ; scales exactly."""
    linear = random_codes("2:8", 10, 24, column_scales)
    tunable = TunableCodes(linear, torch.randn(10, 24, generator=seeded(2)), nn.Parameter(torch.zeros(10)))
    with torch.no_grad():  # scales that have moved
        tunable.log_row.copy_(0.1 * torch.randn(10, generator=seeded(3)))
        if column_scales:
            tunable.log_column.copy_(0.1 * torch.randn(24, generator=seeded(4)))
    inputs = torch.randn(shape, generator=seeded(5)).requires_grad_(True)
    outer = torch.randn(*shape[:-1], 10, generator=seeded(6))
    (tunable(inputs) * outer).sum().backward()
    row = linear.row_scales.float() * tunable.log_row.detach().exp()
    column = torch.ones(24) if linear.column_scales is None else linear.column_scales.float()
    column = column * tunable.log_column.detach().exp()
    scale = row[:, None] * column
    dense = scale * linear.signs
    dweight = outer.flatten(0, -2).T @ inputs.detach().flatten(0, -2)
    expected = {
        "latent": dweight * scale,
        "log_row": (dweight * dense).sum(dim=1),
        "bias": outer.flatten(0, -2).sum(dim=0),
    }
    if column_scales:
        expected["log_column"] = (dweight * dense).sum(dim=0)
    for name, gradient in expected.items():
        found = tunable.get_parameter(name).grad
        assert found is not None
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-5), name
    if not column_scales:
        assert tunable.log_column.grad is None
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, outer @ dense, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_scales_are_true_ones() -> None:
    """Finite differences in float64, with the latents fixed: there is nothing straight-through about the scales."""
    linear = random_codes("2:8", 4, 16, True)
    tunable = TunableCodes(linear, linear.dense(), None).double()
    inputs = torch.randn(3, 16, generator=seeded(1), dtype=torch.float64)

    def loss() -> Tensor:
        result: Tensor = tunable(inputs).square().sum()
        return result

    loss().backward()
    for parameter in (tunable.log_row, tunable.log_column):
        assert parameter.grad is not None
        for place in range(3):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[place] += step
                    values.append(float(loss()))
                    parameter[place] -= step
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(parameter.grad[place]), rel=1e-5)


def test_a_tuned_linear_is_what_the_layer_ran_with() -> None:
    """After a few steps the returned linear has the product of the forward pass, and other signs than before."""
    linear = random_codes("2:8", 16, 32, True)
    tunable = TunableCodes(linear, torch.randn(16, 32, generator=seeded(1)), None)
    holder = nn.Sequential(tunable)
    optimizer = make_optimizer([holder], Rates(0.3, 1e-2, 0.0))
    inputs, wanted = torch.randn(20, 32, generator=seeded(2)), torch.randn(20, 16, generator=seeded(3))
    for _ in range(5):
        optimizer.zero_grad()
        (holder(inputs) - wanted).square().sum().backward()
        optimizer.step()
    back = tunable.linear()
    assert bool(((back.signs != 0).view(16, 4, 8).sum(dim=2) == 2).all())
    assert not torch.equal(back.signs, linear.signs)
    assert not torch.equal(back.row_scales, linear.row_scales)
    assert torch.allclose(holder(inputs), inputs @ back.dense().T, rtol=1e-2, atol=1e-2)
    spec, packed = pack(back)
    assert torch.equal(spec.decode_rows(packed), back.dense())


def test_mixed_precision_is_near_float32() -> None:
    """Products within what bfloat16 rounds, and in bfloat16; gradients as well, and in float32."""
    linear = random_codes("2:8", 16, 32, True)
    inputs, outer = torch.randn(20, 32, generator=seeded(2)), torch.randn(20, 16, generator=seeded(3))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tunable = TunableCodes(linear, torch.randn(16, 32, generator=seeded(1)), None)
        given = inputs.clone().requires_grad_(True)
        with mixed_precision(dtype, CPU):
            output = tunable(given)
        (output * outer).sum().backward()
        found.append([output, given.grad, tunable.latent.grad, tunable.log_row.grad, tunable.log_column.grad])
    for number, (exact, rounded) in enumerate(zip(*found, strict=True)):
        assert exact is not None
        assert rounded is not None
        assert rounded.dtype == (torch.bfloat16 if number == 0 else torch.float32)
        assert not torch.equal(exact, rounded)
        assert float((exact - rounded).detach().norm() / exact.detach().norm()) < 1e-2


def test_precision_is_what_the_recipe_says() -> None:
    """auto is bfloat16 exactly where the processor has instructions for it."""
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported()
    assert resolve_precision("auto", CPU) == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("gpu", "amx", "bfloat16", "products"),
    [
        (True, False, False, "matrix units"),
        (False, True, True, "matrix units"),
        (False, False, True, "bfloat16"),
        (False, False, False, "float32"),
    ],
)
def test_products_are_the_fastest_that_there_are(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, amx: bool, bfloat16: bool, products: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    assert products_here() == products


# --- regions, shifts and residual columns -----------------------------------------------------------------------------

GROUPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stbllm": ("stbllm", "4:8", {"block_size": 32}),
    "pbs2p": ("pbs2p", "2:4", {"block_size": 32}),
    "billm": ("billm", "none", {"block_size": 32}),
    "arb-rc": ("arb", "none", {"block_size": 32, "variant": "rc"}),
    "arb-rc-pruned": ("arb", "4:8", {"block_size": 32, "variant": "rc", "split_salient": False}),
    "arb-x": ("arb", "4:8", {"block_size": 32, "variant": "x"}),
    "released": ("stbllm-as-released", "4:8", {"block_size": 32}),
}


def grouped_linear(case: str) -> GroupedBinaryLinear:
    """A linear of 12 × 80, the last block short, as a method returns it."""
    name, sparsity, given = GROUPED[case]
    method = METHODS[name]
    weight = 0.02 * torch.randn(12, 80, generator=seeded(1)) * (1 + torch.rand(80, generator=seeded(2)) * 3)
    tokens = torch.randn(200, 80, generator=seeded(3)) * (1 + 4 * (torch.arange(80) % 17 == 0))
    gram = tokens.T @ tokens / 200
    options = method.options(**given)
    linear = method.run(weight, gram, inverse_factor(gram, options.damping), Sparsity.parse(sparsity), options)
    assert isinstance(linear, GroupedBinaryLinear)
    return linear


@pytest.mark.parametrize("case", GROUPED)
def test_a_fresh_grouped_tunable_is_the_linear_that_went_in(case: str) -> None:
    """Dense weights bit for bit, and the forward pass is their product."""
    linear = grouped_linear(case)
    assert linear.has_salient
    assert (linear.column_scales is not None) == case.startswith("arb-rc")
    bias = nn.Parameter(torch.randn(12, generator=seeded(4)))
    tunable = make_tunable(linear, linear.dense(), bias)
    assert isinstance(tunable, TunableGroupedBinary)
    assert torch.equal(tunable.linear().dense(), linear.dense())
    assert torch.equal(tunable.linear().scales, linear.scales)
    inputs = torch.randn(2, 5, 80, generator=seeded(5))
    assert torch.equal(tunable(inputs), functional.linear(inputs, linear.dense(), bias))


@pytest.mark.parametrize("case", GROUPED)
def test_tuning_scales_keeps_masks_and_signs(case: str) -> None:
    """Pruned stays zero, so do shifts that have no place in the file, and the result is what the forward ran with."""
    linear = grouped_linear(case)
    tunable = TunableGroupedBinary(linear, None)
    assert tunable.latent_parameters() == []
    inputs, wanted = torch.randn(30, 80, generator=seeded(5)), torch.randn(30, 12, generator=seeded(6))
    optimizer = make_optimizer([nn.Sequential(tunable)], Rates(0.0, 0.02, 0.0))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (tunable(inputs) - wanted).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = tunable.linear()
    for field in ("keep", "positive", "symbol", "salient"):
        assert torch.equal(getattr(tuned, field), getattr(linear, field))
    assert tuned.scales.dtype == torch.float16
    assert not torch.equal(tuned.scales, linear.scales)
    assert not bool(tuned.dense()[~linear.keep].any())
    assert torch.allclose(tunable(inputs), inputs @ tuned.dense().T, rtol=1e-2, atol=1e-3)
    spec, packed = pack(tuned)  # refuses shifts beside column scales
    assert torch.equal(spec.decode_rows(packed), tuned.dense())


def test_the_gradients_of_shifts_and_scales_are_true_ones() -> None:
    """Finite differences in float64, in units of the mean size in their (row, block)."""
    linear = grouped_linear("stbllm")
    tunable = TunableGroupedBinary(linear, None)
    inputs = torch.randn(6, 80, generator=seeded(5))
    (tunable(inputs) * 3).sum().backward()
    gradient = tunable.change.grad
    assert gradient is not None
    unit = linear.scales.float().abs().mean(dim=-1)
    for row, block, slot in [(0, 0, 0), (1, 1, 3), (2, 2, 4), (3, 0, 6), (4, 1, 7), (5, 2, 8)]:
        values = []
        for step in (1, -1):
            scales = linear.scales.double()
            scales[row, block, slot] += 1e-3 * step * float(unit[row, block])
            with torch.no_grad():
                tunable.change.zero_()
                tunable.change[row, block, slot] = 1e-3 * step
                values.append(float((tunable(inputs).double() * 3).sum()))
                tunable.change.zero_()
        slope = (values[0] - values[1]) / 2e-3
        assert slope == pytest.approx(float(gradient[row, block, slot]), rel=2e-2, abs=2e-2)
    assert int((gradient != 0).sum()) > gradient.numel() // 2


def test_a_linear_without_a_tunable_form() -> None:
    """Uniform grids have none."""
    linear = UniformLinear(2, 8, torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 1, 2).half())
    with pytest.raises(TypeError, match="UniformLinear cannot be tuned"):
        make_tunable(linear, torch.zeros(4, 8), None)


# --- the optimizer ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A norm, a tunable linear with a bias, and one that stayed dense."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.inner = nn.ModuleDict({"norm": nn.RMSNorm(24)})
        linear = random_codes("2:8", 24, 24, False)
        self.tuned = make_tunable(linear, linear.dense(), nn.Parameter(torch.zeros(24)))
        self.dense = nn.Linear(24, 24)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.dense(self.tuned(self.inner["norm"](self.norm(inputs))))
        return result


def test_what_is_tuned() -> None:
    """Norms, scales and latents, each with its own rate; no bias of a linear, no dense weight, no column scale that
    there is not."""
    layer = Layer()
    assert set(tuned_norms(layer)) == {"norm.weight", "norm.bias", "inner.norm.weight"}
    optimizer = make_optimizer([layer], Rates(0.1, 0.2, 0.3))
    names = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert names == {"norm.weight", "norm.bias", "inner.norm.weight", "tuned.log_row", "tuned.latent"}
    rates = {id(p): group["rate"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in layer.named_parameters() if id(p) in rates} == {
        "norm.weight": 0.3,
        "norm.bias": 0.3,
        "inner.norm.weight": 0.3,
        "tuned.log_row": 0.2,
        "tuned.latent": 0.1,
    }
    make_optimizer([layer], Rates(0.0, 0.2, 0.0))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["tuned.log_row"]


def test_the_schedule() -> None:
    """A warm-up over a tenth of the steps, 16 at most, from next to nothing; then half a cosine to a twentieth."""
    layer = Layer()
    optimizer = make_optimizer([layer], Rates(1.0, 0.5, 0.25))
    shares = []
    for step in range(100):
        set_rate(optimizer, step, 100)
        assert [group["lr"] / group["rate"] for group in optimizer.param_groups] == pytest.approx(
            [optimizer.param_groups[0]["lr"]] * 3
        )
        shares.append(optimizer.param_groups[0]["lr"])
    assert shares[0] == pytest.approx(1 / 121)
    assert shares[4] == pytest.approx((5 / 11) ** 2, rel=0.01)
    assert shares[10] == max(shares)
    assert shares[50] == pytest.approx(0.05 + 0.95 / 2)
    assert shares[99] == pytest.approx(0.05, abs=1e-3)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    for step, least in ((15, 0.85), (16, 0.99)):
        set_rate(optimizer, step, 1000)
        assert least < optimizer.param_groups[0]["lr"] <= least + 0.1
    set_rate(optimizer, 0, 1)
    assert optimizer.param_groups[0]["lr"] > 0.5


@pytest.mark.parametrize("sparsity", ["1:4", "2:8", "4:8", "2:16"])
def test_separated_latents_keep_their_codewords(sparsity: str) -> None:
    """None is nearer to the edge than the margin, and none was moved further than that; ties and zeros included."""
    nm = Sparsity.parse(sparsity)
    latent = torch.randn(16, 48, generator=seeded(0))
    latent[0], latent[1] = 0.5, 0.0
    apart = separate(latent, nm, 0.02)
    keep = keep_top(latent.abs(), nm.n, nm.m)
    assert torch.equal(latent_signs(apart, nm), torch.where(latent < 0, -1, 1) * keep)
    sizes = apart.abs().unflatten(1, (-1, nm.m)).sort(dim=-1, descending=True).values
    assert float((sizes[..., nm.n - 1] - sizes[..., nm.n]).min()) > 0.0399
    assert float((apart - latent).abs().max()) < 0.0401
    settled = 3.0 * keep + 0.1 * torch.rand(latent.shape, generator=seeded(1))
    assert torch.equal(separate(settled, nm, 0.02), settled)


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_token_weights_in_closed_form() -> None:
    """Exponent 0: every token by its relative error; 2: mean square error over that of the targets; always relative."""
    targets = torch.randn(3, 7, 20, generator=seeded(0)) * (1 + 50 * (torch.arange(7) == 0)[:, None])
    norm = targets.norm(dim=-1)
    assert torch.allclose(token_weights(targets, 0.0, 0.0), 1 / (21 * norm.square()))
    assert torch.allclose(token_weights(targets, 2.0, 0.0), (1 / norm.square().sum()).expand(3, 7))
    assert torch.allclose(token_weights(targets, 1.0, 0.0), 1 / (norm * norm.sum()))
    for exponent in (0.0, 0.7, 1.5, 2.0):
        for first_token in (0.0, 0.3):
            shares = token_weights(targets, exponent, first_token) * norm.square()
            assert float(shares.sum()) == pytest.approx(1.0, rel=1e-5)
    assert bool(token_weights(torch.zeros(2, 3, 4), 1.5, 0.1).isfinite().all())


def test_the_first_token_has_its_share() -> None:
    """At least ``first_token`` of every window, more where its size says so; the others keep their proportions."""
    targets = torch.randn(2, 9, 20, generator=seeded(0))
    targets[1, 0] *= 1000
    shares = token_weights(targets, 1.0, 0.4) * targets.norm(dim=-1).square()
    assert float(shares[0, 0] / shares[0].sum()) == pytest.approx(0.4, rel=1e-5)
    assert float(shares[1, 0] / shares[1].sum()) > 0.9
    free = token_weights(targets, 1.0, 0.0) * targets.norm(dim=-1).square()
    assert torch.allclose(shares[0, 1:] / shares[0, 1], free[0, 1:] / free[0, 1])


def job_of(directory: Path) -> Job:
    source = open_source(directory)
    model = source.skeleton()
    recipe = Recipe.create({"calibration": {"precision": "float32"}})
    return Job(source, model, find_layout(model), recipe, CPU, SilentProgress())


def compressed_layer(job: Job, index: int, method: str, sparsity: str, **options: Any) -> nn.Module:
    """A decoder layer, of a model of its own, with tunable linears, compressed for inputs that all count alike."""
    job = replace(job, model=job.source.skeleton())
    layer = job.materialize(index)
    chosen = METHODS[method]
    settings = chosen.options(**options)
    tunables: dict[str, nn.Module] = {}
    for name, linear in job.linears(index).items():
        gram = torch.eye(linear.in_features)
        weight = linear.weight.detach().clone()
        result = chosen.run(weight, gram, inverse_factor(gram), Sparsity.parse(sparsity), settings)
        tunables[name] = make_tunable(result, weight, linear.bias)
    install(layer, job.layout.layer_name(index), tunables)
    return layer


@pytest.fixture
def started(tiny: Tiny) -> tuple[Job, Tensor, Tensor, LayerCall]:
    """A tiny llama: what enters its first layer, what leaves it, and the call of that layer."""
    job = job_of(tiny("llama-gqa"))
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, WINDOWS)
        job.materialize(0)
        return job, hidden, job.run(0, calls[0], hidden), calls[0]


def relative_error(layer: nn.Module, call: LayerCall, inputs: Tensor, targets: Tensor, exponent: float = 1.5) -> float:
    with torch.no_grad():
        lost = (run_layer(layer, call, inputs) - targets).square().sum(dim=-1)
    return float((lost * token_weights(targets, exponent, FIRST_TOKEN)).sum())


def reconstructed(
    started: tuple[Job, Tensor, Tensor, LayerCall], layer: nn.Module, **changes: Any
) -> tuple[float, float]:
    _, inputs, targets, call = started
    settings: dict[str, Any] = {
        "steps": 30,
        "batch": 2,
        "rates": RATES,
        "token_exponent": 1.5,
        "first_token": FIRST_TOKEN,
        "seed": 3,
        "dtype": torch.float32,
    }
    return reconstruct(layer, call, inputs, targets, **{**settings, **changes}, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "sparsity", "least"), [("codes", "2:8", 0.8), ("stbllm", "4:8", 0.95)])
def test_reconstruction_lowers_the_error_of_the_layer(
    started: tuple[Job, Tensor, Tensor, LayerCall], method: str, sparsity: str, least: float, dtype: torch.dtype
) -> None:
    """On the windows, with scales, norms and latents as they are in the end; two runs give the same."""
    job, inputs, targets, call = started
    results = []
    for _ in range(2):
        layer = compressed_layer(job, 0, method, sparsity)
        before = relative_error(layer, call, inputs, targets)
        first, last = reconstructed(started, layer, rates=Rates(3e-2, 1e-2, 3e-3), dtype=dtype)
        after = relative_error(layer, call, inputs, targets)
        assert after < least * before
        assert last < first
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        results.append({name: parameter.clone() for name, parameter in layer.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_reported_error_is_that_of_the_windows(started: tuple[Job, Tensor, Tensor, LayerCall], batch: int) -> None:
    """Where nothing moves, the mean over steps is the relative error of all windows, however many a batch has."""
    job, inputs, targets, call = started
    layer = compressed_layer(job, 0, "codes", "2:8")
    expected = relative_error(layer, call, inputs, targets)
    still = Rates(0.0, 1e-12, 0.0)
    # so many steps that every window has come equally often in the steps that are averaged
    steps = 10 * math.lcm(batch, len(inputs)) // batch
    first, last = reconstructed(started, layer, batch=batch, rates=still, steps=steps)
    assert first == pytest.approx(expected, rel=1e-4)
    assert last == pytest.approx(expected, rel=1e-4)


def test_rates_of_zero_leave_their_part_alone(started: tuple[Job, Tensor, Tensor, LayerCall]) -> None:
    """Only norms; only scales; only latents."""
    job = started[0]
    for kind, part in {"norms": "norm", "scales": "log_row", "latents": "latent"}.items():
        layer = compressed_layer(job, 0, "codes", "2:8", column_scales=False)
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        rates = replace(Rates(0.0, 0.0, 0.0), **{kind: 1e-2})
        reconstructed(started, layer, rates=rates, steps=2)
        moved = {name for name, parameter in layer.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name in before if part in name}


# --- distillation -----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Final norm, output matrix and soft-capping; remembers how many positions it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.output = nn.Linear(16, 50, bias=False)
        self.requires_grad_(False)
        with torch.no_grad():
            self.output.weight.copy_(torch.randn(50, 16, generator=seeded(0)))
        self.seen: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden.shape[1])
        return 5 * torch.tanh(self.output(self.norm(hidden)) / 5)


def test_divergence_is_that_of_the_whole_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against F.kl_div and autograd on all logits at once, though only a chunk of positions is in memory at a time."""
    monkeypatch.setattr(distilling, "CHUNK", 5)
    monkeypatch.setattr("subbit.models.logits.CACHED", 100)  # two positions
    head = Head()
    student = torch.randn(2, 6, 16, generator=seeded(1))
    teacher = student + 0.5 * torch.randn(2, 6, 16, generator=seeded(2))
    leaf = student.clone().requires_grad_(True)
    expected = functional.kl_div(
        head(leaf).log_softmax(-1).flatten(0, 1),
        head(teacher).log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    slope = torch.autograd.grad(expected, leaf)[0]
    head.seen.clear()
    value, gradient = divergence(student, teacher, head, gradient=True)
    assert max(head.seen) == 5
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert gradient is not None
    assert gradient.shape == student.shape
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-7)
    alone, nothing = divergence(student, teacher, head, gradient=False)
    many = divergences({"student": student, "teacher": teacher}, teacher, head)
    assert many == pytest.approx({"student": float(alone), "teacher": 0.0}, rel=1e-5, abs=1e-6)
    assert float(alone) == pytest.approx(float(value), rel=1e-6)
    assert nothing is None
    assert float(divergence(teacher, teacher, head, gradient=False)[0]) == pytest.approx(0.0, abs=1e-6)
    assert not student.requires_grad


def test_the_head_sees_no_more_positions_than_a_window() -> None:
    """A model with learned positions has no more of them than its longest window."""
    head = Head()
    hidden = torch.randn(8, 6, 16, generator=seeded(1))
    divergence(hidden, hidden, head, gradient=True)
    assert max(head.seen) == 6


def test_the_order_of_windows() -> None:
    """Passes over all of them, each in its own order; the same seed gives the same."""
    order = window_order(5, 23, seed=1)
    assert len(order) == 23
    passes = order[:20].view(4, 5)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(5).expand(4, 5))
    assert len({tuple(one) for one in passes.tolist()}) > 1
    assert torch.equal(order, window_order(5, 23, seed=1))
    assert not torch.equal(order, window_order(5, 23, seed=2))


def student_of(job: Job, calls: list[LayerCall], source: ModelSource, checkpoint: bool = False) -> Student:
    layers = [compressed_layer(job, index, "codes", "2:8", sweeps=0) for index in range(job.layout.num_layers)]
    return Student(
        layers, calls, lambda hidden: run_head(job.model, job.layout, source, hidden, gradient=True), checkpoint
    )


def parameters_of(student: Student) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, layer in enumerate(student.layers)
        for name, parameter in layer.named_parameters()
    }


@pytest.fixture
def taught(tiny: Tiny) -> tuple[Job, Tensor, Tensor, list[LayerCall]]:
    """A tiny gemma, whose head caps the logits: embedded windows, what leaves its last layer, and its calls."""
    job = job_of(tiny("gemma3"))
    with torch.no_grad():
        embedded, calls = capture_inputs(job.model, job.layout, job.source, WINDOWS)
        hidden = embedded
        for index, call in enumerate(calls):
            job.materialize(index)
            hidden = job.run(index, call, hidden)
    return job, embedded, hidden, calls


def test_the_teacher_is_the_dense_model(taught: tuple[Job, Tensor, Tensor, list[LayerCall]], tiny: Tiny) -> None:
    """The divergence of a student is that of its own logits from transformers' logits of the dense model."""
    job, embedded, teacher, calls = taught
    dense = AutoModelForCausalLM.from_pretrained(tiny("gemma3"), dtype=torch.float32).eval()
    with torch.no_grad(), outside_on_demand(job.model, job.layout, job.source, CPU):
        student = student_of(job, calls, job.source)
        expected = functional.kl_div(
            student.head(student.run(embedded)).log_softmax(-1).flatten(0, 1),
            dense(WINDOWS).logits.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        found = mean_divergence(student, embedded, teacher, torch.float32, CPU)
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert found > 0.1
    assert mean_divergence(student, embedded[:0], teacher[:0], torch.float32, CPU) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_lowers_the_divergence(
    taught: tuple[Job, Tensor, Tensor, list[LayerCall]], dtype: torch.dtype
) -> None:
    """On the windows that it trains on; recomputing the activations changes nothing."""
    job, embedded, teacher, calls = taught
    results, steps = [], []
    with outside_on_demand(job.model, job.layout, job.source, CPU):
        for checkpoint in (False, True):
            student = student_of(job, calls, job.source, checkpoint)
            before = mean_divergence(student, embedded, teacher, dtype, CPU)
            losses: list[float] = []
            distill(
                student,
                embedded,
                teacher,
                steps=12,
                batch=2,
                rates=Rates(latents=2e-2, scales=1e-2, norms=1e-2),
                seed=0,
                dtype=dtype,
                device=CPU,
                after_step=lambda done, loss, _, losses=losses: losses.append(loss),  # type: ignore[misc]
            )
            assert mean_divergence(student, embedded, teacher, dtype, CPU) < 0.8 * before
            results.append(parameters_of(student))
            steps.append(losses)
    assert len(steps[0]) == 12
    assert steps[0] == pytest.approx(steps[1], rel=1e-5 if dtype == torch.float32 else 1e-2)
    if dtype == torch.float32:
        for name, parameter in results[0].items():
            assert torch.allclose(parameter, results[1][name], rtol=1e-4, atol=1e-5), name


def test_a_step_that_cannot_be_recorded_is_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a GPU: its calls are what torch's raise where a function waits for one."""

    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    replayed = Replayed(lambda inputs: inputs + 1)
    monkeypatch.setattr(replayed, "_warm_up", lambda inputs: inputs[0] + 1)
    ended: list[bool] = []
    monkeypatch.setattr(replayed, "_end_recording", lambda: ended.append(True))
    for call in range(6):
        assert replayed(torch.tensor([float(call)])).item() == call + 1
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "operation not permitted when stream is capturing"
    ]
    assert ended == [True]


def test_the_moments_of_the_optimizer_survive(taught: tuple[Job, Tensor, Tensor, list[LayerCall]]) -> None:
    """Six steps, and three steps twice with parameters and moments kept in between, give the same bits."""
    job, embedded, teacher, calls = taught
    settings: dict[str, Any] = {"batch": 2, "rates": RATES, "seed": 0, "steps": 6}
    settings.update(dtype=torch.float32, device=CPU)

    class EnoughError(Exception):
        pass

    saved: dict[str, Tensor] = {}

    def stop(done: int, loss: float, optimizer: torch.optim.Optimizer) -> None:
        if done == 3:
            saved.update({name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()})
            raise EnoughError

    with outside_on_demand(job.model, job.layout, job.source, CPU):
        whole = student_of(job, calls, job.source)
        distill(whole, embedded, teacher, **settings)
        halves = student_of(job, calls, job.source)
        with pytest.raises(EnoughError):
            distill(halves, embedded, teacher, **settings, after_step=stop)
        kept = copy.deepcopy(saved)
        distill(halves, embedded, teacher, **settings, start=3, optimizer_state=kept)
    for name, parameter in parameters_of(whole).items():
        assert torch.equal(parameter, parameters_of(halves)[name]), name


# --- whole runs -------------------------------------------------------------------------------------------------------

TUNING: dict[str, Any] = {
    "reconstruction": {"steps": 4, "batch": 2},
    "distillation": {"steps": 4, "batch": 2, "held_out": 1, "latent_rate": 5e-3},
}


def specs_of(directory: Path) -> dict[str, dict[str, Any]]:
    config = json.loads((directory / "config.json").read_text())
    linears: dict[str, dict[str, Any]] = config["quantization_config"]["linears"]
    return linears


def dense_equivalent(source: Path, compressed: Path) -> PreTrainedModel:
    """transformers' own model of the source, with all that the files of the compressed one say."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    split_experts(model)
    tensors = stored_tensors(compressed)
    for name, values in specs_of(compressed).items():
        spec = read_spec(values)
        dense = spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()}).dense()
        model.get_parameter(f"{name}.weight").data.copy_(dense)
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data.copy_(tensors[name])
    return model


def manifest(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / "subbit_manifest.json").read_text())
    return facts


@pytest.mark.parametrize(
    ("family", "method", "stage"),
    [
        ("qwen2", "codes", "reconstruction"),
        ("llama-gqa", "codes", "distillation"),
        ("opt", "stbllm", "reconstruction"),
        ("opt", "stbllm", "distillation"),
    ],
)
def test_norms_are_tuned_and_stored(
    family: str, method: str, stage: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Norms inside the layers differ from the source's, biases of linears and all outside the layers do not; the loaded
    model is its dense equivalent with these norms."""
    out = tmp_path / "out"
    recipe = recipe_for(method, calibration={"seq_len": 16}, **{stage: TUNING[stage]})
    subbit.compress(tiny(family), recipe, out)
    before, after = stored_tensors(tiny(family)), stored_tensors(out)
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    norms = {name for name in before if ".layers." in name and "norm" in name}
    assert norms
    assert changed == norms
    assert all(after[name].dtype == before[name].dtype for name in norms)
    model, _ = subbit.load(out)
    expected = logits_of(dense_equivalent(tiny(family), out))
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    facts = manifest(out)
    if stage == "reconstruction":
        assert all({"before", "after"} == set(layer["reconstruction"]) for layer in facts["layers"])
    else:
        assert {"before", "after"} == set(facts["distillation"])
    assert [set(layer["linears"]) for layer in facts["layers"]]
    linears = [linear for layer in facts["layers"] for linear in layer["linears"].values()]
    assert all(0 < linear["error"] < 1 for linear in linears)


def test_errors_after_distillation_are_those_of_the_tuned_linears(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative squared errors of outputs, on what the dense model gives every linear."""
    given = []
    measure = distillation.output_errors

    def spy(job: Job, tuned: list[Any], embedded: Tensor, calls: list[LayerCall]) -> dict[str, float]:
        given.append(embedded)
        return measure(job, tuned, embedded, calls)

    monkeypatch.setattr(distillation, "output_errors", spy)
    out = tmp_path / "out"
    recipe = recipe_for("codes", calibration={"seq_len": 16, "clip_norm": 0.0}, distillation=TUNING["distillation"])
    subbit.compress(tiny("llama-gqa"), recipe, out)
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama-gqa"), dtype=torch.float32)
    packed = dict(dense_equivalent(tiny("llama-gqa"), out).named_modules())
    expected = {}

    def compare(name: str, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        change = packed[name].weight - module.weight
        expected[name] = float((inputs[0] @ change.T).square().sum() / output.square().sum())

    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(partial(compare, name))
    with torch.no_grad():
        dense(inputs_embeds=given[0])
    linears = [linear for layer in manifest(out)["layers"] for linear in layer["linears"].items()]
    assert {name: linear["error"] for name, linear in linears} == pytest.approx(expected, rel=1e-3)


def test_the_next_layer_sees_what_is_in_the_file(recipe_for: Recipes, tmp_path: Path) -> None:
    """Norms are stored in bfloat16 here: what the layers after are calibrated on has them rounded so."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("qwen2").to(torch.bfloat16).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    tuning = {"steps": 3, "batch": 2, "norm_rate": 0.02, "precision": "float32"}
    recipe = recipe_for("codes", calibration={"seq_len": 16}, reconstruction=tuning)
    with pytest.raises(KeyboardInterrupt):
        subbit.compress(source, recipe, out, progress=Lines(interrupt_at("layer 3/3")))
    work = load_file(out / ".subbit" / "hidden-00003.safetensors")
    windows = load_file(out / ".subbit" / "windows.safetensors")["windows"]
    subbit.compress(source, recipe, out, resume=True)
    assert stored_tensors(out)["model.layers.2.input_layernorm.weight"].dtype == torch.bfloat16
    for name, directory in {"student": out, "teacher": source}.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        if name == "student":
            model = dense_equivalent(source, directory)
        seen: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(
            lambda _, args, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model(windows)
        assert torch.allclose(seen[0], work[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("case", [("codes", "2:8"), ("stbllm", "4:8"), ("arb", "none")], ids=lambda case: case[0])
def test_distillation_that_changes_nothing_writes_the_same_shards(
    case: tuple[str, str], source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Packed linears and norms go into the tunable model and come out again bit for bit, after reconstruction too."""
    fields = {"sparsity": case[1], "reconstruction": TUNING["reconstruction"], "calibration": SMALL}
    still = {"steps": 1, "latent_rate": 0, "scale_rate": 1e-30, "norm_rate": 1e-30}
    subbit.compress(source, recipe_for(case[0], **fields), tmp_path / "without")
    subbit.compress(source, recipe_for(case[0], **fields, distillation=still), tmp_path / "with")
    for path in sorted((tmp_path / "without").glob("model-layer-*.safetensors")):
        assert path.read_bytes() == (tmp_path / "with" / path.name).read_bytes()


def test_distillation_starts_from_the_compressed_model(source: Path, recipe_for: Recipes, tmp_path: Path) -> None:
    """Its divergence before is that of the model without distillation, on the windows held out."""
    options = {"calibration": {"samples": 3, "seq_len": 16}}
    one_step = {"steps": 1, "held_out": 2, "precision": "float32"}
    subbit.compress(source, recipe_for("codes", **options), tmp_path / "without")
    subbit.compress(source, recipe_for("codes", **options, distillation=one_step), tmp_path / "with")
    # the calibration text again, through the same public way: an unfinished run keeps its windows
    windows = saved_windows(source, recipe_for("codes", **options), tmp_path / "windows")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    student = dense_equivalent(source, tmp_path / "without")
    with torch.no_grad():
        expected = functional.kl_div(
            student(windows[1:]).logits.log_softmax(-1).flatten(0, 1),
            dense(windows[1:]).logits.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
    assert manifest(tmp_path / "with")["distillation"]["before"] == pytest.approx(float(expected), rel=1e-3)


def test_distillation_goes_on_with_the_latents_of_reconstruction(
    source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Rounded they are the codewords of the file; they are not what the codewords alone would make of the weights."""
    recipe = recipe_for("codes", calibration=SMALL, **TUNING)
    with pytest.raises(KeyboardInterrupt):
        subbit.compress(source, recipe, tmp_path, progress=Lines(interrupt_at("layer 3/3")))
    weights = stored_tensors(source)
    for index in range(3):
        shard = load_file(tmp_path / f"model-layer-{index:05d}.safetensors")
        facts = json.loads((tmp_path / ".subbit" / "state.json").read_text())["layers"][index]["linears"]
        kept = load_file(tmp_path / ".subbit" / f"latents-{index:05d}.safetensors")
        assert set(kept) == set(facts)
        for name, latent in kept.items():
            spec = read_spec(facts[name]["spec"])
            linear = spec.unpack({key: shard[f"{name}.{key}"] for key in spec.tensors()})
            assert isinstance(linear, CodesLinear)
            rounded = latent_signs(separate(latent.float(), linear.sparsity), linear.sparsity)
            assert float((rounded == linear.signs).float().mean()) > 0.99  # float16 makes ties
            fresh = TunableCodes(linear, weights[f"{name}.weight"].float(), None).latent
            assert float((latent.float() - fresh.detach()).abs().mean()) > 1e-4


def saved_windows(source: Path, recipe: Recipe, out: Path) -> Tensor:
    """The calibration windows of a run, from the working files that it leaves when it is stopped."""
    with pytest.raises(KeyboardInterrupt):
        subbit.compress(source, recipe, out, progress=Lines(interrupt_at("layer 1/")))
    return load_file(out / ".subbit" / "windows.safetensors")["windows"]


GROUPED_RUNS = [
    ("stbllm", "4:8", {}),
    ("arb", "4:8", {"variant": "rc", "iterations": 2}),
    ("arb", "none", {"variant": "x", "iterations": 2, "output_iterations": 2}),
]


@pytest.mark.parametrize(("method", "sparsity", "options"), GROUPED_RUNS)
def test_grouped_methods_keep_their_masks(
    method: str, sparsity: str, options: dict[str, Any], source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """With distillation only the scales and norms of the file differ; with reconstruction, pruned is still zero."""
    options = {"candidates": 4, "salient_columns": 4, **options}
    fields = {"sparsity": sparsity, "options": options, "calibration": SMALL}
    subbit.compress(source, recipe_for(method, **fields), tmp_path / "plain")
    subbit.compress(source, recipe_for(method, **fields, distillation=TUNING["distillation"]), tmp_path / "distilled")
    plain, distilled = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "distilled")
    assert plain.keys() == distilled.keys()
    same = {name for name in plain if torch.equal(plain[name], distilled[name])}
    assert {name for name in plain if not name.endswith((".scales", "norm.weight"))} | {"model.norm.weight"} == same
    subbit.compress(source, recipe_for(method, **fields, **TUNING), tmp_path / "both")
    tensors = stored_tensors(tmp_path / "both")
    for name, values in specs_of(tmp_path / "both").items():
        spec = read_spec(values)
        assert isinstance(spec, GroupedBinarySpec)
        linear = spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()})
        assert not bool(linear.dense()[~linear.keep].any())
        assert bool((linear.keep.unflatten(1, (-1, spec.m)).sum(dim=2) == spec.n).all())
    model, _ = subbit.load(tmp_path / "both")
    expected = logits_of(dense_equivalent(source, tmp_path / "both"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "qwen3", "mixtral"])
def test_tuning_runs_for_other_families(family: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Fused projections, norms inside the attention, experts."""
    recipe = recipe_for(
        "codes",
        calibration={"seq_len": 16},
        options={"sweeps": 0},
        reconstruction={"steps": 1, "batch": 2},
        distillation={"steps": 1, "batch": 1, "checkpoint_activations": True},
    )
    subbit.compress(tiny(family), recipe, tmp_path / "out")
    model, _ = subbit.load(tmp_path / "out")
    expected = logits_of(dense_equivalent(tiny(family), tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_packed_embeddings_and_overrides_with_tuning(source: Path, recipe_for: Recipes, tmp_path: Path) -> None:
    """The student runs from the packed embedding, linears left dense keep their weights, layers may differ in N:M."""
    overrides = {
        "re:layers.0.*down_proj": {"dense": True},
        "re:layers.1.": {"dense": True},
        "re:layers.2.*q_proj": {"sparsity": "1:4"},
    }
    recipe = recipe_for("codes", calibration=SMALL, embeddings="8bit", overrides=overrides, **TUNING)
    subbit.compress(source, recipe, tmp_path / "out")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(before[name], after[name])
    assert specs_of(tmp_path / "out")["model.layers.2.self_attn.q_proj"]["m"] == 4
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(before[norm], after[norm])  # distillation tunes the norms of a dense layer as well
    subbit.load(tmp_path / "out")


# --- mistakes, and settings at their limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["reconstruction", "distillation"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_what_cannot_be_tuned_is_one_line(method: str, section: str) -> None:
    with pytest.raises(UserError, match=f"what {method} writes cannot be tuned; leave") as caught:
        Recipe.create({"method": method, section: {"steps": 1}})
    assert "\n" not in str(caught.value)
    Recipe.create({"method": method, section: {"steps": 0}})


@pytest.mark.parametrize("section", ["reconstruction", "distillation"])
def test_steps_that_tune_nothing_are_one_line(section: str) -> None:
    """All rates zero; of a method without latents, the rate of latents counts for nothing."""
    none = {"steps": 1, "latent_rate": 0, "scale_rate": 0, "norm_rate": 0}
    for method, values in {"codes": none, "stbllm": {**none, "latent_rate": 0.1}}.items():
        with pytest.raises(UserError, match=f"{section}: with all learning rates at 0") as caught:
            Recipe.create({"method": method, section: values})
        assert "\n" not in str(caught.value)
    Recipe.create({"method": "codes", section: {**none, "latent_rate": 0.1}})
    Recipe.create({"method": "codes", section: {**none, "steps": 0}})


def test_windows_of_distillation_that_cannot_be_are_one_line(source: Path, recipe_for: Recipes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give distillation\.samples as well"):
        Recipe.create({"method": "codes", "distillation": {"steps": 1, "seq_len": 512}})
    longer = {"steps": 1, "samples": 3, "seq_len": 10_000}
    with pytest.raises(UserError, match="10000 tokens is beyond the model's context") as caught:
        subbit.compress(source, recipe_for("codes", calibration=SMALL, distillation=longer), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["reconstruction", "distillation"])
@pytest.mark.parametrize("method", ["codes", "stbllm"])
def test_divergence_of_the_training_is_one_line(
    section: str, method: str, source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Rates that are far too large: no checkpoint, and no traceback that asks for a report."""
    rates = {"latent_rate": 1e30, "scale_rate": 1e30, "norm_rate": 1e30}
    recipe = recipe_for(method, calibration=SMALL, **{section: {"steps": 3, **rates}})
    with pytest.raises(UserError, match=r"diverged|do not fit in float16") as caught:
        subbit.compress(source, recipe, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("samples", [1, 2])
def test_fewer_windows_than_a_batch_and_than_are_held_out(
    samples: int, source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """At least one window is trained on; with none left to hold out there is nothing to report, and no error."""
    recipe = recipe_for(
        "codes",
        calibration={"samples": samples, "seq_len": 8},
        reconstruction={"steps": 3, "batch": 5},
        distillation={"steps": 3, "batch": 5, "held_out": 7},
    )
    progress = Lines()
    subbit.compress(source, recipe, tmp_path / "out", progress=progress)
    facts = manifest(tmp_path / "out")["distillation"]
    said = [line for line in progress.lines if line.startswith("distillation: ")]
    if samples > 1:
        assert facts["before"] > 0
        assert "divergence on held-out windows " in said[0]
    else:
        assert facts == {"before": None, "after": None}
        assert said == ["distillation: no window was held out, so the result is not measured"]


def test_the_space_that_tuning_needs_is_counted(
    source: Path, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of a teacher; three float32 numbers a latent, in an old and a new file."""
    needed: list[int] = []
    monkeypatch.setattr("subbit.pipeline.check_space", lambda path, size: needed.append(size))
    latents = {"steps": 1, "latent_rate": 1e-3}
    tunings: list[dict[str, Any]] = [{}, {"reconstruction": {"steps": 1}}, {"distillation": latents}]
    for number, tuning in enumerate(tunings):
        subbit.compress(source, recipe_for("codes", calibration=SMALL, **tuning), tmp_path / str(number))
    weights = subbit.inspect(tmp_path / "0")["linear_weights"]
    hidden = SMALL["samples"] * SMALL["seq_len"] * 32 * 4
    assert needed[1] - needed[0] >= 2 * hidden
    assert needed[2] - needed[0] >= 2 * hidden + 24 * weights


# --- killed at any moment ---------------------------------------------------------------------------------------------

SMALL = {"samples": 3, "seq_len": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    smallest_model(initializer_range=0.2).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tuned_recipe(recipe_for: Recipes) -> Recipe:
    return recipe_for("codes", calibration=SMALL, options={"sweeps": 1}, **TUNING)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tuned_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subbit.compress(source, tuned_recipe, out)
    return out


def test_two_runs_give_the_same_bytes(source: Path, tuned_recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    subbit.compress(source, tuned_recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(undisturbed)


def die_before_rename(path: Path, number: int) -> None:
    """Kill this process just before the ``number``-th time that a file is moved to ``path``, counted from 0."""
    moves = itertools.count()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fsdecode(args[1]) == str(path) and next(moves) == number:
            die()

    sys.addaudithook(watch)


def steps_done(directory: Path) -> list[int]:
    """Steps of distillation in the order in which they were done, over all runs."""
    lines = [json.loads(line) for line in (directory / "subbit_log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "distillation"]


def resumed(source: Path, recipe: Recipe, out: Path, undisturbed: Path) -> list[str]:
    """Resume, compare with an undisturbed run, and return what the resumed run said."""
    assert not (out / "config.json").exists()
    progress = Lines()
    subbit.compress(source, recipe, out, resume=True, progress=progress)
    assert contents(out) == contents(undisturbed)
    return progress.lines


# (file, how many times it has been moved into place, steps that the two runs do in all, said by the resumed run)
MOMENTS: list[tuple[str, int, list[int], str]] = [
    (".subbit/hidden-00002.safetensors", 0, [1, 2, 3, 4], "resuming: 1 of 3 layers are done"),
    (".subbit/state.json", 3, [1, 2, 3, 4], "resuming: 2 of 3 layers are done"),
    (".subbit/distillation.safetensors", 0, [1, 1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
    (".subbit/distillation.safetensors", 1, [1, 2, 2, 3, 4], "resuming: 1 of 4 steps of distillation are done"),
    (".subbit/distillation.safetensors", 3, [1, 2, 3, 4, 4], "resuming: 3 of 4 steps of distillation are done"),
    (".subbit/model-layer-00002.safetensors", 0, [1, 2, 3, 4], "resuming: 4 of 4 steps of distillation are done"),
    (".subbit/state.json", 4, [1, 2, 3, 4], "resuming: 4 of 4 steps of distillation are done"),
    ("model-layer-00000.safetensors", 1, [1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
    ("model-layer-00002.safetensors", 1, [1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
    (".subbit/state.json", 5, [1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
    ("model-rest.safetensors", 0, [1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
    ("config.json", 0, [1, 2, 3, 4], "resuming: 3 of 3 layers are done"),
]


@pytest.mark.parametrize(("file", "number", "steps", "said"), MOMENTS)
def test_killed_before_a_file_is_in_its_place(
    file: str,
    number: int,
    steps: list[int],
    said: str,
    source: Path,
    tuned_recipe: Recipe,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state is saved after every step here; no step is done again but the one whose state was not there yet."""
    monkeypatch.setattr("subbit.distillation.SAVE_SECONDS", -1.0)
    out = tmp_path / "out"

    def run() -> None:
        die_before_rename(out / file, number)
        subbit.compress(source, tuned_recipe, out)

    assert in_a_fork(run)
    lines = resumed(source, tuned_recipe, out, undisturbed)
    assert said in lines
    assert steps_done(out) == steps
    distilling_again = any("of distillation are done" in line for line in lines)
    assert distilling_again == ("distillation" in said)


def test_killed_in_distillation_before_a_state_was_saved(
    source: Path, tuned_recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """A state is saved every few minutes only: the steps are done again, the layers are not."""

    def run() -> None:
        log = CheckpointWriter.log

        def watched(self: CheckpointWriter, event: str, **facts: Any) -> None:
            log(self, event, **facts)
            if event == "distillation" and facts["step"] == 3:
                die()

        CheckpointWriter.log = watched  # type: ignore[method-assign]
        subbit.compress(source, tuned_recipe, tmp_path / "out")

    assert in_a_fork(run)
    lines = resumed(source, tuned_recipe, tmp_path / "out", undisturbed)
    assert lines[0] == "resuming: 3 of 3 layers are done"
    assert steps_done(tmp_path / "out") == [1, 2, 3, 1, 2, 3, 4]


def test_killed_while_a_layer_is_reconstructed(
    source: Path, tuned_recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """Of the second layer: it is done again as a whole."""

    def run() -> None:
        calls = itertools.count()

        def watched(optimizer: torch.optim.Optimizer, number: int, steps: int) -> None:
            if next(calls) == 4 + 3:
                die()
            set_rate(optimizer, number, steps)

        pytest.MonkeyPatch().setattr("subbit.tuning.reconstruct.set_rate", watched)
        subbit.compress(source, tuned_recipe, tmp_path / "out")

    assert in_a_fork(run)
    lines = resumed(source, tuned_recipe, tmp_path / "out", undisturbed)
    assert lines[0] == "resuming: 1 of 3 layers are done"


def test_killed_after_every_step(
    source: Path, tuned_recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again; every run does one more step."""
    monkeypatch.setattr("subbit.distillation.SAVE_SECONDS", -1.0)
    out = tmp_path / "out"

    def run() -> None:
        die_before_rename(out / ".subbit" / "distillation.safetensors", 1)
        subbit.compress(source, tuned_recipe, out, resume=True)

    for _ in range(3):
        assert in_a_fork(run)
    resumed(source, tuned_recipe, out, undisturbed)
    assert steps_done(out) == [1, 2, 2, 3, 3, 4, 4][: len(steps_done(out))]
    assert steps_done(out)[-1] == 4


@pytest.mark.parametrize(
    "stages", [("distillation",), ("reconstruction", "distillation")], ids=lambda stages: stages[0]
)
def test_distillation_on_windows_of_its_own(
    stages: tuple[str, ...], source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Other and longer text than the layers saw, what the dense model makes of it; killed at the end, resumed."""
    tuning: dict[str, Any] = {stage: TUNING[stage] for stage in stages}
    tuning["distillation"] = {**TUNING["distillation"], "samples": 6, "seq_len": SMALL["seq_len"] + 8}
    recipe = recipe_for("codes", calibration=SMALL, options={"sweeps": 1}, **tuning)
    subbit.compress(source, recipe, tmp_path / "whole")

    def run() -> None:
        die_before_rename(tmp_path / "out" / ".subbit" / "distillation.safetensors", 0)
        subbit.compress(source, recipe, tmp_path / "out")

    assert in_a_fork(run)
    kept = load_file(tmp_path / "out" / ".subbit" / "distillation-text.safetensors")
    assert kept["windows"].shape == (6, SMALL["seq_len"] + 8)
    layers = load_file(tmp_path / "out" / ".subbit" / "windows.safetensors")["windows"]
    assert not torch.equal(kept["windows"][: len(layers), : layers.shape[1]], layers)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(kept["windows"])
    assert float((seen[0] - kept["teacher"]).norm() / seen[0].norm()) < 2e-2  # bfloat16 where the processor has it
    resumed(source, recipe, tmp_path / "out", tmp_path / "whole")


def test_text_too_short_for_distillation_stops_a_run_before_its_layers(
    source: Path, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Enough for the layers, but not for a window besides those held out."""
    distillation = {**TUNING["distillation"], "samples": 6, "seq_len": 900, "held_out": 5}
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 400, encoding="utf-8")
    calibration = {**SMALL, "source": str(text)}
    recipe = recipe_for("codes", calibration=calibration, options={"sweeps": 1}, distillation=distillation)
    with pytest.raises(UserError, match="calibration text too short"):
        subbit.compress(source, recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_text_of_distillation_goes_through_the_dense_model_in_one_copy(source: Path) -> None:
    """The same as layer by layer with both sides kept, in the memory of what came in: there may be gigabytes of it."""
    job = job_of(source)
    windows = torch.randint(3, 90, (5, 12), generator=seeded(0))
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, windows)
        *_, last = job.dense_pass("kept", hidden, calls)
        output = job.dense_output("in place", hidden, calls)
    assert torch.equal(output, last.after)
    assert output.data_ptr() == hidden.data_ptr()


def test_one_window_can_be_resumed(source: Path, recipe_for: Recipes, tmp_path: Path) -> None:
    """Nothing to compare the calls of two windows with."""
    recipe = recipe_for("codes", calibration={"samples": 1, "seq_len": 8}, options={"sweeps": 0}, **TUNING)
    subbit.compress(source, recipe, tmp_path / "whole")

    def run() -> None:
        die_before_rename(tmp_path / "out" / ".subbit" / "distillation.safetensors", 0)
        subbit.compress(source, recipe, tmp_path / "out")

    assert in_a_fork(run)
    resumed(source, recipe, tmp_path / "out", tmp_path / "whole")


def test_a_damaged_state_of_distillation_is_one_line(
    source: Path, tuned_recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """It names the file; without the file the stage is repeated."""
    out = tmp_path / "out"

    def run() -> None:
        die_before_rename(out / ".subbit" / "model-layer-00001.safetensors", 0)
        subbit.compress(source, tuned_recipe, out)

    assert in_a_fork(run)
    state = out / ".subbit" / "distillation.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged; delete it to repeat that stage") as caught:
        subbit.compress(source, tuned_recipe, out, resume=True)
    assert "\n" not in str(caught.value)
    state.unlink()
    resumed(source, tuned_recipe, out, undisturbed)
