"""Which N:M every linear gets: overrides first, then importance and the exact allocator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binary.allocate import allocate, cosine_importance, outlier_share, ranks, spread_importance
from subbit.binary.nm import Sparsity
from subbit.budget import Choice, plan_budget, stored_bytes
from subbit.errors import UserError
from subbit.job import Job
from subbit.models.layout import fused_groups, router_linears, uncompressed_matrices
from subbit.models.streaming import LayerCall
from subbit.recipe import Recipe

__all__ = ["Plan", "make_plan", "plan_sparsity"]


@dataclass
class Plan:
    """What is decided for every linear before anything is measured."""

    sparsities: dict[str, str]  # by overrides
    left_dense: dict[str, str]  # parameter or linear → why
    free: dict[str, int]  # linears that the allocator decides on → weights
    choice: Choice | None = None  # what a budget can choose from, where the recipe has one


def plan_sparsity(
    job: Job, plan: Plan, hidden: Tensor, calls: list[LayerCall]
) -> tuple[dict[str, str], dict[str, str]]:
    """N:M of every linear by full name, and why the others stay dense.

    Args:
        hidden: (samples, seq_len, hidden) float32, what enters the first decoder layer; not changed.
        calls: what each decoder layer is given besides.
    """
    sparsities = dict(plan.sparsities)
    if plan.choice is None or not plan.free:
        sparsities.update(allocate_linears(job, plan.free, Sparsity.parse(job.recipe.sparsity), hidden, calls))
    else:
        sparsities.update(plan_budget(job, plan.choice, hidden[: job.recipe.allocation.samples], calls))
    for name, reason in plan.left_dense.items():
        job.progress.line(f"left dense: {name} ({reason})")
    return {name: sparsities[name] for name in linear_names(job) if name in sparsities}, plan.left_dense


def make_plan(job: Job, may_be_empty: bool = False) -> Plan:
    """Overrides, what cannot be compressed, and what is left for the allocator.

    Args:
        may_be_empty: leaving every linear dense is no mistake, since something else is compressed.

    Raises:
        UserError: an override that no linear matches, nothing to compress, or a budget out of reach.
    """
    check_overrides(job)
    target = Sparsity.parse(job.recipe.sparsity)
    plan = Plan({}, {}, {})
    for index in range(job.layout.num_layers):
        routers = {f"{job.layout.layer_name(index)}.{name}" for name in router_linears(job.layer(index))}
        for name, linear in job.linears(index).items():
            wish = job.recipe.sparsity_of(name)
            m = wish.m if isinstance(wish, Sparsity) else smallest_group(job, target)
            if wish == "dense":
                plan.left_dense[name] = "the recipe says so"
            elif wish is None and name in routers:
                plan.left_dense[name] = "it chooses between experts"
            elif linear.in_features % m:
                plan.left_dense[name] = f"in_features {linear.in_features} is not a multiple of M = {m}"
            elif isinstance(wish, Sparsity):
                plan.sparsities[name] = str(wish)
            else:
                plan.free[name] = linear.weight.numel()
        for local, shape in uncompressed_matrices(job.layer(index)).items():
            reason = f"a parameter of shape {list(shape)}, not a linear"
            plan.left_dense[f"{job.layout.layer_name(index)}.{local}"] = reason
    if not plan.free and not plan.sparsities and not may_be_empty:
        raise UserError(
            f"nothing to compress: no linear of the model has in_features that is a multiple of M = {target.m}"
        )
    if job.recipe.bits is not None and (plan.free or plan.sparsities or plan.left_dense):
        plan.choice = Choice.of(job, allocation_units(job, plan.free), fixed_parts(job, plan))
    return plan


def smallest_group(job: Job, target: Sparsity) -> int:
    """What in_features must be a multiple of: M, or with a budget the smallest M that it may choose."""
    return target.m if job.recipe.bits is None else 4


def fixed_parts(job: Job, plan: Plan) -> dict[str, tuple[int, int]]:
    """Weights and bytes of what a budget does not decide on, by name: overridden linears, and all that stays dense."""
    fixed = {}
    for index in range(job.layout.num_layers):
        for name, linear in job.linears(index).items():
            if name in plan.sparsities:
                size = stored_bytes(linear.weight.shape, plan.sparsities[name], job.recipe.options)
                fixed[name] = linear.weight.numel(), size
    for name in plan.left_dense:
        tensor = job.source.tensor(name if name in job.source else f"{name}.weight")
        size = torch.float16.itemsize if job.source.gguf_file else tensor.element_size()
        fixed[name] = tensor.numel(), tensor.numel() * size
    return fixed


def linear_names(job: Job) -> list[str]:
    """Full names of the linears of all decoder layers, in order."""
    return [name for index in range(job.layout.num_layers) for name in job.linears(index)]


def check_overrides(job: Job) -> None:
    """UserError for an override that no linear matches: a misspelled name must not compress what it was to protect."""
    names = linear_names(job)
    for pattern in job.recipe.overrides:
        if not any(Recipe.matches(pattern, name) for name in names):
            there = f"which has {names[0]}, …" if names else "which has none"
            raise UserError(f"recipe: overrides: {pattern!r} matches no linear of the model, {there}")


def allocate_linears(
    job: Job, free: dict[str, int], target: Sparsity, hidden: Tensor, calls: list[LayerCall]
) -> dict[str, str]:
    """N:M of the linears that no override decides."""
    allocation = job.recipe.allocation
    if allocation.kind == "uniform" or target.dense or not free:  # dense: there is nothing to spread
        return {name: str(target) for name in free}
    units = allocation_units(job, free)
    sizes = [sum(free[name] for name in unit) for unit in units]
    importance = unit_importance(job, units, hidden[: allocation.samples], calls)
    if allocation.spread == "rank":
        importance = ranks(importance)
    low = target.n - 1.0 if allocation.n_low is None else allocation.n_low
    high = target.n + 1.0 if allocation.n_high is None else allocation.n_high
    numbers = allocate(spread_importance(importance, low, high), sizes, target.n, target.m)
    return {name: f"{n}:{target.m}" for unit, n in zip(units, numbers, strict=True) for name in unit}


def allocation_units(job: Job, free: dict[str, int]) -> list[list[str]]:
    """Linears that get one N: a whole decoder layer (cosine, sine), or what serving engines fuse (all others)."""
    units: list[list[str]] = []
    for index in range(job.layout.num_layers):
        names = [name for name in job.linears(index) if name in free]
        units += [names] if job.recipe.allocation.kind in ("cosine", "sine") else fused_groups(names)
    return [unit for unit in units if unit]


def unit_importance(job: Job, units: list[list[str]], hidden: Tensor, calls: list[LayerCall]) -> list[float]:
    """Importance of every unit, from the dense model; larger keeps more.

    l2: root mean square of the weights (STBLLM, section 3.3). outliers: :func:`outlier_share`. cosine:
    :func:`cosine_importance`. sine: half a sine wave over the depth, the middle layers least important.
    """
    kind = job.recipe.allocation.kind
    if kind == "l2":
        return [rms([job.source.tensor(f"{name}.weight") for name in unit]) for unit in units]
    if kind == "sine":
        depth = job.layout.num_layers
        by_name = {
            name: 1 - math.sin(math.pi * (index + 0.5) / depth) for index in range(depth) for name in job.linears(index)
        }
    else:
        by_name = measured_importance(job, hidden, calls)
    return [sum(by_name[name] for name in unit) / len(unit) for unit in units]


def measured_importance(job: Job, hidden: Tensor, calls: list[LayerCall]) -> dict[str, float]:
    """Importance of every linear for the kinds that need activations: one pass through the dense model."""
    importance: dict[str, float] = {}
    for layer in job.dense_pass("layer importance", hidden, calls):
        if job.recipe.allocation.kind == "cosine":
            cosine = cosine_importance(layer.before.flatten(0, 1), layer.after.flatten(0, 1))
            importance.update(dict.fromkeys(layer.linears, cosine))
        else:
            for leader, names in layer.grams.shared().items():
                norm = layer.grams.gram(leader).diagonal().sqrt()
                importance.update({name: outlier_share(layer.linears[name].weight, norm) for name in names})
    return importance


def rms(tensors: list[Tensor]) -> float:
    """Root mean square of all values."""
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors) / sum(t.numel() for t in tensors))
