"""Activation statistics of a decoder layer's linears: one Gram matrix for every distinct input."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

__all__ = ["GramCollector", "clip_token_norms"]


def clip_token_norms(tokens: Tensor, multiple: float) -> Tensor:
    """``tokens`` (tokens, in), those longer than ``multiple`` times the median norm scaled down to that length.

    A few tokens (the first of a sequence, delimiters) carry activations hundreds of times larger than the rest; a plain
    Gram sees nothing else. ``multiple`` 0 turns this off.
    """
    if multiple <= 0:
        return tokens
    norm = tokens.norm(dim=1, keepdim=True)
    return tokens * (multiple * norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)


class GramCollector:
    """Collects H = XᵀX / tokens, float32, of every linear while a decoder layer runs; use it as a context manager.

    Linears that get the very same input (q, k and v; gate and up) share one Gram.
    """

    def __init__(self, linears: dict[str, nn.Linear], clip_norm: float) -> None:
        self._clip_norm = clip_norm
        self._linears = linears
        self._leaders: dict[str, str] = {}  # linear → the first linear with the same input
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[str, Tensor] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GramCollector:
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0])))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _see(self, name: str, inputs: Tensor) -> None:
        if name not in self._leaders:
            shared = self._last is not None and self._last[1] is inputs
            self._leaders[name] = self._leaders[self._last[0]] if shared and self._last else name
        self._last = (name, inputs)
        if self._leaders[name] != name:
            return
        tokens = clip_token_norms(inputs.detach().reshape(-1, inputs.shape[-1]).float(), self._clip_norm)
        if name not in self._sums:
            self._sums[name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
            self._tokens[name] = 0
        self._sums[name].addmm_(tokens.T, tokens)
        self._tokens[name] += len(tokens)

    def shared(self) -> dict[str, list[str]]:
        """Linears by the leader whose Gram they share; one that never ran is its own leader."""
        groups: dict[str, list[str]] = {}
        for name in self._linears:
            groups.setdefault(self._leaders.get(name, name), []).append(name)
        return groups

    def tokens(self, leader: str) -> int:
        """How many tokens the linear saw."""
        return self._tokens.get(leader, 0)

    def gram(self, leader: str) -> Tensor:
        """(in, in) float32; zeros for a linear that saw no token."""
        if leader not in self._sums:
            size = self._linears[leader].in_features
            return torch.zeros(size, size, device=self._linears[leader].weight.device)
        return self._sums[leader] / self._tokens[leader]
