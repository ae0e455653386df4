"""A budget in stored bits: which N:M every linear gets when the user says how large the file may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbit.binary.allocate import allocate_bytes
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.errors import UserError
from subbit.job import DenseLayer, Job
from subbit.layerwise import relative_output_error
from subbit.methods.codes import CodesOptions, codes
from subbit.models.layout import ExpertName
from subbit.models.streaming import LayerCall, outside_on_demand, run_head
from subbit.packing.codes import CodesSpec
from subbit.tuning.distill import divergences

__all__ = ["Choice", "plan_budget", "stored_bytes"]

# Output error of every format relative to that of 2:8, the mean over twelve linears of SmolLM2 after four sweeps; the
# ratios of single linears differ by a few percent only (docs/log.md). Ascending in bits.
RELATIVE_ERROR = {
    **{"1:16": 2.2, "1:8": 1.61, "2:16": 1.47, "1:4": 1.17},
    **{"3:16": 1.12, "2:8": 1.0, "3:8": 0.74, "4:8": 0.64},
}
MEASURED = "2:8"
TOLERANCE = 0.005  # bits: so far below the budget a plan may end
TOKENS = 1024  # that the divergence is measured on


@dataclass(frozen=True)
class Choice:
    """What a budget can choose from."""

    units: list[list[str]]  # linears that get one N:M
    formats: list[list[str]]  # of every unit, ascending in bits
    sizes: list[list[int]]  # bytes of every unit in each of its formats
    taken: int  # bytes of what is no choice
    weights: int  # of all linears, and of whatever else counts in the stored bits

    @classmethod
    def of(cls, job: Job, units: list[list[str]], fixed: dict[str, tuple[int, int]]) -> Choice:
        """See :func:`plan_budget`.

        Args:
            units: linears that the budget decides on; those of a unit get one N:M.
            fixed: what else counts in the stored bits → weights, bytes.

        Raises:
            UserError: the budget is out of reach; the message says which one can be reached.
        """
        layers = range(job.layout.num_layers)
        shapes = {name: linear.weight.shape for index in layers for name, linear in job.linears(index).items()}
        formats = [unit_formats([shapes[name][1] for name in unit]) for unit in units]
        sizes = [
            [sum(stored_bytes(shapes[name], form, job.recipe.options) for name in unit) for form in forms]
            for unit, forms in zip(units, formats, strict=True)
        ]
        weights = sum(shapes[name].numel() for unit in units for name in unit)
        weights += sum(count for count, _ in fixed.values())
        choice = cls(units, formats, sizes, sum(size for _, size in fixed.values()), weights)
        # rounded up, so that what the messages name can be reached
        least, most = (math.ceil(1e4 * choice.bits([end] * len(units))) / 1e4 for end in (0, -1))
        budget = job.recipe.bits or 0.0
        if choice.bytes_within(budget) < sum(unit[0] for unit in sizes):
            raise UserError(f"{budget:g} stored bits cannot be reached: the least for this model is {least:.4f}")
        if budget > most + TOLERANCE:
            raise UserError(f"{budget:g} stored bits cannot be reached: the most for this model is {most:.4f}")
        return choice

    def bits(self, chosen: list[int]) -> float:
        """Stored bits a linear weight with these formats."""
        total = self.taken + sum(unit[number] for unit, number in zip(self.sizes, chosen, strict=True))
        return 8 * total / self.weights

    def bytes_within(self, bits: float) -> int:
        """Bytes for the units when there are ``bits`` a weight; what is 1e-6 of a byte short is float arithmetic."""
        return math.floor(bits * self.weights / 8 + 1e-6) - self.taken


def plan_budget(job: Job, choice: Choice, hidden: Tensor, calls: list[LayerCall]) -> dict[str, str]:
    """N:M of the linears that a budget decides on: all linears together take at most ``recipe.bits`` bits a weight.

    What a unit costs is the divergence of the model's next-token distribution when that unit alone is compressed, and
    the sum of these is what the plan keeps low; it grows with the unit's output error.

    Args:
        hidden: (samples, seq_len, hidden) float32, what enters the first decoder layer; not changed.
    """
    costs = unit_costs(job, choice.units, hidden, calls)
    errors = [
        [cost * RELATIVE_ERROR[form] for form in forms] for cost, forms in zip(costs, choice.formats, strict=True)
    ]
    chosen = allocate_bytes(errors, choice.sizes, choice.bytes_within(job.recipe.bits or 0.0))
    job.progress.line(f"budget {job.recipe.bits:g}: planned {choice.bits(chosen):.4f} stored bits a linear weight")
    return {
        name: forms[number]
        for unit, forms, number in zip(choice.units, choice.formats, chosen, strict=True)
        for name in unit
    }


def unit_formats(in_features: list[int]) -> list[str]:
    """The formats whose M divides all of ``in_features``, ascending in bits."""
    return [form for form in RELATIVE_ERROR if all(size % Sparsity.parse(form).m == 0 for size in in_features)]


def stored_bytes(shape: torch.Size, form: str, options: CodesOptions) -> int:
    """Bytes of a linear (out, in) in a format."""
    sparsity = Sparsity.parse(form)
    return CodesSpec(shape[0], shape[1], sparsity.n, sparsity.m, options.column_scales).stored_bytes


def unit_costs(job: Job, units: list[list[str]], hidden: Tensor, calls: list[LayerCall]) -> list[float]:
    """Mean KL divergence (nats a token) to the dense model that each unit alone at 2:8 leads to.

    All experts of a decoder layer are compressed at once, and share the divergence by their output errors.
    """
    together: dict[str, list[int]] = {}  # units that are compressed at once
    for number, unit in enumerate(units):
        expert = ExpertName.parse(unit[0])
        together.setdefault(expert.experts if expert else unit[0], []).append(number)
    errors: dict[str, float] = {}
    students: dict[str, Tensor] = {}  # what leaves the layer where one of these, and nothing else, was compressed
    few = max(1, TOKENS // hidden.shape[1])
    names = {name for unit in units for name in unit}
    for index, layer in enumerate(job.dense_pass("budget: what every linear costs", hidden, calls, names)):
        students = {key: job.run(index, calls[index], student) for key, student in students.items()}
        compressed = compress_quickly(job, layer, errors)
        for key, numbers in together.items():
            inside = [name for number in numbers for name in units[number] if name in compressed]
            if inside:
                with replaced_weights(layer, {name: compressed[name] for name in inside}):
                    students[key] = job.run(index, calls[index], layer.before[:few])
        teacher = layer.after[:few]
    costs = [0.0] * len(units)
    for key, lost in lost_by(job, students, teacher).items():
        shares = [sum(errors[name] for name in units[number]) for number in together[key]]
        for number, share in zip(together[key], shares, strict=True):
            # the error counts a little by itself: where the divergence is lost in rounding, a plan still has an order
            costs[number] = lost * share / max(sum(shares), 1e-12) + 1e-6 * share
    return costs


def compress_quickly(job: Job, layer: DenseLayer, errors: dict[str, float]) -> dict[str, Tensor]:
    """The weights of a layer's linears at 2:8 without a sweep, on the dense model's activations.

    Args:
        errors: gets the relative output error of each of them.
    """
    quick = replace(job.recipe.options, sweeps=0)
    compressed = {}
    for leader, shared in layer.grams.shared().items():
        gram = layer.grams.gram(leader)
        factor = inverse_factor(gram, quick.damping)
        for name in shared:
            weight = layer.linears[name].weight.detach()
            sparsity = Sparsity.parse(MEASURED if weight.shape[1] % 8 == 0 else "1:4")
            compressed[name] = codes(weight, gram, factor, sparsity, quick).dense()
            errors[name] = relative_output_error(weight, compressed[name], gram)
    return compressed


@contextmanager
def replaced_weights(layer: DenseLayer, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it, some linears of a layer have other weights."""
    before = {name: layer.linears[name].weight.detach().clone() for name in weights}
    for name, weight in weights.items():
        layer.linears[name].weight.copy_(weight)
    try:
        yield
    finally:
        for name, weight in before.items():
            layer.linears[name].weight.copy_(weight)


def lost_by(job: Job, students: dict[str, Tensor], teacher: Tensor) -> dict[str, float]:
    """Mean KL divergence in nats a token of what leaves the last decoder layer, (samples, seq_len, hidden) each."""
    with outside_on_demand(job.model, job.layout, job.source, job.device):

        def head(states: Tensor) -> Tensor:
            return run_head(job.model, job.layout, job.source, states.to(job.device), device=job.device)

        return divergences(students, teacher, head)
