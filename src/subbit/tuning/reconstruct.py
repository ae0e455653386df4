"""Decoder-layer reconstruction: tune a compressed layer so that its output is the teacher's again.

The target is the teacher's output on the *teacher's* input, while the layer runs on the student's: so each layer also
repairs what the layers before it broke. A few tokens (the first of a window, delimiters) carry activations ten to
hundreds of times larger, and all others attend to them: they must count more than the rest, but not alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from subbit.models.streaming import LayerCall, run_layer
from subbit.tuning.optimizer import Rates, make_optimizer, set_rate
from subbit.tuning.precision import mixed_precision

__all__ = ["reconstruct", "token_weights"]


def token_weights(targets: Tensor, exponent: float, first_token: float) -> Tensor:
    """(samples, seq_len): weights of tokens with ``targets`` (samples, seq_len, hidden) that make errors relative.

    importance / ‖t‖², for Σ weight · ‖error‖², with importances (‖t‖ / median)^exponent of sum 1: with exponent 0 every
    token counts by its relative error, with exponent 2 it is the mean square error relative to that of the targets.
    The first token of a window gets at least the share ``first_token`` of the window.
    """
    norm = targets.norm(dim=-1).clamp_min(1e-6)
    importance = (norm / norm.median()) ** exponent
    least = importance[:, 1:].sum(dim=1) * first_token / (1 - first_token)
    importance[:, 0] = importance[:, 0].maximum(least)
    return importance / importance.sum() / norm.square()


def reconstruct(
    layer: nn.Module,
    call: LayerCall,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch: int,
    rates: Rates,
    token_exponent: float,
    first_token: float,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Tune the :class:`~subbit.tuning.tunable.Tunable` linears and the norms of ``layer``, in place.

    Args:
        inputs: (samples, seq_len, hidden) float32, what enters the layer in the student.
        targets: the same shape, what leaves it in the teacher.
        batch: windows a step; where there are fewer, some come twice.
        seed: of the order of the windows.
        dtype: of matrix products, float32 or bfloat16.

    Returns:
        The mean relative error, see :func:`token_weights`, over the first and over the last tenth of the steps.
    """
    optimizer = make_optimizer([layer], rates)
    generator = torch.Generator().manual_seed(seed)
    weights = token_weights(targets, token_exponent, first_token) * len(targets) / batch
    errors: list[Tensor] = []
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < batch:
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            chosen, order = order[:batch], order[batch:]
            set_rate(optimizer, step, steps)
            with mixed_precision(dtype, device):
                output = run_layer(layer, call, inputs[chosen].to(device))
            lost = (output.float() - targets[chosen].to(device)).square().sum(dim=-1)
            error = (lost * weights[chosen].to(device)).sum()
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            optimizer.step()
            errors.append(error.detach())  # no number yet: that would be waiting for a GPU in every step
            if progress is not None:
                progress(step + 1, steps)
    layer.requires_grad_(False)
    part = max(1, steps // 10)
    return mean(errors[:part]), mean(errors[-part:])


def mean(errors: list[Tensor]) -> float:
    """Of scalars; 0 for none."""
    return float(torch.stack(errors).double().mean()) if errors else 0.0
