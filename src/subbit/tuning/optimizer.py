"""The optimizer that reconstruction and distillation share: AdamW, three learning rates, one schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbit.tuning.tunable import Tunable

__all__ = ["Rates", "make_optimizer", "set_rate", "tuned_norms"]

WARM_UP = 0.1  # of all steps
WARM_UP_STEPS = 16  # at most: at a low rate latents leave the edge at random, and do not come far (docs/log.md)
LAST = 0.05  # of the rate that is left at the end
BETAS = (0.8, 0.95)  # with more momentum latents go beyond the edge and come back (docs/log.md)


@dataclass(frozen=True)
class Rates:
    """Learning rates; 0 leaves those parameters as they are."""

    latents: float  # in units of the scales
    scales: float  # relative
    norms: float


def tuned_norms(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with one dimension that stand outside linears, by name: the weights of norms."""
    tunable = {id(p) for m in module.modules() if isinstance(m, Tunable) for p in m.parameters()}
    inside = {id(m.bias) for m in module.modules() if isinstance(m, nn.Linear) and m.bias is not None}
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and id(parameter) not in tunable | inside
    }


def make_optimizer(modules: Iterable[nn.Module], rates: Rates) -> torch.optim.AdamW:
    """AdamW over the tunable linears and norms inside ``modules``; all their other parameters are frozen."""
    kinds: list[tuple[list[nn.Parameter], float]] = [([], rates.latents), ([], rates.scales), ([], rates.norms)]
    for module in modules:
        module.requires_grad_(False)
        for tunable in (m for m in module.modules() if isinstance(m, Tunable)):
            kinds[0][0].extend(tunable.latent_parameters())
            kinds[1][0].extend(tunable.scale_parameters())
        kinds[2][0].extend(tuned_norms(module).values())
    used = [(parameters, rate) for parameters, rate in kinds if parameters and rate > 0]
    for parameters, _ in used:
        for parameter in parameters:
            parameter.requires_grad_(True)
    on_gpu = any(parameters[0].is_cuda for parameters, _ in used)
    groups = [
        # a recorded step reads its rate from the GPU
        {"params": parameters, "lr": torch.tensor(rate, device=parameters[0].device) if on_gpu else rate, "rate": rate}
        for parameters, rate in used
    ]
    # fused: one pass over memory instead of ten
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True, capturable=on_gpu)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A quadratic warm-up, then half a cosine down to a twentieth.

    The first steps of Adam have the size of the rate in every parameter, whatever its gradient, and would flip all
    signs and positions that are near the edge: until its moments are worth something, the rate is next to nothing.
    """
    share = (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / steps)) + LAST
    warm = min(1.0, (step + 1) / (1 + min(WARM_UP * steps, WARM_UP_STEPS))) ** 2
    for group in optimizer.param_groups:
        rate = group["rate"] * share * warm
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
