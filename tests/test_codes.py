"""Codewords: the codebook, the descent against slow literal transcriptions, the closed forms, packing bit for bit.

Run with `pytest tests/test_codes.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import logits_of, stored_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

import subbit
from subbit import CheckpointError, Recipe
from subbit.binary import descent
from subbit.binary.codebook import kept_columns, sign_codebook
from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.descent import (
    descend,
    nearest_codewords,
    round_sequentially,
    solve_column_scales,
    solve_row_scales,
)
from subbit.binary.nm import Sparsity, keep_top
from subbit.binary.scales import quadratic_error
from subbit.linears import CodesLinear
from subbit.methods.codes import CodesOptions, codes
from subbit.packing import codec
from subbit.packing.codes import CodesSpec, pack_codes
from subbit.packing.layout import pack, read_spec

Floats = npt.NDArray[np.float64]
Recipes = Callable[..., Recipe]
Tiny = Callable[[str], Path]

PACKED = ["1:4", "1:8", "2:8", "3:8", "4:8", "2:16", "3:16"]
ROWS, COLUMNS = 6, 160  # more than a block of 128 columns


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and the Gram of correlated inputs of which some are large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 0.02 * (1 + 0.3 * torch.randn(rows, columns, generator=generator).square())
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    tokens = torch.randn(4 * columns, columns, generator=generator) @ mix
    tokens[:, torch.randperm(columns, generator=generator)[: max(1, columns // 30)]] *= 5
    return weight, tokens.T @ tokens / len(tokens)


def compress(weight: Tensor, gram: Tensor, sparsity: str, options: CodesOptions | None = None) -> CodesLinear:
    options = options or CodesOptions()
    return codes(weight, gram, inverse_factor(gram, options.damping), Sparsity.parse(sparsity), options)


def output_error(weight: Tensor, gram: Tensor, dense: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ) in float64."""
    lost = quadratic_error(weight.double() - dense.double(), gram.double()).sum()
    return float(lost / quadratic_error(weight.double(), gram.double()).sum())


def every_codeword(n: int, m: int) -> Floats:
    """All of them, both signs of each, straight from the definition."""
    words = []
    for kept in combinations(range(m), n):
        for signs in product((1.0, -1.0), repeat=n):
            word = np.zeros(m)
            word[list(kept)] = signs
            words.append(word)
    return np.array(words)


def random_signs(sparsity: Sparsity, rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) int8 in {−1, 0, +1}, N of every M not zero."""
    generator = torch.Generator().manual_seed(seed)
    keep = keep_top(torch.rand(rows, columns, generator=generator), sparsity.n, sparsity.m)
    signs = 2 * torch.randint(2, (rows, columns), generator=generator) - 1
    return (signs * keep).to(torch.int8)


def random_linear(sparsity: str, rows: int, columns: int, column_scales: bool) -> CodesLinear:
    """Random codewords and scales, as the method could have returned them."""
    generator = torch.Generator().manual_seed(rows + columns)
    nm = Sparsity.parse(sparsity)
    row = torch.randn(rows, generator=generator).half()
    column = torch.rand(columns, generator=generator).half() if column_scales else None
    return CodesLinear(nm, random_signs(nm, rows, columns), row, column)


# --- the codebook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (3, 4), (1, 8), (2, 8), (4, 8), (7, 8), (1, 16), (3, 16)])
def test_every_codeword_is_there_once(n: int, m: int) -> None:
    """Up to the sign of the whole: C(M, N) · 2^(N−1) words, and with their negatives all that there are."""
    words = sign_codebook(n, m)
    assert words.shape == (math.comb(m, n) * 2 ** (n - 1), m)
    assert words.dtype == torch.float32
    both = {tuple(word) for word in torch.cat([words, -words]).tolist()}
    assert both == {tuple(word) for word in every_codeword(n, m).tolist()}
    first = words.gather(1, (words != 0).float().argmax(dim=1, keepdim=True))
    assert bool((first == 1).all())


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 8), (2, 16)])
def test_masks_stand_in_ascending_order_of_their_bit_patterns(n: int, m: int) -> None:
    """As the ranks of the file format: column 0 is the lowest bit; the columns of a mask ascend."""
    masks = kept_columns(n, m).tolist()
    patterns = [sum(1 << column for column in mask) for mask in masks]
    assert patterns == sorted(patterns)
    assert len(set(patterns)) == math.comb(m, n)
    assert all(a < b for mask in masks for a, b in pairwise(mask))
    assert torch.equal(kept_columns(n, m), codec.kept_columns(n, m))


# --- the choice of a codeword -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["1:4", "3:4", "2:8", "4:8", "2:16"])
def test_nearest_codewords_are_the_best_of_all(sparsity: str) -> None:
    """Against every codeword, for a metric far from diagonal and for row scales of both signs."""
    nm = Sparsity.parse(sparsity)
    generator = torch.Generator().manual_seed(nm.m + nm.n)
    root = torch.randn(nm.m, nm.m, generator=generator)
    metric = root @ root.T / nm.m
    slope = torch.randn(40, nm.m, generator=generator)
    scales = torch.rand(40, generator=generator) + 0.1
    scales[::3] *= -1
    found = nearest_codewords(slope, metric, scales, nm).double().numpy()
    words = every_codeword(nm.n, nm.m)
    energy = np.einsum("ki,ij,kj->k", words, metric.double().numpy(), words)
    for row, (z, r) in enumerate(zip(found, scales.double().tolist(), strict=True)):
        costs = r * r * energy - 2 * r * words @ slope[row].double().numpy()
        best = words[np.argmin(costs)]
        assert np.sort(costs)[1] - costs.min() > 1e-5  # no tie, so that there is one right answer
        assert np.array_equal(z, best)


def test_rows_are_chosen_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of few rows are in memory at a time; that changes nothing."""
    nm = Sparsity(2, 8)
    weight, gram = problem(1, 30, 8)
    row = weight.abs().mean(dim=1)
    whole = nearest_codewords(weight @ gram, gram, row, nm)
    monkeypatch.setattr(descent, "ENTRIES", 3 * len(sign_codebook(2, 8)) + 1)
    assert torch.equal(nearest_codewords(weight @ gram, gram, row, nm), whole)


def round_slowly(weight: Tensor, gram: Tensor, damping: float, scales: Tensor, nm: Sparsity) -> Floats:
    """Row by row, group by group: the codeword that is best if the later columns make up for it, and they do.

    With G the group and L all columns after it, the best answer of L to an error e of G is e·H_GL·H_LL⁻¹, and what is
    left is e·(H_GG − H_GL·H_LL⁻¹·H_LG)·eᵀ.
    """
    H = gram.double().numpy()
    H = H + damping * np.diag(H).mean() * np.eye(len(H))
    words = every_codeword(nm.n, nm.m)
    result = np.zeros(weight.shape)
    for i, r in enumerate(scales.double().tolist()):
        w = weight[i].double().numpy().copy()
        for first in range(0, len(w), nm.m):
            g, later = slice(first, first + nm.m), slice(first + nm.m, len(w))
            answer = H[g, later] @ np.linalg.inv(H[later, later])
            metric = H[g, g] - answer @ H[later, g]
            errors = w[g] - r * words
            best = int(np.argmin(np.einsum("ki,ij,kj->k", errors, metric, errors)))
            result[i, g] = words[best]
            w[later] += errors[best] @ answer
    return result


@pytest.mark.parametrize("sparsity", ["1:4", "2:8", "1:16"])
def test_rounding_in_sequence(sparsity: str) -> None:
    """Equal to the slow one, also across the borders of the blocks whose updates are kept back."""
    nm = Sparsity.parse(sparsity)
    weight, gram = problem(2)
    before = weight.clone()
    scales = 1.5 * weight.abs().mean(dim=1)
    found = round_sequentially(weight, inverse_factor(gram, 0.02).upper, scales, nm)
    assert torch.equal(weight, before)
    assert np.array_equal(found.numpy(), round_slowly(weight, gram, 0.02, scales, nm))


def descend_slowly(weight: Tensor, gram: Tensor, signs: Tensor, scales: Tensor, nm: Sparsity) -> Floats:
    """Row by row, group by group: try every codeword, and compute the error of the whole row for each."""
    H = gram.double().numpy()
    words = every_codeword(nm.n, nm.m)
    result = signs.double().numpy().copy()
    for i, r in enumerate(scales.double().tolist()):
        w = weight[i].double().numpy()
        for first in range(0, len(w), nm.m):
            tried = np.repeat(result[i : i + 1], len(words), axis=0)
            tried[:, first : first + nm.m] = words
            errors = w - r * tried
            result[i] = tried[np.argmin(((errors @ H) * errors).sum(axis=1))]
    return result


@pytest.mark.parametrize("sparsity", ["1:4", "2:8", "2:16"])
def test_a_sweep_is_exact_descent(sparsity: str) -> None:
    """Equal to the slow one from any start, also across blocks; the start is not changed."""
    nm = Sparsity.parse(sparsity)
    weight, gram = problem(3)
    start = random_signs(nm, ROWS, COLUMNS).float()
    before = start.clone()
    scales = 1.5 * weight.abs().mean(dim=1)
    scales[1] *= -1
    found = descend(weight, gram, start, scales, nm)
    assert torch.equal(start, before)
    assert np.array_equal(found.numpy(), descend_slowly(weight, gram, start, scales, nm))


@pytest.mark.parametrize("sparsity", ["1:8", "3:8"])
def test_the_error_never_rises_over_sweeps(sparsity: str) -> None:
    """In float64, row by row, but for rounding noise; and sweeping ends where no single group can be better."""
    nm = Sparsity.parse(sparsity)
    weight, gram = problem(4, 12)
    scales = 1.5 * weight.abs().mean(dim=1)
    signs = random_signs(nm, 12, COLUMNS).float()
    total = quadratic_error(weight.double(), gram.double())
    errors = []
    for _ in range(30):
        errors.append(quadratic_error(weight.double() - (scales[:, None] * signs).double(), gram.double()) / total)
        better = descend(weight, gram, signs, scales, nm)
        if torch.equal(better, signs):
            break
        signs = better
    assert all(bool((after <= before + 1e-6).all()) for before, after in pairwise(errors))
    assert len(errors) > 3
    assert float(errors[-1].mean()) < 0.5 * float(errors[0].mean())
    assert np.array_equal(signs.numpy(), descend_slowly(weight, gram, signs, scales, nm))


# --- scales -----------------------------------------------------------------------------------------------------------


def test_row_scales_are_least_squares() -> None:
    """With H = L·Lᵀ every row is an ordinary least squares problem of one unknown."""
    weight, gram = problem(5)
    signs = random_signs(Sparsity(2, 8), ROWS, COLUMNS).float()
    root = np.linalg.cholesky(gram.double().numpy())
    found = solve_row_scales(weight, gram, signs)
    for i in range(ROWS):
        basis, target = signs[i].double().numpy() @ root, weight[i].double().numpy() @ root
        expected = np.linalg.lstsq(basis[:, None], target, rcond=None)[0][0]
        assert float(found[i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_column_scales_solve_their_normal_equations() -> None:
    """The gradient of the error with respect to every column scale is zero, the pull towards 1 included."""
    weight, gram = (tensor.double() for tensor in problem(6, rows=40, columns=48))
    signs = random_signs(Sparsity(2, 8), 40, 48).double()
    scaled = solve_row_scales(weight, gram, signs)[:, None] * signs
    ridge = 1e-4 * float((gram * (scaled.T @ scaled)).diagonal().mean())

    def gradient(columns: Tensor) -> Tensor:
        columns = columns.clone().requires_grad_(True)
        error = quadratic_error(weight - scaled * columns, gram).sum() + ridge * (columns - 1).square().sum()
        return torch.autograd.grad(error, columns)[0]

    found = solve_column_scales(weight.float(), gram.float(), scaled.float()).double()
    at_one = float(gradient(torch.ones(48, dtype=torch.float64)).norm())
    assert float(gradient(found).norm()) < 1e-3 * at_one
    before, after = (quadratic_error(weight - scaled * c, gram).sum() for c in (torch.ones(48), found))
    assert float(after) < 0.99 * float(before)


def test_the_ridge_of_column_scales_is_neutral() -> None:
    """In closed form for a diagonal H: c_j = (H_jj·z̃_jᵀw_j + ρ)/(H_jj·z̃_jᵀz̃_j + ρ); where Z̃ is W already, exactly 1."""
    gram = torch.diag(torch.logspace(-6, 6, 16, dtype=torch.float64)).float()
    scaled = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    weight = scaled * torch.linspace(0.5, 2, 16)
    diagonal = (gram.diagonal() * scaled.square().sum(dim=0)).double()
    ridge = 1e-4 * diagonal.mean()
    right = (gram.diagonal() * (scaled * weight).sum(dim=0)).double()
    expected = (right + ridge) / (diagonal + ridge)
    found = solve_column_scales(weight, gram, scaled).double()
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    exact = solve_column_scales(scaled, gram, scaled)
    assert torch.allclose(exact, torch.ones(16), rtol=0, atol=1e-6)


def test_a_column_that_no_token_reaches_keeps_its_scale() -> None:
    """Its equation says nothing, so its factor is 1."""
    weight, gram = problem(7, rows=40, columns=16)
    gram[3] = gram[:, 3] = 0.0
    found = solve_column_scales(weight, gram, 0.02 * random_signs(Sparsity(1, 4), 40, 16).float())
    assert float(found[3]) == pytest.approx(1.0, abs=1e-3)


def test_rows_without_signal_get_finite_scales() -> None:
    """A codeword that no input sees, but for the noise of float32: no noise divided by noise, or by a zero."""
    weight, _ = problem(8, rows=64, columns=32)
    weight -= weight.mean(dim=1, keepdim=True)  # the only direction there is: no output at all
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    signs = random_signs(Sparsity(2, 8), 64, 32).float()
    assert int((signs.sum(dim=1) == 0).sum()) > 5
    for gram in (torch.full((32, 32), 0.37), 0.37 + 3e-8 * (noise + noise.T)):
        scales = solve_row_scales(weight, gram, signs)
        assert bool(scales.isfinite().all())
        assert float(scales.abs().max()) < 10 * float(weight.abs().max())


# --- the method -------------------------------------------------------------------------------------------------------

OPTIONS = [CodesOptions(sweeps=2), CodesOptions(sweeps=2, column_scales=False)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sparsity", ["1:8", "2:8", "4:8", "none"])
def test_better_than_rounding_by_magnitude(sparsity: str, options: CodesOptions) -> None:
    """The N largest of every group with their signs and the best scale a row; what is returned is of the right form."""
    nm = Sparsity.parse(sparsity)
    weight, gram = problem(9, rows=16)
    linear = compress(weight, gram, sparsity, options)
    assert linear.signs.dtype == torch.int8
    assert linear.row_scales.dtype == torch.float16
    assert (linear.column_scales is not None) == options.column_scales
    assert bool(((linear.signs != 0).unflatten(1, (-1, nm.m)).sum(dim=2) == nm.n).all())
    assert set(linear.signs.unique().tolist()) <= {-1, 0, 1}
    keep = keep_top(weight.abs(), nm.n, nm.m)
    naive = torch.where(weight < 0, -1.0, 1.0) * keep
    naive *= solve_row_scales(weight, gram, naive)[:, None]
    assert output_error(weight, gram, linear.dense()) < 0.8 * output_error(weight, gram, naive)


def test_dense_follows_the_definition() -> None:
    """(r·c)·z, exact in float32."""
    linear = random_linear("2:8", 5, 24, True)
    assert linear.column_scales is not None
    for i, j in product(range(5), range(24)):
        r, c, z = float(linear.row_scales[i]), float(linear.column_scales[j]), int(linear.signs[i, j])
        assert float(linear.dense()[i, j]) == r * c * z


@pytest.mark.parametrize("options", OPTIONS)
def test_more_kept_weights_lose_less(options: CodesOptions) -> None:
    weight, gram = problem(10, rows=16)
    errors = [output_error(weight, gram, compress(weight, gram, s, options).dense()) for s in ("1:8", "2:8", "4:8")]
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


@pytest.mark.parametrize("column_scales", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_more_sweeps_are_never_worse(seed: int, column_scales: bool) -> None:
    """But for the rounding of the scales to float16."""
    weight, gram = problem(20 + seed, rows=16)
    errors = [
        output_error(weight, gram, compress(weight, gram, "2:8", CodesOptions(n, column_scales)).dense())
        for n in range(5)
    ]
    assert all(after < before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_column_scales_help_where_columns_differ() -> None:
    """Columns of very different size are what they are for."""
    weight, gram = problem(11, rows=48, columns=64)
    weight *= torch.logspace(-1, 0.5, 64)
    with_columns, without = (output_error(weight, gram, compress(weight, gram, "2:8", o).dense()) for o in OPTIONS)
    assert with_columns < 0.9 * without


def test_inputs_are_not_changed_and_two_runs_are_equal() -> None:
    weight, gram = problem(12)
    factor = inverse_factor(gram, 0.01)
    copies = weight.clone(), gram.clone(), factor.upper.clone()
    for options in OPTIONS:
        one, two = (codes(weight, gram, factor, Sparsity(2, 8), options) for _ in range(2))
        assert torch.equal(one.signs, two.signs)
        assert torch.equal(one.scales, two.scales)
    assert all(torch.equal(a, b) for a, b in zip(copies, (weight, gram, factor.upper), strict=True))


def test_the_factor_is_used_without_column_scales() -> None:
    """It is that of the Gram; with column scales the metric is another one, and needs its own."""
    weight, gram = problem(13)
    other = InverseFactor(torch.eye(COLUMNS), 0.01)
    for options in (CodesOptions(sweeps=0), CodesOptions(sweeps=0, column_scales=False)):
        changed = codes(weight, gram, other, Sparsity(2, 8), options)
        same = torch.equal(changed.signs, compress(weight, gram, "2:8", options).signs)
        assert same == options.column_scales


def awkward(kind: str) -> tuple[Tensor, Tensor]:
    weight, gram = problem(14, rows=16, columns=64)
    generator = torch.Generator().manual_seed(0)
    if kind == "zero rows":
        weight[[0, 7]] = 0.0
    elif kind == "zero columns":
        weight[:, [0, 9, 63]] = 0.0
        weight[:, 16:24] = 0.0  # a whole group
    elif kind == "zero weight":
        weight = torch.zeros_like(weight)
    elif kind == "zero gram":
        gram = torch.zeros_like(gram)
    elif kind == "unreached columns":
        gram[[3, 40]] = 0.0
        gram[:, [3, 40]] = 0.0
        gram[:, 8:16] = gram[8:16] = 0.0
    elif kind == "one token":
        token = torch.randn(1, 64, generator=generator)
        gram = token.T @ token
    elif kind == "one direction":
        gram = torch.ones(64, 64) * 0.37
    elif kind == "no output":
        tokens = torch.randn(5, 64, generator=generator)
        weight -= (weight @ tokens.T) @ torch.linalg.pinv(tokens.T)
        gram = tokens.T @ tokens / 5
    elif kind == "tiny gram":
        gram = gram * 1e-20
    elif kind == "one huge column":
        gram[5] *= 300
        gram[:, 5] *= 300
    else:
        raise AssertionError(kind)
    return weight, gram


AWKWARD = [
    "zero rows",
    "zero columns",
    "zero weight",
    "zero gram",
    "unreached columns",
    "one token",
    "one direction",
    "no output",
    "tiny gram",
    "one huge column",
]


@pytest.mark.parametrize("sparsity", ["1:4", "2:8"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_input_gives_a_finite_sensible_result(kind: str, options: CodesOptions, sparsity: str) -> None:
    """Finite scales, whole groups, and an error no larger than that of leaving the linear out."""
    weight, gram = awkward(kind)
    linear = compress(weight, gram, sparsity, options)
    assert bool(linear.scales.isfinite().all())
    nm = Sparsity.parse(sparsity)
    assert bool(((linear.signs != 0).unflatten(1, (-1, nm.m)).sum(dim=2) == nm.n).all())
    spec, tensors = pack(linear)
    assert torch.equal(spec.decode_rows(tensors), linear.dense())
    metric = torch.eye(64) if kind == "zero gram" else gram
    lost = quadratic_error((weight - linear.dense()).double(), metric.double()).sum()
    total = quadratic_error(weight.double(), metric.double()).sum()
    scale = float(weight.double().square().sum() * metric.diagonal().double().mean())
    assert float(lost) <= float(total) * (1 + 1e-3) + 1e-5 * scale
    if kind == "zero rows":
        assert not bool(linear.dense()[[0, 7]].any())
    if kind == "zero weight":
        assert not bool(linear.dense().any())


def test_senseless_options() -> None:
    """One line that names the option."""
    for field, value in {"sweeps": -1, "damping": 0.0}.items():
        with pytest.raises(ValueError, match=field):
            CodesOptions(**{field: value}).check(Sparsity(2, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        CodesOptions(damping=math.inf).check(Sparsity(2, 8))


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column_scales", [True, False])
@pytest.mark.parametrize("sparsity", [*PACKED, "none"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 48), (7, 144)])
def test_round_trip(sparsity: str, rows: int, columns: int, column_scales: bool) -> None:
    """Bit for bit, also where the codewords of a row do not fill their bytes."""
    linear = random_linear(sparsity, rows, columns, column_scales)
    spec, tensors = pack(linear)
    assert isinstance(spec, CodesSpec)
    back = spec.unpack(tensors)
    assert back.sparsity == linear.sparsity
    assert back.signs.dtype == torch.int8
    assert torch.equal(back.signs, linear.signs)
    assert torch.equal(back.row_scales, linear.row_scales)
    assert (back.column_scales is None) == (linear.column_scales is None)
    assert torch.equal(back.scales, linear.scales)
    assert torch.equal(spec.decode_rows(tensors), linear.dense())
    assert read_spec(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("sparsity", PACKED)
def test_sizes_to_the_byte(sparsity: str) -> None:
    """⌈log₂ C(M, N)⌉ + N bits a group, rows padded to whole bytes, two bytes a scale."""
    nm = Sparsity.parse(sparsity)
    width = math.ceil(math.log2(math.comb(nm.m, nm.n))) + nm.n
    for (rows, columns), column_scales in product([(1, 16), (5, 48), (3, 576)], [True, False]):
        spec, tensors = pack(random_linear(sparsity, rows, columns, column_scales))
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        expected = rows * math.ceil(columns // nm.m * width / 8) + 2 * rows + (2 * columns if column_scales else 0)
        assert spec.stored_bytes == expected == sum(t.nbytes for t in tensors.values())
    assert spec.label == sparsity
    assert spec.nominal() == nm.n / nm.m


@pytest.mark.parametrize("sparsity", ["1:4", "2:8", "3:16"])
def test_bytes_equal_big_integers(sparsity: str) -> None:
    """rank << N | signs, codewords of a row from the lowest bit of the first byte, as docs/format.md says."""
    nm = Sparsity.parse(sparsity)
    width = math.ceil(math.log2(math.comb(nm.m, nm.n))) + nm.n
    masks = sorted(combinations(range(nm.m), nm.n), key=lambda mask: sum(1 << column for column in mask))
    linear = random_linear(sparsity, 5, 48, False)
    _, tensors = pack_codes(linear)
    for signs, stored in zip(linear.signs.tolist(), tensors["codes"].tolist(), strict=True):
        number = 0
        for place, first in enumerate(range(0, 48, nm.m)):
            group = signs[first : first + nm.m]
            kept = tuple(column for column in range(nm.m) if group[column])
            positive = sum(1 << j for j, column in enumerate(kept) if group[column] > 0)
            number |= (masks.index(kept) << nm.n | positive) << place * width
        assert bytes(stored) == number.to_bytes(math.ceil(48 // nm.m * width / 8), "little")


@pytest.mark.parametrize("column_scales", [True, False])
def test_slices_of_rows(column_scales: bool) -> None:
    """All of a row is in its own bytes; column scales belong to all rows."""
    linear = random_linear("2:8", 9, 56, column_scales)
    spec, tensors = pack(linear)
    for rows in (slice(0, 4), slice(4, 9), slice(8, 9), slice(2, 9, 3)):
        part = spec.row_slice(tensors, rows)
        assert torch.equal(spec.decode_rows(part), linear.dense()[rows])


@pytest.mark.parametrize("sparsity", PACKED)
def test_slices_of_columns_where_bytes_end(sparsity: str) -> None:
    """Eight codewords of w bits are w bytes, so 8·M columns can be cut off."""
    nm = Sparsity.parse(sparsity)
    width = codec.codeword_bits(nm.n, nm.m)
    cut = 8 * nm.m
    linear = random_linear(sparsity, 5, 3 * cut, True)
    _, tensors = pack_codes(linear)
    for first in range(3):
        columns = slice(first * cut, (first + 1) * cut)
        part = {
            "codes": tensors["codes"][:, first * width : (first + 1) * width],
            "row_scales": tensors["row_scales"],
            "column_scales": tensors["column_scales"][columns],
        }
        spec = CodesSpec(5, cut, nm.n, nm.m, True)
        assert torch.equal(spec.decode_rows(part), linear.dense()[:, columns])


def test_codewords_that_no_encoder_writes() -> None:
    """C(8, 2) = 28 masks take five bits and two signs: 112 … 127 name masks that there are not."""
    linear = random_linear("2:8", 3, 64, True)
    spec, tensors = pack(linear)
    good = codec.unpack_bits(tensors["codes"], 8, 7)
    for value in range(104, 128):
        bad = good.clone()
        bad[1, value % 8] = value
        changed = {**tensors, "codes": codec.pack_bits(bad, 7)}
        if value < 112:
            spec.unpack(changed)
            continue
        for read in (spec.unpack, spec.decode_rows):
            with pytest.raises(CheckpointError, match=f"names mask {value >> 2}, but 2:8 has only 28"):
                read(changed)


def test_a_group_that_is_no_codeword_is_not_packed() -> None:
    """Three of eight where the sparsity says two."""
    linear = random_linear("2:8", 3, 16, False)
    linear.signs[1, 8:11] = 1
    with pytest.raises(ValueError, match="exactly 2 of 8"):
        pack_codes(linear)


# --- a whole model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "sparsity"), [("llama-gqa", "2:8"), ("qwen2", "1:8"), ("opt", "none")])
def test_a_loaded_model_is_its_dense_equivalent(
    family: str, sparsity: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without biases, and with every weight kept: exactly on the torch backend, nearly on native kernels."""
    out = tmp_path / "out"
    subbit.compress(tiny(family), recipe_for("codes", sparsity=sparsity, options={"sweeps": 1}), out)
    expected = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    tensors = stored_tensors(out)
    specs = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    assert {values["kind"] for values in specs.values()} == {"codes"}
    for name, values in specs.items():
        spec = read_spec(values)
        dense = spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()}).dense()
        expected.get_parameter(f"{name}.weight").data.copy_(dense)
    model, _ = subbit.load(out)
    assert torch.allclose(logits_of(model), logits_of(expected), rtol=1e-2, atol=1e-2)
    monkeypatch.setenv("SUBBIT_NATIVE", "0")
    model, _ = subbit.load(out)
    assert torch.allclose(logits_of(model), logits_of(expected), rtol=1e-4, atol=1e-4)
    assert float(logits_of(expected).std()) > 0.05
