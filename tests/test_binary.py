"""The pieces that the methods share, against the slow transcription in `reference.py` and against closed forms.

Run with `pytest tests/test_binary.py`.
"""

from __future__ import annotations

import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
from reference import (
    Bools,
    Floats,
    binarize_row,
    binarize_row_twice,
    compensate_diagonal,
    compensate_exact,
    conditional_metric,
    count_errors,
    damped,
    damped_inverse,
    joint_scales,
    nm_mask,
    prune_column_by_column,
    quadratic,
    region_of,
    score,
    spbo_pair,
    split_errors,
    textbook_factor,
)
from reference import rank_columns as reference_ranking
from torch import Tensor

from subbit.binary.allocate import allocate, cosine_importance, outlier_share, ranks, spread_importance
from subbit.binary.compensate import compensate, inverse_factor, prune_sequentially
from subbit.binary.groups import (
    assign_regions,
    candidate_thresholds,
    rank_columns,
    rest_error,
    salient_error,
    search_salient_count,
    search_split,
    split_gain,
)
from subbit.binary.nm import PRUNING_SCORES, PruningScore, Sparsity, keep_top, score_statistics
from subbit.binary.residual import binarize, binarize_residual
from subbit.binary.scales import quadratic_error, solve_on_gram
from subbit.errors import UserError
from subbit.methods.blockwise import block_metric


def normal(seed: int, *shape: int) -> Tensor:
    """float64 noise with heavy tails."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values * (1 + 0.3 * values.square())


def correlated_gram(seed: int, size: int, large: int = 2) -> Tensor:
    """(size, size) float64 Gram of correlated inputs, ``large`` of them ten times larger."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + 0.3 * torch.randn(size, size, generator=generator)
    tokens = torch.randn(4 * size, size, generator=generator) @ mix
    tokens[:, torch.randperm(size, generator=generator)[:large]] *= 10
    return (tokens.T @ tokens / len(tokens)).double()


def mask_of(seed: int, rows: int, columns: int, share: float = 0.5) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) < share


# --- masks and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [4, 8, 16])
def test_keep_top_equals_the_reference_with_ties(m: int) -> None:
    for n in range(1, m + 1):
        for levels in (2, 3, 1000):
            values = torch.randint(levels, (7, 3 * m), generator=torch.Generator().manual_seed(n)).double() - 1
            assert np.array_equal(keep_top(values, n, m).numpy(), nm_mask(values.numpy(), n, m))


def test_keep_top_of_equal_scores_keeps_the_lowest_columns() -> None:
    keep = keep_top(torch.zeros(2, 16), 3, 8)
    assert keep.tolist() == [([True] * 3 + [False] * 5) * 2] * 2
    signed = torch.tensor([[-0.0, 0.0, 0.0, -0.0]])
    assert keep_top(signed, 2, 4).tolist() == [[True, True, False, False]]


def test_keep_top_never_prefers_minus_infinity() -> None:
    values = torch.tensor([[-torch.inf, -5.0, -torch.inf, -7.0]])
    assert keep_top(values, 2, 4).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("kind", PRUNING_SCORES)
@pytest.mark.parametrize(("exponent", "standardize"), [(1.0, True), (0.5, True), (1.0, False), (0.5, False)])
def test_scores_equal_the_reference(kind: PruningScore, exponent: float, standardize: bool) -> None:
    gram, original = correlated_gram(0, 48), normal(1, 10, 48)
    current = original + 0.1 * normal(2, 10, 48)  # what compensation made of it
    factor = inverse_factor(gram)
    statistics = score_statistics(kind, original.float(), gram.float(), factor.upper, exponent, standardize)
    inverse = damped_inverse(gram.numpy(), 0.01)
    for columns in (slice(0, 16), slice(16, 48)):
        ours = statistics.score(current[:, columns].float(), columns).double().numpy()
        expected = score(
            kind, current[:, columns].numpy(), columns, original.numpy(), gram.numpy(), inverse, exponent, standardize
        )
        assert np.allclose(ours, expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())
        assert np.array_equal(
            keep_top(torch.from_numpy(ours), 2, 4).numpy(), keep_top(torch.from_numpy(expected), 2, 4).numpy()
        )


def test_the_list_of_scores_is_complete() -> None:
    assert get_args(PruningScore) == PRUNING_SCORES


def test_standardized_importance_has_mean_zero_and_variance_one() -> None:
    weight = normal(3, 12, 32).float()
    statistics = score_statistics("si", weight, torch.eye(32), torch.eye(32))
    values = statistics.score(weight, slice(0, 32))
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", PRUNING_SCORES)
@pytest.mark.parametrize("weight", [torch.zeros(4, 16), torch.full((4, 16), 0.3)], ids=["zero", "constant"])
def test_scores_of_degenerate_weights_are_numbers(kind: PruningScore, weight: Tensor) -> None:
    for gram in (torch.zeros(16, 16), torch.eye(16), torch.diag(torch.arange(16.0))):
        statistics = score_statistics(kind, weight, gram, inverse_factor(gram).upper)
        values = statistics.score(weight, slice(0, 16))
        assert not bool(values.isnan().any())
        assert int(keep_top(values, 3, 8).sum()) == 4 * 2 * 3


def test_sparsity_parses_n_kept_of_m() -> None:
    assert Sparsity.parse(" 4 : 8 ") == Sparsity(4, 8)
    assert str(Sparsity.parse("4:8")) == "4:8"
    assert Sparsity.parse("1:4").density == 0.25
    for text in ("", "4", "4/8", "0:8", "8:8", "9:8", "2:5", "2:32", "-1:4", "4:8:16", "4.0:8"):
        with pytest.raises(UserError):
            Sparsity.parse(text)


# --- binarizing -------------------------------------------------------------------------------------------------------


def assert_moot_or_equal(ours: Tensor, expected: Bools, margin: Floats) -> None:
    """Signs are equal except where the reference's distance from zero is rounding noise."""
    differ = ours.numpy() != expected
    assert (margin[differ] < 1e-12).all()


@pytest.mark.parametrize("seed", range(5))
def test_binarize_equals_the_reference(seed: int) -> None:
    weight, mask = normal(seed, 9, 20), mask_of(seed, 9, 20, 0.2 + 0.15 * seed)
    mask[3] = False
    mask[4] = torch.arange(20) == 7
    weight[5] = 0.25
    ours, twice = binarize(weight, mask), binarize_residual(weight, mask)
    for i in range(9):
        row, kept = weight[i].numpy(), mask[i].numpy()
        once = binarize_row(row, kept)
        assert float(ours.shift[i]) == pytest.approx(once.shift, rel=1e-12)
        assert float(ours.scale[i]) == pytest.approx(once.scale, rel=1e-12, abs=1e-15)
        assert_moot_or_equal(ours.positive[i], once.positive, np.abs(row - once.shift))
        both = binarize_row_twice(row, kept)
        assert float(twice.shift[i]) == pytest.approx(both.shift, rel=1e-9, abs=1e-14)
        assert float(twice.scale[i]) == pytest.approx(both.scale, rel=1e-12, abs=1e-15)
        assert float(twice.residual_scale[i]) == pytest.approx(both.residual_scale, rel=1e-9, abs=1e-14)
        assert_moot_or_equal(twice.residual_positive[i], both.residual_positive, np.abs(row - once.value))


def test_binarize_is_the_least_squares_fit_of_its_signs() -> None:
    """μ and α are what least squares on (1, sign) gives only if the signs balance; α alone always is, given μ."""
    weight, mask = normal(0, 6, 64), mask_of(0, 6, 64)
    result = binarize(weight, mask)
    for i in range(6):
        kept = mask[i]
        sign = torch.where(result.positive[i], 1.0, -1.0).double()[kept]
        left = weight[i][kept] - result.shift[i]
        assert float(result.scale[i]) == pytest.approx(float((sign * left).mean()), rel=1e-12)


def test_order_two_never_loses_to_order_one() -> None:
    weight, mask = normal(1, 50, 24), mask_of(1, 50, 24)
    for i in range(50):
        row, kept = weight[i].numpy(), mask[i].numpy()
        one, two = binarize_row(row, kept).value, binarize_row_twice(row, kept).value
        assert ((row - two)[kept] ** 2).sum() <= ((row - one)[kept] ** 2).sum() + 1e-12


@pytest.mark.parametrize("count", [1, 2])
def test_order_one_is_exact_for_one_or_two_weights(count: int) -> None:
    weight = normal(2, 8, count)
    mask = torch.ones_like(weight, dtype=torch.bool)
    result = binarize(weight, mask)
    value = result.shift[:, None] + result.scale[:, None] * torch.where(result.positive, 1.0, -1.0)
    assert torch.allclose(value, weight, rtol=1e-12)


# --- searches ---------------------------------------------------------------------------------------------------------


def cases(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and masks, ordinary ones and odd ones."""
    rows, columns = 12, 32
    weight, mask = normal(seed, rows, columns), mask_of(seed, rows, columns)
    empty_rows = mask.clone()
    empty_rows[[0, 5, 11]] = False
    constant = weight.clone()
    constant[[2, 3]] = -0.7
    lonely = torch.zeros_like(mask)
    lonely[torch.arange(rows), torch.arange(rows) * 2] = True
    one = torch.zeros_like(mask)
    one[4, 9] = True
    coarse = (weight * 2).round() / 2  # many ties, many zeros
    return [
        (weight, mask),
        (weight, torch.ones_like(mask)),
        (weight, empty_rows),
        (constant, mask),
        (weight.abs() + 0.1, mask),
        (-weight.abs() - 1e-3, mask),
        (weight, lonely),
        (weight, one),
        (coarse, mask),
        (weight * 1e-6 + 5.0, mask),  # a mean far larger than the spread
        (weight[:1], torch.ones_like(mask[:1])),
    ]


def assert_minimum(index: int, errors: list[float], scale: float) -> None:
    """``index`` is the least of ``errors``, or differs from it by rounding only."""
    assert errors[index] <= min(errors) + 1e-12 * scale


def off_the_edge(mask: Tensor, candidates: int) -> Tensor:
    """``mask`` without a few entries, so that no percentile falls exactly on an entry.

    There a last bit of rounding decides on which side of the threshold the entry is.
    """
    mask = mask.clone()
    while True:
        positions = np.linspace(0.1, 0.9, candidates) * (int(mask.sum()) - 1)
        if (np.abs(positions - positions.round()) > 1e-6).all():
            return mask
        mask.view(-1)[mask.view(-1).nonzero()[-1]] = False


@pytest.mark.parametrize("grouping", ["bell", "trisection"])
@pytest.mark.parametrize("seed", range(3))
def test_split_search_equals_binarizing_every_candidate(seed: int, grouping: Any) -> None:
    for weight, mask in cases(seed):
        tried, errors = split_errors(weight.numpy(), mask.numpy(), grouping, 25)
        found = search_split(weight, mask, grouping, 25)
        square = float(weight[mask].square().sum())
        distance = [max(abs(a - b) for a, b in zip(found, t, strict=True)) for t in tried]
        index = int(np.argmin(distance))
        assert distance[index] <= 1e-12 * tried[index][0]
        assert_minimum(index, errors, square)
        # Every candidate's error, not only the best one's, comes out of the prefix sums.
        boundaries = torch.tensor(tried, dtype=torch.float64).T.contiguous()
        ours = square - split_gain(weight, mask, boundaries)
        assert np.allclose(ours.numpy(), errors, rtol=1e-9, atol=1e-11 * square)


@pytest.mark.parametrize("grouping", ["bell", "trisection"])
def test_split_search_picks_the_very_same_thresholds(grouping: Any) -> None:
    for seed in range(6):
        weight, mask = normal(seed, 20, 48), off_the_edge(mask_of(seed, 20, 48), 60)
        tried, errors = split_errors(weight.numpy(), mask.numpy(), grouping, 60)
        assert search_split(weight, mask, grouping, 60) == pytest.approx(tried[int(np.argmin(errors))], rel=1e-12)


def test_split_search_works_in_chunks_of_rows() -> None:
    weight, mask = normal(0, 600, 8), off_the_edge(mask_of(0, 600, 8), 10)
    tried, errors = split_errors(weight.numpy(), mask.numpy(), "trisection", 10)
    assert search_split(weight, mask, "trisection", 10) == pytest.approx(tried[int(np.argmin(errors))], rel=1e-12)


def test_split_search_on_float32_agrees_with_float64() -> None:
    for seed in range(5):
        weight, mask = normal(seed, 20, 48).float(), mask_of(seed, 20, 48)
        assert search_split(weight, mask, "bell", 40) == search_split(weight.double(), mask, "bell", 40)


def test_no_split_without_grouping_or_entries() -> None:
    weight = normal(0, 4, 8)
    assert search_split(weight, torch.ones(4, 8, dtype=torch.bool), "none", 9) == ()
    assert search_split(weight, torch.zeros(4, 8, dtype=torch.bool), "trisection", 9) == ()
    assert not bool(assign_regions(weight, ()).any())


def test_trisection_doubles_the_first_threshold() -> None:
    first, second = search_split(normal(1, 10, 32), mask_of(1, 10, 32), "trisection", 40)
    assert second == 2 * first


@pytest.mark.parametrize("seed", range(4))
def test_candidates_are_percentiles(seed: int) -> None:
    for weight, mask in cases(seed):
        ours = candidate_thresholds(weight, mask, 17)
        expected = np.percentile(weight[mask].abs().numpy(), np.linspace(10, 90, 17))
        assert np.allclose(ours.numpy(), expected, rtol=1e-13)


def test_regions_count_the_thresholds_below() -> None:
    values = torch.tensor([[-3.0, -2.0, -1.0, 0.0, 1.0, 1.5, 2.0, 2.5]])
    assert assign_regions(values, (1.0, 2.0)).tolist() == [[2, 1, 0, 0, 0, 1, 1, 2]]
    assert np.array_equal(assign_regions(values, (1.0, 2.0)).numpy(), region_of(values.numpy(), (1.0, 2.0)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("limit", "order"), [(1, 2), (9, 2), (49, 2), (9, 1)])
def test_salient_search_equals_binarizing_every_candidate(seed: int, limit: int, order: int) -> None:
    for weight, mask in cases(seed):
        ranking = rank_columns(weight, torch.linspace(0.5, 2, 32, dtype=torch.float64))
        errors = count_errors(weight.numpy(), mask.numpy(), ranking.tolist(), limit, order)
        square = float(weight[mask].square().sum())
        assert len(errors) == min(limit, 31)
        assert_minimum(search_salient_count(weight, mask, ranking, limit, order) - 1, errors, square)
        values, kept = weight[:, ranking], mask[:, ranking]
        tries = len(errors)
        ours = salient_error(values[:, :tries], kept[:, :tries], order) + rest_error(values, kept, tries)
        assert np.allclose(ours.numpy(), errors, rtol=1e-9, atol=1e-11 * square)


def test_salient_search_picks_the_very_same_count() -> None:
    for seed in range(6):
        weight, mask = normal(seed, 20, 40), mask_of(seed, 20, 40)
        weight[:, :3] *= 6
        ranking = rank_columns(weight, torch.ones(40, dtype=torch.float64))
        errors = count_errors(weight.numpy(), mask.numpy(), ranking.tolist(), 30)
        assert search_salient_count(weight, mask, ranking, 30) == int(np.argmin(errors)) + 1


def test_no_salient_columns_when_turned_off_or_when_there_is_one_column() -> None:
    weight = normal(0, 4, 8)
    everything = torch.ones(4, 8, dtype=torch.bool)
    assert search_salient_count(weight, everything, torch.arange(8), 0) == 0
    assert search_salient_count(weight[:, :1], everything[:, :1], torch.arange(1), 30) == 0
    assert 1 <= search_salient_count(weight, everything, torch.arange(8), 30) <= 7


def test_columns_are_ranked_by_the_hessian_metric() -> None:
    weight, diagonal = normal(0, 10, 30), torch.rand(30, generator=torch.Generator().manual_seed(0)).double() + 0.1
    assert rank_columns(weight, diagonal).tolist() == reference_ranking(weight.numpy(), diagonal.numpy())
    ties = rank_columns(torch.ones(3, 6), torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.5]))
    assert ties.tolist() == [5, 0, 2, 4, 1, 3]


# --- the inverse factor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("size", [1, 2, 40, 96])
def test_inverse_factor_equals_the_textbook(size: int, damping: float) -> None:
    gram = correlated_gram(size, size, large=min(size - 1, 3))
    factor = inverse_factor(gram.float(), damping)
    upper = factor.upper.double().numpy()
    hessian = damped(gram.float().double().numpy(), damping)
    assert factor.damping == damping
    assert factor.upper.dtype == torch.float32
    assert np.array_equal(upper, np.triu(upper))
    assert (upper.diagonal() > 0).all()
    assert np.allclose(upper.T @ upper @ hessian, np.eye(size), atol=1e-3)
    expected = textbook_factor(gram.float().double().numpy(), damping)
    assert np.allclose(upper, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_factor_of_the_last_columns_is_that_of_their_own_gram() -> None:
    """U[s:, s:] belongs to H[s:, s:]: what was binarized before no longer matters."""
    gram = correlated_gram(0, 24)
    hessian = damped(gram.numpy(), 0.01)
    upper = inverse_factor(gram).upper.double().numpy()[10:, 10:]
    assert np.allclose(upper.T @ upper @ hessian[10:, 10:], np.eye(14), atol=1e-4)


def test_singular_gram_raises_the_damping() -> None:
    tokens = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    tokens[:, 4] = 0
    gram = tokens.T @ tokens
    factor = inverse_factor(gram, 0.0)
    assert factor.damping > 0
    assert bool(factor.upper.isfinite().all())
    hessian = damped(gram.double().numpy(), factor.damping)
    upper = factor.upper.double().numpy()
    assert np.allclose(upper.T @ upper @ hessian, np.eye(20), atol=0.05)
    assert inverse_factor(gram, 0.01).damping == 0.01


def test_indefinite_gram_raises_the_damping_tenfold() -> None:
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = 1.5  # eigenvalue −0.5
    assert inverse_factor(gram, 0.01).damping == pytest.approx(1.0)


def test_zero_gram_counts_as_the_identity() -> None:
    factor = inverse_factor(torch.zeros(5, 5), 0.01)
    assert torch.equal(factor.upper, torch.eye(5))


# --- compensation -----------------------------------------------------------------------------------------------------


def factor_of(gram: Tensor) -> Tensor:
    """float64, by the textbook, so that compensation is compared on its own."""
    return torch.from_numpy(textbook_factor(gram.numpy(), 0.01).copy())


@pytest.mark.parametrize(("start", "width"), [(0, 16), (16, 16), (32, 8), (0, 1), (7, 1), (0, 40)])
def test_compensation_equals_the_reference(start: int, width: int) -> None:
    gram, weight, error = correlated_gram(5, 40), normal(1, 6, 40), normal(2, 6, width)
    upper = factor_of(gram)
    end = start + width
    for mode in ("off", "diagonal", "exact"):
        changed = weight.clone()
        compensate(changed, error, upper, start, mode)
        expected = weight.numpy()
        if mode == "diagonal":
            expected = compensate_diagonal(weight.numpy(), error.numpy(), upper.numpy(), start)
        elif mode == "exact" and end < 40:
            expected = compensate_exact(weight.numpy(), error.numpy(), damped(gram.numpy(), 0.01), start)
        assert np.allclose(changed.numpy(), expected, rtol=1e-8, atol=1e-9)
        assert torch.equal(changed[:, :end], weight[:, :end])


def test_diagonal_and_exact_agree_for_one_column() -> None:
    weight, error, upper = normal(0, 4, 12), normal(1, 4, 1), factor_of(correlated_gram(0, 12))
    one, other = weight.clone(), weight.clone()
    compensate(one, error, upper, 3, "diagonal")
    compensate(other, error, upper, 3, "exact")
    assert torch.allclose(one, other, rtol=1e-12)


def test_exact_compensation_is_a_minimum() -> None:
    """No random change of the later columns does better, and the gradient there is zero."""
    gram, error = correlated_gram(6, 20), normal(3, 3, 8)
    hessian = torch.from_numpy(damped(gram.numpy(), 0.01).copy())
    change = torch.zeros(3, 20, dtype=torch.float64)
    compensate(change, error, factor_of(gram), 0, "exact")
    change[:, :8] = -error
    assert torch.allclose((change @ hessian)[:, 8:], torch.zeros(3, 12, dtype=torch.float64), atol=1e-8)
    best = quadratic_error(change, hessian)
    diagonal = torch.zeros(3, 20, dtype=torch.float64)
    compensate(diagonal, error, factor_of(gram), 0, "diagonal")
    diagonal[:, :8] = -error
    assert bool((best <= quadratic_error(diagonal, hessian)).all())
    conditional = conditional_metric(hessian.numpy(), 0, 8)
    for i in range(3):
        assert float(best[i]) == pytest.approx(quadratic(error[i].numpy(), conditional), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_sequential_pruning_equals_the_reference(seed: int) -> None:
    weight, keep, upper = normal(seed, 7, 24), mask_of(seed, 7, 24), factor_of(correlated_gram(seed, 24))
    keep[0], keep[1] = True, False
    before = weight.clone()
    pruned = prune_sequentially(weight, keep, upper)
    expected = prune_column_by_column(weight.numpy(), keep.numpy(), upper.numpy())
    assert np.allclose(pruned.numpy(), expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(weight, before)
    assert bool((pruned[~keep] == 0).all())
    assert torch.equal(pruned[0], weight[0])


def test_block_metrics() -> None:
    gram = correlated_gram(7, 40)
    upper = inverse_factor(gram.float()).upper
    hessian = damped(gram.float().double().numpy(), 0.01)
    for start, end in ((0, 16), (16, 32), (32, 40)):
        columns = slice(start, end)
        corner = upper[columns, columns]
        plain = block_metric(gram.float(), corner, columns, "gram")
        assert torch.equal(plain, gram.float()[columns, columns])
        conditional = block_metric(gram.float(), corner, columns, "conditional").double().numpy()
        expected = conditional_metric(hessian, start, end)
        assert np.allclose(conditional, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


# --- scales on the output error ---------------------------------------------------------------------------------------


def signs_of(seed: int, rows: int, columns: int) -> Tensor:
    return torch.where(mask_of(seed + 50, rows, columns), 1.0, -1.0)


@pytest.mark.parametrize("seed", range(4))
def test_one_region_is_the_paper_s_two_by_two_system(seed: int) -> None:
    weight, mask = normal(seed, 8, 32).float(), mask_of(seed, 8, 32)
    metric, signs = correlated_gram(seed, 32).float(), signs_of(seed, 8, 32)
    basis = torch.stack([mask.float(), mask * signs], dim=1)
    solved = solve_on_gram(basis, weight, metric)
    for i in range(8):
        alpha, mu = spbo_pair(
            weight[i].double().numpy(), metric.double().numpy(), mask[i].numpy(), signs[i].double().numpy()
        )
        assert solved[i].tolist() == pytest.approx([mu, alpha], rel=1e-3, abs=1e-4)


def basis_of(seed: int, rows: int, columns: int, vectors: int) -> Tensor:
    """``vectors`` disjoint regions, a mask and signs of each."""
    region = torch.randint(vectors, (rows, columns), generator=torch.Generator().manual_seed(seed))
    region[:, :vectors] = torch.arange(vectors)
    region[:, vectors : 2 * vectors] = torch.arange(vectors)
    signs = signs_of(seed, rows, columns)
    signs[:, :vectors], signs[:, vectors : 2 * vectors] = 1.0, -1.0
    masks = [(region == r).float() for r in range(vectors)]
    return torch.stack(masks + [mask * signs for mask in masks], dim=1)


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_scales_equal_least_squares_on_the_transformed_problem(vectors: int) -> None:
    """min_c ‖(w − cΦ) L‖² with S = LLᵀ is an ordinary least squares problem."""
    weight, metric = normal(vectors, 10, 48), correlated_gram(vectors, 48)
    basis = basis_of(vectors, 10, 48, vectors).double()
    root = torch.linalg.cholesky(metric)
    expected = torch.linalg.lstsq((basis @ root).transpose(1, 2), (weight @ root)[:, :, None]).solution[:, :, 0]
    solved = solve_on_gram(basis.float(), weight.float(), metric.float())
    assert torch.allclose(solved.double(), expected, rtol=1e-3, atol=1e-4)
    for i in range(10):
        loop = joint_scales(weight[i].numpy(), metric.numpy(), basis[i].numpy())
        assert np.allclose(loop, expected[i].numpy(), rtol=1e-6, atol=1e-9)


def test_an_empty_region_gets_zero() -> None:
    weight, metric = normal(0, 6, 32), correlated_gram(0, 32)
    basis = basis_of(0, 6, 32, 2)
    padded = torch.cat([basis, torch.zeros(6, 2, 32)], dim=1)
    solved = solve_on_gram(padded, weight.float(), metric.float())
    assert not bool(solved[:, 4:].any())
    assert torch.allclose(solved[:, :4], solve_on_gram(basis, weight.float(), metric.float()), rtol=1e-4, atol=1e-5)
    assert not bool(solve_on_gram(torch.zeros(6, 3, 32), weight.float(), metric.float()).any())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_region_of_one_sign_still_gets_the_best_value(sign: float) -> None:
    """v = ±m: α and μ are not determined, μ ± α is; the solver splits it evenly."""
    weight, metric = normal(1, 6, 32), correlated_gram(1, 32)
    mask = mask_of(1, 6, 32).double()
    solved = solve_on_gram(torch.stack([mask, sign * mask], dim=1).float(), weight.float(), metric.float()).double()
    best = (mask @ metric * weight).sum(dim=1) / (mask @ metric * mask).sum(dim=1)
    assert torch.allclose(solved[:, 0] + sign * solved[:, 1], best, rtol=1e-3, atol=1e-5)
    assert torch.allclose(solved[:, 0], sign * solved[:, 1], rtol=1e-3, atol=1e-4)


def test_a_dominating_column_does_not_shrink_the_other_scales() -> None:
    """One input a thousand times larger than the rest, in a region of its own."""
    weight = normal(2, 4, 64).float()
    metric = torch.eye(64)
    metric[0, 0] = 1e6
    small = torch.zeros(4, 64)
    small[:, 1:3] = 1.0
    large = torch.zeros(4, 64)
    large[:, 0] = 1.0
    solved = solve_on_gram(torch.stack([small, large], dim=1), weight, metric)
    assert torch.allclose(solved[:, 0], weight[:, 1:3].mean(dim=1), rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_metric_of_rank_one_gives_moderate_scales(seed: int) -> None:
    """One token: the error can be zero, and scales far beyond the weights are noise that float16 cannot even hold."""
    token = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
    weight, metric = normal(seed, 50, 64).float(), token.T @ token
    basis = basis_of(seed, 50, 64, 2)
    solved = solve_on_gram(basis, weight, metric)
    assert bool(solved.isfinite().all())
    left = weight.double() - (solved.double()[:, None] @ basis.double())[:, 0]
    start = weight.double() @ token[0].double()
    assert bool(((left @ token[0].double()).square() <= 1e-2 * start.square() + 1e-3).all())
    assert float(solved.abs().max()) < 100 * float(weight.abs().max())


def test_quadratic_error_equals_the_loop() -> None:
    error, metric = normal(0, 7, 12), correlated_gram(0, 12)
    expected = [quadratic(error[i].numpy(), metric.numpy()) for i in range(7)]
    assert quadratic_error(error, metric).tolist() == pytest.approx(expected, rel=1e-12)


# --- allocation -------------------------------------------------------------------------------------------------------


def wishes(importance: list[float], n: int, spread: float) -> list[float]:
    """Real-valued N of every unit, between n − spread and n + spread."""
    return spread_importance(importance, n - spread, n + spread)


@pytest.mark.parametrize("m", [4, 8, 16])
def test_allocation_meets_the_target_within_half_a_step(m: int) -> None:
    draw = random.Random(m)
    for _ in range(400):
        units, n = draw.randint(1, 30), draw.randint(1, m)
        sizes = [draw.randint(1, 10 ** draw.randint(0, 6)) for _ in range(units)]
        importance = [draw.choice([0.0, 1.0, draw.random(), draw.expovariate(0.1)]) for _ in range(units)]
        numbers = allocate(wishes(importance, n, draw.choice([0, 0.5, 1, 2, 3, m])), sizes, n, m)
        top = max(n, m - 1)  # N = M prunes nothing, and is no N:M
        assert all(isinstance(number, int) and 1 <= number <= top for number in numbers)
        missing = n * sum(sizes) - sum(a * b for a, b in zip(numbers, sizes, strict=True))
        assert 2 * abs(missing) <= max(sizes)
        step = 1 if missing > 0 else -1
        movable = [size for number, size in zip(numbers, sizes, strict=True) if 1 <= number + step <= top]
        assert missing == 0 or all(size >= 2 * abs(missing) for size in movable)


@pytest.mark.parametrize("m", [4, 8, 16])
def test_allocation_of_equal_sizes_is_exact_and_follows_the_importance(m: int) -> None:
    draw = random.Random(100 + m)
    for _ in range(300):
        units, n = draw.randint(1, 40), draw.randint(1, m - 1)
        importance = [draw.expovariate(1) for _ in range(units)]
        numbers = allocate(wishes(importance, n, draw.choice([0.5, 1, 2, 3])), [7] * units, n, m)
        assert sum(numbers) == n * units
        ranked = [number for _, number in sorted(zip(importance, numbers, strict=True))]
        assert ranked == sorted(ranked)


def test_allocation_is_uniform_when_the_importances_are_equal() -> None:
    for importance in ([1.0] * 9, [0.0] * 9, [5.0, 5.0 + 1e-14, 5.0] * 3):
        assert allocate(spread_importance(importance, 2, 6), list(range(1, 10)), 4, 8) == [4] * 9


def test_spread_runs_from_the_least_to_the_most_important() -> None:
    assert spread_importance([3.0, 1.0, 2.0], 2, 6) == pytest.approx([6, 2, 4])
    assert spread_importance([3.0, 1.0, 2.0], 4, 4) == pytest.approx([4, 4, 4])
    assert spread_importance([7.0], 1, 5) == [3.0]


def test_ranks_are_places_in_the_order_of_importance() -> None:
    assert ranks([5.0, 900.0, 1.0, 5.0]) == [1.5, 3.0, 0.0, 1.5]
    assert len(set(ranks([2.0] * 4))) == 1
    outlier = [40.0, 1.0, 1.1, 1.2, 1.3]
    assert allocate(spread_importance(outlier, 3, 5), [1] * 5, 4, 8) == [5, 3, 4, 4, 4]
    assert allocate(spread_importance(ranks(outlier), 3, 5), [1] * 5, 4, 8) == [5, 3, 3, 4, 5]


def test_allocation_repairs_wishes_out_of_bounds() -> None:
    assert allocate([-50.0, 50.0], [1, 1], 4, 8) == [1, 7]
    assert allocate([6.0, 8.0, 8.0], [1, 1, 1], 7, 8) == [7, 7, 7]
    assert sum(allocate([100.0] * 5, [3] * 5, 2, 8)) == 10
    assert sum(allocate([-100.0] * 5, [3] * 5, 2, 8)) == 10
    assert allocate([0.2], [5], 1, 4) == [1]
    assert allocate([99.0], [5], 4, 4) == [4]


def test_cosine_importance() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert cosine_importance(before, 3 * before) == pytest.approx(1)
    turned = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert cosine_importance(before, turned) == pytest.approx(2**0.5)
    orthogonal = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for after in (-before, orthogonal, torch.zeros(2, 2)):
        assert cosine_importance(before, after) == pytest.approx(100)
    half = torch.stack([before[0], -before[1]])  # similarities 1 and −1
    assert cosine_importance(before, half) == pytest.approx(100)


def test_outlier_share() -> None:
    weight = torch.ones(4, 25)
    weight[1, 3] = -1000
    assert outlier_share(weight, torch.ones(25)) == pytest.approx(1 / 100)
    norm = torch.ones(25)
    norm[7] = 1000
    assert outlier_share(torch.ones(4, 25), norm) == pytest.approx(4 / 100)
    assert outlier_share(torch.zeros(4, 25), norm) == 0
