"""RTN and GPTQ: grids and codes, GPTQ against a literal transcription, packing bit for bit, whole tiny models.

Run with `pytest tests/test_uniform.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import Lines, logits_of, stored_tensors
from families import VOCABULARY, save_model, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import subbit
from subbit import Recipe, UserError
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.binary.scales import quadratic_error
from subbit.errors import CheckpointError
from subbit.linears import UniformLinear, uniform_values
from subbit.methods import METHODS
from subbit.methods.gptq import GptqOptions, gptq, lazy_blocks
from subbit.methods.rtn import RtnOptions, fit_grid, fit_grids, grid_error, rtn
from subbit.packing.layout import pack, read_spec
from subbit.packing.uniform import UniformSpec, pack_uniform
from subbit.runtime.linear import SubbitLinear

Floats = npt.NDArray[np.float64]
Recipes = Callable[..., Recipe]
Tiny = Callable[[str], Path]
Options = RtnOptions | GptqOptions

EVERY_WIDTH = [1, 2, 3, 4]
NOTHING_PRUNED = Sparsity(1, 1)
ROWS, COLUMNS = 24, 200


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and the Gram of correlated inputs of which some are large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 0.02 * (1 + 0.3 * torch.randn(rows, columns, generator=generator).square())
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    tokens = torch.randn(4 * columns, columns, generator=generator) @ mix
    tokens[:, torch.randperm(columns, generator=generator)[: columns // 30]] *= 8
    return weight, tokens.T @ tokens / len(tokens)


def quantize(weight: Tensor, gram: Tensor, options: Options) -> UniformLinear:
    factor = inverse_factor(gram, options.damping)
    if isinstance(options, GptqOptions):
        return gptq(weight, gram, factor, NOTHING_PRUNED, options)
    return rtn(weight, gram, factor, NOTHING_PRUNED, options)


def output_error(weight: Tensor, gram: Tensor, linear: UniformLinear) -> float:
    """tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ) in float64."""
    lost = quadratic_error(weight.double() - linear.dense().double(), gram.double()).sum()
    return float(lost / quadratic_error(weight.double(), gram.double()).sum())


def random_linear(bits: int, rows: int = 5, columns: int = 200, group_size: int = 64) -> UniformLinear:
    """Random codes and scales, as a method could have returned them."""
    generator = torch.Generator().manual_seed(10 * columns + bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.randn(rows, -(-columns // group_size), 2, generator=generator).half()
    return UniformLinear(bits, group_size, codes, scales)


# --- the value of a code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_dense_follows_the_definition(bits: int) -> None:
    """Minimum + step · code, rounded once to float32: exact arithmetic, then one rounding, gives the same."""
    linear = random_linear(bits)
    expected = torch.empty(linear.shape)
    for i, j in product(*map(range, linear.shape)):
        minimum, step = linear.scales[i, j // linear.group_size].double().tolist()
        expected[i, j] = np.float32(minimum + step * int(linear.codes[i, j])).item()
    assert linear.dense().dtype == torch.float32
    assert torch.equal(linear.dense(), expected)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", EVERY_WIDTH)
@pytest.mark.parametrize("columns", [1, 7, 64, 100, 128, 200])
def test_round_trip(bits: int, columns: int) -> None:
    """Whole groups, short ones, groups that do not fill their bytes, rows shorter than a group."""
    for rows, group_size in product((1, 6), (1, 13, 64, 1000)):
        linear = random_linear(bits, rows, columns, group_size)
        spec, tensors = pack(linear)
        assert isinstance(spec, UniformSpec)
        back = spec.unpack(tensors)
        assert (back.bits, back.group_size, back.shape) == (bits, group_size, (rows, columns))
        assert back.codes.dtype == torch.uint8
        assert torch.equal(back.codes, linear.codes)
        assert torch.equal(back.scales, linear.scales)
        assert torch.equal(spec.decode_rows(tensors), linear.dense())


def test_many_rows_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = random_linear(3, rows=20)
    whole = pack_uniform(linear)[1]["codes"]
    monkeypatch.setattr("subbit.packing.uniform.CODES_AT_ONCE", 3 * 200)
    assert torch.equal(pack_uniform(linear)[1]["codes"], whole)


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_bytes_equal_big_integers(bits: int) -> None:
    """Codes of a (row, group) from the lowest bit of the first byte, each group in whole bytes of its own."""
    linear = random_linear(bits, columns=50, group_size=21)  # 21, 21, 8
    _, tensors = pack_uniform(linear)
    for codes, stored in zip(linear.codes.tolist(), tensors["codes"].tolist(), strict=True):
        expected = b""
        for start in range(0, 50, 21):
            group = codes[start : start + 21]
            number = sum(code << bits * place for place, code in enumerate(group))
            expected += number.to_bytes(math.ceil(len(group) * bits / 8), "little")
        assert bytes(stored) == expected


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_described_shapes_and_bytes_are_what_pack_returns(bits: int) -> None:
    for columns, group_size in product((1, 128, 200, 250), (10, 64, 128)):
        linear = random_linear(bits, columns=columns, group_size=group_size)
        spec, tensors = pack_uniform(linear)
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        widths = [min(group_size, columns - start) for start in range(0, columns, group_size)]
        assert spec.stored_bytes == 5 * sum(math.ceil(width * bits / 8) + 4 for width in widths)
        assert spec.stored_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_stored_bits_of_a_large_linear() -> None:
    """Two float16 numbers for 128 codes: a quarter of a bit a weight."""
    for bits in EVERY_WIDTH:
        assert 8 * UniformSpec(4096, 4096, bits, 128).stored_bytes == 4096 * 4096 * (bits + 0.25)


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_slices_of_rows_decode_to_the_same_rows(bits: int) -> None:
    linear = random_linear(bits, rows=9, group_size=60)
    spec, tensors = pack_uniform(linear)
    for rows in (slice(0, 1), slice(2, 5), slice(8, 9), slice(0, 9, 2)):
        assert torch.equal(spec.decode_rows(spec.row_slice(tensors, rows)), linear.dense()[rows])


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_slices_of_whole_groups_equal_packing_the_sliced_linear(bits: int) -> None:
    linear = random_linear(bits, columns=105, group_size=21)
    spec, tensors = pack_uniform(linear)
    size = spec.group_bytes(21)
    for first, last in ((0, 2), (1, 4), (4, 5)):
        columns = slice(21 * first, 21 * last)
        part = replace(linear, codes=linear.codes[:, columns], scales=linear.scales[:, first:last])
        sliced_spec, sliced = pack_uniform(part)
        assert sliced_spec == replace(spec, in_features=21 * (last - first))
        assert torch.equal(sliced["codes"], tensors["codes"][:, first * size : last * size])
        assert torch.equal(sliced["scales"], tensors["scales"][:, first:last])


def test_description_survives_json() -> None:
    spec, _ = pack_uniform(random_linear(3))
    assert read_spec(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.label, spec.nominal()) == ("3 bits", 3.0)
    assert pack_uniform(random_linear(1))[0].label == "1 bit"
    lacking = {key: value for key, value in spec.to_dict().items() if key != "bits"}
    for values in ({**spec.to_dict(), "surprise": 1}, lacking):
        with pytest.raises(CheckpointError):
            read_spec(values)


# --- grids and RTN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_rtn_is_exact_for_weights_on_a_grid(bits: int, mse: bool) -> None:
    """Both ends of the range occur in every group, so the grid is found again."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (ROWS, COLUMNS), generator=generator)
    codes[:, ::50], codes[:, 1::50] = 0, 2**bits - 1
    minimum = -torch.randint(1, 200, (ROWS, 4), generator=generator) / 1024
    step = torch.randint(1, 200, (ROWS, 4), generator=generator) / 1024
    group = torch.arange(COLUMNS) // 50
    weight = minimum[:, group] + step[:, group] * codes
    linear = quantize(weight, torch.eye(COLUMNS), RtnOptions(bits=as_bits(bits), group_size=50, mse=mse))
    assert torch.equal(linear.codes, codes.to(torch.uint8))
    assert torch.equal(linear.dense(), weight)


def as_bits(bits: int) -> Any:
    """An int where the options want a Literal."""
    return bits


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_rtn_takes_the_nearest_point(bits: int) -> None:
    """No other point of the stored grid is nearer, and the largest error is half a step, but for float16's rounding."""
    weight, gram = problem(1)
    linear = quantize(weight, gram, RtnOptions(bits=as_bits(bits), group_size=64))
    group = torch.arange(COLUMNS) // 64
    points = uniform_values(linear.scales[:, group, None], torch.arange(2**bits, dtype=torch.uint8))
    error = (weight - linear.dense()).abs()
    assert torch.equal(error, (weight[..., None] - points).abs().amin(dim=2))
    step = linear.scales[..., 1].float()[:, group]
    assert bool((error <= 0.5 * step + 2**-9 * weight.abs().amax()).all())


@pytest.mark.parametrize("options", [RtnOptions(), RtnOptions(mse=True), GptqOptions(), GptqOptions(act_order=True)])
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_constant_rows_are_finite_and_exact(bits: int, options: Options) -> None:
    """Maximum and minimum are equal: no division by zero, and the value itself where float16 has it."""
    weight, gram = problem(2)
    weight[:] = torch.linspace(-1, 1, ROWS).half().float()[:, None]
    weight[3] = 0
    options = replace(options, bits=as_bits(bits), group_size=64)
    assert torch.equal(quantize(weight, gram, options).dense(), weight)
    weight += 1e-5  # no float16 numbers any more
    dense = quantize(weight, gram, options).dense()
    assert bool(dense.isfinite().all())
    assert float((dense - weight).abs().max()) < 1e-3


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_the_search_for_a_smaller_range(bits: int) -> None:
    """It finds the best of GPTQ's eighty ranges, by direct evaluation, and is never worse than the whole range."""
    weight, _ = problem(3, rows=12, columns=40)
    found = fit_grid(weight, bits, mse=True)
    for i, row in enumerate(weight.double().numpy()):
        errors = []
        for shrink in range(80):
            size = np.float32(1 - shrink / 100)
            low = np.float16(size * np.float32(row.min()))
            step = np.float16((size * np.float32(row.max()) - np.float32(low)) / np.float32(2**bits - 1))
            codes = np.clip(np.round((row - float(low)) / float(step)), 0, 2**bits - 1)
            errors.append(float((np.abs(row - (float(low) + float(step) * codes)) ** 2.4).sum()))
        chosen = float(grid_error(weight[i : i + 1], found[i : i + 1], bits))
        assert chosen == pytest.approx(min(errors), rel=1e-3)
    whole = grid_error(weight, fit_grid(weight, bits, mse=False), bits)
    assert bool((grid_error(weight, found, bits) <= whole).all())


def test_weights_too_large_for_float16_show_in_the_scales() -> None:
    """The pipeline refuses scales that are not finite."""
    weight, gram = problem(4)
    weight[5, 70] = 1e6
    for options in (RtnOptions(), GptqOptions(), GptqOptions(act_order=True)):
        assert not bool(quantize(weight, gram, options).scales.isfinite().all())


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def literal_gptq(weight: Tensor, gram: Tensor, linear: UniformLinear, options: GptqOptions) -> npt.NDArray[np.uint8]:
    """Codes (out, in) of GPTQ by its equations 2 and 3, in float64: a column at a time, the inverse of H eliminated.

    No Cholesky factor and no lazy blocks. The grids are those that ``linear`` stores, each after a check that it is
    what the weights at that moment ask for: exactly at the border of two float16 numbers either is right.
    """
    W, H = weight.double().numpy().copy(), gram.double().numpy()
    order = np.argsort(-H.diagonal(), kind="stable") if options.act_order else np.arange(len(H))
    inverse = np.linalg.inv(H + options.damping * H.diagonal().mean() * np.eye(len(H)))
    codes = np.zeros(W.shape, dtype=np.uint8)
    size = options.group_size
    stored = linear.scales.double().numpy()
    for place, j in enumerate(order):
        group = j // size
        if options.act_order and place == 0:
            for static in range(stored.shape[1]):
                check_grid(stored[:, static], W[:, static * size : (static + 1) * size], options)
        if not options.act_order and j % size == 0:
            check_grid(stored[:, group], W[:, j : j + size], options)
        minimum, step = stored[:, group].T
        codes[:, j] = np.clip(np.round((W[:, j] - minimum) / step), 0, 2**options.bits - 1)
        error = (W[:, j] - (minimum + step * codes[:, j])) / inverse[j, j]
        rest = order[place:]
        W[:, rest] -= np.outer(error, inverse[j, rest])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def check_grid(stored: Floats, weight: Floats, options: GptqOptions) -> None:
    """The grid (rows, 2) is the one of ``weight`` (rows, k), to one unit in the last place of float16."""
    if options.mse:
        expected = fit_grid(torch.from_numpy(weight).float(), options.bits, mse=True).double().numpy()
    else:
        minimum = weight.min(axis=1)
        expected = np.stack([minimum, (weight.max(axis=1) - stored[:, 0]) / (2**options.bits - 1)], axis=1)
    assert (np.abs(stored - expected) <= np.spacing(np.abs(expected).astype(np.float16))).all()


GPTQ_CASES = {
    "defaults": GptqOptions(),
    "one-bit": GptqOptions(bits=1, group_size=64),
    "two-bits": GptqOptions(bits=2, group_size=32),
    "three-bits": GptqOptions(bits=3, group_size=48),  # 96 columns in a lazy block, and a short last group
    "long-groups": GptqOptions(bits=3, group_size=150),  # more than a lazy block
    "whole-rows": GptqOptions(bits=3, group_size=1000),
    "damping": GptqOptions(bits=2, damping=0.3),
    "mse": GptqOptions(bits=2, group_size=64, mse=True),
    "act-order": GptqOptions(bits=2, group_size=64, act_order=True),
    "act-order-long-groups": GptqOptions(bits=3, group_size=150, act_order=True),
    "act-order-mse": GptqOptions(bits=3, group_size=32, act_order=True, mse=True),
}


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_equals_the_literal_one(case: str) -> None:
    options = GPTQ_CASES[case]
    weight, gram = problem(list(GPTQ_CASES).index(case), columns=300)
    linear = quantize(weight, gram, options)
    codes = literal_gptq(weight, gram, linear, options)
    assert np.array_equal(linear.codes.numpy(), codes)
    expected = replace(linear, codes=torch.from_numpy(codes)).dense()
    assert torch.allclose(linear.dense(), expected, rtol=0, atol=1e-5)


def test_lazy_blocks_hold_whole_groups() -> None:
    """They follow each other, are at most 128 wide, and a group lies in one or begins one."""
    for columns, group_size in product((1, 100, 128, 300, 1000), (1, 48, 64, 100, 128, 150, 256, 300, 2000)):
        blocks = list(lazy_blocks(columns, group_size))
        assert blocks[0][0] == 0
        assert blocks[-1][1] == columns
        assert all(before[1] == after[0] for before, after in pairwise(blocks))
        for start in range(0, columns, group_size):
            first, end = next(block for block in blocks if block[0] <= start < block[1])
            assert end - first <= 128
            assert first == start or min(start + group_size, columns) <= end


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_better_than_rtn(bits: int, act_order: bool) -> None:
    """In output error, on correlated inputs, for every seed; and with act_order the grids are those of RTN."""
    for seed in range(4):
        weight, gram = problem(seed)
        nearest = quantize(weight, gram, RtnOptions(bits=as_bits(bits), group_size=64))
        options = GptqOptions(bits=as_bits(bits), group_size=64, act_order=act_order)
        compensated = quantize(weight, gram, options)
        assert output_error(weight, gram, compensated) < output_error(weight, gram, nearest)
        assert torch.equal(compensated.scales, nearest.scales) == act_order


def test_gptq_without_correlation_is_rtn() -> None:
    """Nothing can be absorbed: with a diagonal Gram, and with one of zeros."""
    weight, _ = problem(5)
    nearest = quantize(weight, torch.eye(COLUMNS), RtnOptions(bits=3))
    for gram in (torch.diag(torch.rand(COLUMNS) + 0.1), torch.zeros(COLUMNS, COLUMNS)):
        for act_order in (False, True):
            linear = quantize(weight, gram, GptqOptions(bits=3, act_order=act_order))
            assert torch.equal(linear.codes, nearest.codes)
            assert torch.equal(linear.scales, nearest.scales)


def test_four_bits_lose_little() -> None:
    """Gaussian weights, well-conditioned inputs: the variance of a uniform error of one step, 0.01 of the output."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    tokens = torch.randn(2048, 256, generator=generator)
    gram = tokens.T @ tokens / len(tokens)
    nearest = output_error(weight, gram, quantize(weight, gram, RtnOptions()))
    assert output_error(weight, gram, quantize(weight, gram, GptqOptions())) < nearest < 0.012


@pytest.mark.parametrize("options", [RtnOptions(bits=2), GptqOptions(bits=2), GptqOptions(act_order=True, mse=True)])
def test_inputs_are_not_changed_and_two_runs_are_equal(options: Options) -> None:
    weight, gram = problem(6)
    before = weight.clone(), gram.clone()
    first, second = quantize(weight, gram, options), quantize(weight, gram, options)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert first.shape == (ROWS, COLUMNS)
    assert first.scales.dtype == torch.float16
    assert first.codes.is_contiguous()


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_none_is_a_sparsity() -> None:
    assert Sparsity.parse("none") == Sparsity.parse(" 1 : 1 ") == NOTHING_PRUNED
    assert str(NOTHING_PRUNED) == "1:1"
    assert NOTHING_PRUNED.dense
    assert Sparsity(8, 8).dense
    assert not Sparsity(4, 8).dense


def test_the_default_sparsity_is_the_methods() -> None:
    for method in ("rtn", "gptq"):
        recipe = Recipe.create({"method": method})
        assert (recipe.sparsity, recipe.allocation.kind) == ("1:1", "uniform")
        assert Recipe.create({"method": method, "sparsity": "none"}) == recipe
        assert Recipe.create(recipe.to_dict()) == recipe
    assert Recipe().sparsity == Recipe.create({"method": "stbllm"}).sparsity == "4:8"


def test_recipe_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.create({"method": "gptq", "options": {"bits": 3, "act_order": True}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    (tmp_path / "recipe.yaml").write_text("method: rtn\nsparsity: 1:1\noverrides: {up_proj: {sparsity: none}}\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").sparsity == "1:1"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"sparsity": "4:8"}, "sparsity 4:8: {method} keeps every weight; leave the sparsity out, or say none"),
        ({"overrides": {"x": {"sparsity": "2:4"}}}, "sparsity 2:4: {method} keeps every weight"),
        ({"options": {"bits": 5}}, "recipe: options.bits: Input should be 1, 2, 3 or 4"),
        ({"options": {"bits": 0}}, "recipe: options.bits: Input should be 1, 2, 3 or 4"),
        ({"options": {"group_size": 0}}, "group_size 0 must be at least 1"),
        ({"options": {"group_size": "all"}}, "recipe: options.group_size: "),
        ({"options": {"block_size": 64}}, "method {method} has no option 'block_size'; it has bits, group_size"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_bad_options(method: str, values: dict[str, Any], complaint: str) -> None:
    """One line."""
    with pytest.raises(UserError) as caught:
        Recipe.create({"method": method, **values})
    assert complaint.format(method=method) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_bad_options() -> None:
    """Damping is GPTQ's alone; an unknown method is told the known ones."""
    with pytest.raises(UserError, match=r"damping 0\.0 must be positive and finite"):
        Recipe.create({"method": "gptq", "options": {"damping": 0}})
    with pytest.raises(UserError, match="rtn has no option 'damping'"):
        Recipe.create({"method": "rtn", "options": {"damping": 0.1}})
    with pytest.raises(UserError, match=f"there is no method 'awq'; choose {', '.join(METHODS)}$"):
        Recipe.create({"method": "awq"})


# --- whole models -----------------------------------------------------------------------------------------------------


def dense_equivalent(source: Path, compressed: Path) -> PreTrainedModel:
    """transformers' own model of the source, with the weights that the compressed files stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = stored_tensors(compressed)
    linears = json.loads((compressed / "config.json").read_text())["quantization_config"]["linears"]
    for name, values in linears.items():
        assert values["kind"] == "uniform"
        spec = read_spec(values)
        dense = spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()}).dense()
        model.get_parameter(f"{name}.weight").data.copy_(dense)
    return model


@pytest.mark.parametrize(
    ("method", "options"),
    [("rtn", {}), ("rtn", {"bits": 1}), ("gptq", {"bits": 3, "group_size": 24}), ("gptq", {"act_order": True})],
)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_loaded_model_is_its_dense_equivalent(
    family: str, method: str, options: dict[str, Any], tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Every linear is packed, the logits are those of the unpacked weights, and all figures say so many bits."""
    progress = Lines()
    subbit.compress(tiny(family), recipe_for(method, options=options), tmp_path / "out", progress=progress)
    model, _ = subbit.load(tmp_path / "out")
    packed = [module for module in model.modules() if isinstance(module, SubbitLinear)]
    assert len(packed) == (21 if family == "llama-gqa" else 18)
    expected = logits_of(dense_equivalent(tiny(family), tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1
    bits = options.get("bits", 4)
    label = "1 bit" if bits == 1 else f"{bits} bits"
    assert any(line.startswith(f"layer 1/3: {label}, output error ") for line in progress.lines)
    facts = subbit.inspect(tmp_path / "out")
    assert (facts["method"], facts["sparsity"], facts["left_dense"]) == (method, "1:1", {})
    assert {linear["sparsity"] for layer in facts["layers"] for linear in layer["linears"]} == {label}
    assert facts["bits"]["nominal"] == bits
    size = options.get("group_size", 128)
    rows = [(module.out_features, module.in_features) for module in packed]
    expected_bytes = sum(
        out * (math.ceil(min(size, columns - start) * bits / 8) + 4)
        for out, columns in rows
        for start in range(0, columns, size)
    )
    assert facts["linear_bytes"] == expected_bytes


def test_more_bits_are_nearer_to_the_model(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """And GPTQ is nearer than RTN, in the output error that the manifest records."""
    errors = {}
    for method, bits in product(("rtn", "gptq"), (2, 4)):
        out = tmp_path / f"{method}-{bits}"
        subbit.compress(tiny("llama-mha"), recipe_for(method, options={"bits": bits}), out)
        layers = subbit.inspect(out)["layers"]
        errors[method, bits] = sum(layer["error"] for layer in layers) / len(layers)
    assert errors["gptq", 4] < errors["rtn", 4] < errors["gptq", 2] < errors["rtn", 2]


def test_any_width_of_a_linear_will_do(recipe_for: Recipes, tmp_path: Path) -> None:
    """Nothing is pruned, so no M has to divide the inputs."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 12, "vocab_size": VOCABULARY}
    config = LlamaConfig(hidden_size=36, intermediate_size=101, **shape, bos_token_id=1, eos_token_id=2)
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path / "source")
    subbit.compress(tmp_path / "source", recipe_for("gptq"), tmp_path / "out")
    assert subbit.inspect(tmp_path / "out")["left_dense"] == {}
    model, _ = subbit.load(tmp_path / "out")
    expected = logits_of(dense_equivalent(tmp_path / "source", tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["stbllm", "gptq"])
def test_importance_is_not_measured_where_nothing_is_pruned(
    method: str, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the allocation: there is one N. The binary methods then binarize every weight."""

    def never(*_: Any) -> list[float]:
        raise AssertionError("measured")

    monkeypatch.setattr("subbit.planning.unit_importance", never)
    save_tiny("llama-mha", tmp_path / "source")
    recipe = recipe_for(method, sparsity="none", allocation={"kind": "cosine"})
    subbit.compress(tmp_path / "source", recipe, tmp_path / "out")
    facts = subbit.inspect(tmp_path / "out")
    labels = {linear["sparsity"] for layer in facts["layers"] for linear in layer["linears"]}
    assert labels == {"1:1" if method == "stbllm" else "4 bits"}


def test_grids_of_a_row_are_those_of_its_groups() -> None:
    weight, _ = problem(8)
    scales = fit_grids(weight, 3, 64, mse=False)
    assert scales.shape == (ROWS, 4, 2)
    for group in range(4):
        assert torch.equal(scales[:, group], fit_grid(weight[:, 64 * group : 64 * (group + 1)], 3, mse=False))
