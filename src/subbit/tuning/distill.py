"""Distillation of the whole model: the student's next-token distribution towards the teacher's, by KL divergence.

The student is run layer by layer from its embedded windows, as everywhere in this package; of the teacher only what
leaves its last decoder layer is needed. Some windows are held out, so that fitting the calibration text too closely
shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subbit.models.logits import rows_at_once
from subbit.models.streaming import LayerCall, run_layer
from subbit.tuning.graph import Replayed
from subbit.tuning.optimizer import Rates, make_optimizer, set_rate
from subbit.tuning.precision import mixed_precision

__all__ = ["Head", "Student", "distill", "divergence", "divergences", "mean_divergence", "optimizer_tensors"]

CHUNK = 256  # positions whose logits are in memory at a time

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Student:
    """A model whose decoder layers hold :class:`~subbit.tuning.tunable.Tunable` linears."""

    layers: list[nn.Module]
    calls: list[LayerCall]
    head: Head  # (1, tokens, hidden) → logits (1, tokens, vocab): final norm and output matrix, the teacher's as well
    checkpoint_activations: bool = False  # keep only what enters each layer, and run the layers twice

    def run(self, embedded: Tensor) -> Tensor:
        """(batch, seq_len, hidden): what leaves the last decoder layer."""
        hidden = embedded
        for layer, call in zip(self.layers, self.calls, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                # no layer draws random numbers here, and a CUDA graph cannot read the state of their generator
                hidden = checkpoint(run_layer, layer, call, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run_layer(layer, call, hidden)
        return hidden


def divergence(student: Tensor, teacher: Tensor, head: Head, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Mean over tokens of KL(teacher ‖ student) in nats, a float64 scalar, and its gradient by ``student``.

    Args:
        student, teacher: (..., hidden), what leaves the last decoder layer of each.
        gradient: whether to compute it; the logits exist only a chunk of positions at a time either way.
    """
    tokens = student.shape[:-1].numel()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    slopes = []
    for part, target in zip(chunks(student.detach()), chunks(teacher), strict=True):
        with torch.no_grad():
            wanted = head(target[None])[0]
        with torch.set_grad_enabled(gradient):
            logits = head(part.requires_grad_(gradient)[None])[0]
        values = logits.detach()
        slope = torch.empty_like(values) if gradient else None
        total += kl_sum(values, wanted, slope)
        if slope is not None:
            slopes.append(torch.autograd.grad(logits, part, slope)[0] / tokens)
    return total / tokens, torch.cat(slopes).view_as(student) if gradient else None


def kl_sum(student: Tensor, teacher: Tensor, slope: Tensor | None) -> Tensor:
    """Sum over tokens of KL(teacher ‖ student) in nats, a float64 scalar.

    Args:
        student, teacher: (tokens, vocab), logits.
        slope: the same shape and dtype; gets the gradient, which is the student's probabilities minus the teacher's.
    """
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    rows = rows_at_once(student)
    for first in range(0, len(student), rows):
        part = slice(first, first + rows)
        wanted, have = teacher[part].float().log_softmax(-1), student[part].float().log_softmax(-1)
        likely = wanted.exp()
        total += wanted.sub_(have).mul_(likely).sum()
        if slope is not None:
            slope[part] = have.exp_().sub_(likely)
    return total


def divergences(students: dict[str, Tensor], teacher: Tensor, head: Head) -> dict[str, float]:
    """:func:`divergence` of many students, for which the teacher's logits are computed once."""
    totals = dict.fromkeys(students, 0.0)
    parts = {key: chunks(student) for key, student in students.items()}
    tokens = teacher.shape[:-1].numel()
    with torch.no_grad():
        for number, target in enumerate(chunks(teacher)):
            wanted = head(target[None])[0]
            for key, mine in parts.items():
                totals[key] += float(kl_sum(head(mine[number][None])[0], wanted, slope=None)) / tokens
    return totals


def chunks(states: Tensor) -> tuple[Tensor, ...]:
    """(..., seq_len, hidden) in parts (tokens, hidden), none longer than a window: the model may allow no more."""
    return states.flatten(0, -2).split(min(CHUNK, states.shape[-2]))


def distill(
    student: Student,
    embedded: Tensor,
    teacher: Tensor,
    *,
    steps: int,
    batch: int,
    rates: Rates,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    recorded: bool = True,
    start: int = 0,
    optimizer_state: dict[str, Tensor] | None = None,
    after_step: Callable[[int, float, torch.optim.Optimizer], None] | None = None,
) -> None:
    """Tune scales, norms and latents of all decoder layers, in place.

    Args:
        embedded: (samples, seq_len, hidden) float32, what enters the first decoder layer.
        teacher: the same shape, what leaves the teacher's last one.
        batch: windows a step.
        dtype: of matrix products, float32 or bfloat16.
        recorded: whether a step is a CUDA graph on a GPU: for models whose step is the same work whatever the tokens.
        start: steps that an earlier, interrupted run has done.
        after_step: called with the number of steps done, the step's divergence and the optimizer.
    """
    optimizer = make_optimizer(student.layers, rates)
    if optimizer_state is not None:
        load_optimizer(optimizer, optimizer_state)

    def descend(windows: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad(), mixed_precision(dtype, device):
            output = student.run(windows)
            loss, slope = divergence(output, targets, student.head, gradient=True)
        optimizer.zero_grad(set_to_none=True)
        output.backward(slope)
        optimizer.step()
        return loss

    take = Replayed(descend) if recorded and device.type == "cuda" else descend
    order = window_order(len(embedded), steps * batch, seed)
    for step in range(start, steps):
        chosen = order[step * batch : (step + 1) * batch]
        set_rate(optimizer, step, steps)
        loss = take(embedded[chosen].to(device), teacher[chosen].to(device))
        if after_step is not None:
            after_step(step + 1, float(loss), optimizer)


def window_order(windows: int, draws: int, seed: int) -> Tensor:
    """(draws,) int64: passes over all windows, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-draws // windows)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])[:draws]


def mean_divergence(
    student: Student, embedded: Tensor, teacher: Tensor, dtype: torch.dtype, device: torch.device
) -> float:
    """Mean divergence over windows, one at a time, in nats a token; 0 for none. ``dtype`` as in :func:`distill`."""
    with torch.no_grad(), mixed_precision(dtype, device):
        values = [
            divergence(student.run(one[None].to(device)), other[None].to(device), student.head, gradient=False)[0]
            for one, other in zip(embedded, teacher, strict=True)
        ]
    return float(torch.stack(values).mean()) if values else 0.0


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Fill the moments of AdamW from :func:`optimizer_tensors`."""
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = {
            key: state[f"{number}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{number}.{key}" in state
        }
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of AdamW by number of the parameter, to be saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"{n}.{key}": value for n, p in enumerate(parameters) for key, value in optimizer.state[p].items()}
