"""A budget in stored bits: which N:M every linear gets when the user says how large the file may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbit.binary.allocate import allocate_bytes
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.errors import UserError
from subbit.job import Job
from subbit.layerwise import relative_output_error
from subbit.methods.codes import CodesOptions, codes
from subbit.models.streaming import LayerCall
from subbit.packing.codes import CodesSpec

__all__ = ["Choice", "plan_budget", "stored_bytes"]

# Output error of every format relative to that of 2:8, the mean over twelve linears of SmolLM2 after four sweeps; the
# ratios of single linears differ by a few percent only (docs/log.md). Ascending in bits.
RELATIVE_ERROR = {
    **{"1:16": 2.2, "1:8": 1.61, "2:16": 1.47, "1:4": 1.17},
    **{"3:16": 1.12, "2:8": 1.0, "3:8": 0.74, "4:8": 0.64},
}
MEASURED = "2:8"
TOLERANCE = 0.005  # bits: so far below the budget a plan may end


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

    Args:
        hidden: (samples, seq_len, hidden) float32, what enters the first decoder layer; not changed.
    """
    measured = measure_errors(job, {name for unit in choice.units for name in unit}, hidden, calls)
    errors = [
        [sum(measured[name] for name in unit) * RELATIVE_ERROR[form] for form in forms]
        for unit, forms in zip(choice.units, choice.formats, strict=True)
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


def measure_errors(job: Job, names: set[str], hidden: Tensor, calls: list[LayerCall]) -> dict[str, float]:
    """Relative output error of every linear at 2:8 without a sweep, on the dense model's activations."""
    quick = replace(job.recipe.options, sweeps=0)
    errors: dict[str, float] = {}
    for layer in job.dense_pass("budget: error of every linear", hidden, calls, names):
        for leader, shared in layer.grams.shared().items():
            gram = layer.grams.gram(leader)
            factor = inverse_factor(gram, quick.damping)
            for name in shared:
                weight = layer.linears[name].weight.detach()
                sparsity = Sparsity.parse(MEASURED if weight.shape[1] % 8 == 0 else "1:4")
                dense = codes(weight, gram, factor, sparsity, quick).dense()
                errors[name] = relative_output_error(weight, dense, gram)
    return errors
