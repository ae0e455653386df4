"""Experts that transformers keeps as 3-D parameters, taken apart: an ``nn.Linear`` for every projection of each expert.

A stack ``experts`` with the parameters ``gate_up_proj`` (experts, 2 · intermediate, hidden) and ``down_proj`` (experts,
hidden, intermediate) becomes ``experts.0.gate_proj``, ``experts.0.up_proj``, ``experts.0.down_proj``, ``experts.1.…``,
the names that most checkpoints had before transformers merged them. Everything that knows linears then knows experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["RoutedExperts", "split_experts"]

# What `use_experts_implementation` of transformers says of a class. With these values, two matrices and the default
# gate, all of its implementations compute what `RoutedExperts` computes, whatever the family.
_KNOWN_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
}


class Expert(nn.Module):
    """One expert: a gated feed-forward network."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = linear_of(gate)
        self.up_proj = linear_of(up)
        self.down_proj = linear_of(down)
        self.act_fn = act_fn

    def forward(self, inputs: Tensor) -> Tensor:
        """(tokens, hidden) → (tokens, hidden)."""
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return output


class RoutedExperts(nn.ModuleList):
    """Stands where a stack of experts stood, with the same call, the same result and the same weights, uncopied."""

    def __init__(self, stack: nn.Module) -> None:
        act_fn = cast(Callable[[Tensor], Tensor], stack.act_fn)
        gates, ups = stack.get_parameter("gate_up_proj").chunk(2, dim=1)
        downs = stack.get_parameter("down_proj")
        super().__init__(Expert(*matrices, act_fn) for matrices in zip(gates, ups, downs, strict=True))
        self.num_experts = len(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through its experts, as transformers' eager implementation; experts without tokens do not run.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), numbers of experts.
            top_k_weights: (tokens, k), what their outputs are multiplied by.
        """
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number == len(self):  # how transformers marks a place without an expert
                continue
            place, token = torch.where((top_k_index == number).T)
            routed = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            output.index_add_(0, token, routed.to(output.dtype))
        return output


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear that shares ``weight`` (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear


def split_experts(model: nn.Module, linears: Iterable[str] | None = None) -> None:
    """Put `RoutedExperts` in the place of every stack of experts whose layout is known; others stay as they are.

    Args:
        linears: only stacks that hold one of these linears.
    """
    wanted = None if linears is None else {re.sub(r"\.\d+\.\w+$", "", name) for name in linears}
    for path, module in list(model.named_modules()):
        if is_known_stack(module) and (wanted is None or path in wanted):
            model.set_submodule(path, RoutedExperts(module))


def is_known_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that `RoutedExperts` can replace, from what its class says of itself."""
    layout: dict[str, Any] = {key: getattr(module, key, None) for key in _KNOWN_LAYOUT}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if layout != _KNOWN_LAYOUT or tensors.keys() != {"gate_up_proj", "down_proj"}:
        return False
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__module__", "") != "transformers.integrations.moe" or not hasattr(module, "act_fn"):
        return False  # a gate of its own: clamped, or another activation
    up, down = tensors["gate_up_proj"].shape, tensors["down_proj"].shape
    return len(up) == len(down) == 3 and (up[0], up[1], up[2]) == (down[0], 2 * down[2], down[1])
