"""Activation statistics of a decoder layer's linears: one Gram matrix for every distinct input.

An expert of a mixture sees only the tokens that the router gives it, perhaps too few to say anything; the tokens of all
experts of its layer then make up for those that it lacks.
"""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor, nn

from subbit.models.layout import ExpertName

__all__ = ["GramCollector", "clip_token_norms"]

BLOCK = 384  # columns of a Gram that are computed at a time: wide enough for a fast product


def clip_token_norms(tokens: Tensor, multiple: float) -> Tensor:
    """``tokens`` (tokens, in), those longer than ``multiple`` times the median norm scaled down to that length.

    A few tokens (the first of a sequence, delimiters) carry activations hundreds of times larger than the rest; a plain
    Gram sees nothing else. ``multiple`` 0 turns this off.
    """
    if multiple <= 0:
        return tokens
    norm = tokens.norm(dim=1, keepdim=True)
    return tokens * (multiple * norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)


def add_upper_gram(total: Tensor, tokens: Tensor) -> None:
    """Add XᵀX of ``tokens`` (tokens, in) to the upper triangle of ``total`` (in, in); what is below has no meaning.

    Block rows from the diagonal on: half of the arithmetic for a large ``in``.
    """
    for first in range(0, tokens.shape[1], BLOCK):
        rows = tokens[:, first : first + BLOCK]
        total[first : first + BLOCK, first:].addmm_(rows.T, tokens[:, first:])


def mirrored(upper: Tensor) -> Tensor:
    """A new symmetric matrix of the upper triangle of ``upper`` (in, in)."""
    gram = upper.clone()
    for first in range(0, len(gram), BLOCK):
        part = slice(first, first + BLOCK)
        corner = gram[part, part]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[part, :first] = gram[:first, part].T
    return gram


class GramCollector:
    """Collects H = XᵀX / tokens, float32, of every linear while a decoder layer runs; use it as a context manager.

    Linears that get the very same input (q, k and v; gate and up) share one Gram.

    Args:
        min_expert_tokens: an expert that saw fewer tokens than this multiple of its ``in_features`` is short of them,
            and its Gram is filled up to that number with the mean Gram of all experts' tokens.
    """

    def __init__(self, linears: dict[str, nn.Linear], clip_norm: float, min_expert_tokens: float = 0.0) -> None:
        self._clip_norm = clip_norm
        self._min_expert_tokens = min_expert_tokens
        self._linears = linears
        self._leaders: dict[str, str] = {}  # linear → the first linear with the same input
        self._sums: dict[str, Tensor] = {}  # upper triangles
        self._tokens: dict[str, int] = {}
        self._norms: dict[str, list[Tensor]] = {}  # of every token, not clipped
        self._pools: dict[tuple[str, str], tuple[Tensor, int]] = {}  # sums and tokens over all experts
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
        tokens = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._norms.setdefault(name, []).append(tokens.norm(dim=1))
        tokens = clip_token_norms(tokens, self._clip_norm)
        if name not in self._sums:
            self._sums[name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
            self._tokens[name] = 0
        add_upper_gram(self._sums[name], tokens)
        self._tokens[name] += len(tokens)

    def shared(self) -> dict[str, list[str]]:
        """Linears by the leader whose Gram they share; one that never ran is its own leader."""
        groups: dict[str, list[str]] = {}
        for name in self._linears:
            groups.setdefault(self._leaders.get(name, name), []).append(name)
        return groups

    def tokens(self, leader: str) -> int:
        """How many tokens the linear itself saw."""
        return self._tokens.get(leader, 0)

    def peaks(self, leader: str) -> dict[str, float]:
        """How far outliers stand out of what a linear saw: the largest over the median.

        Returns:
            ``token``: of token norms, before they are clipped; ``channel``: of channel energies, after that. A ratio
            that is not finite is left out: of a linear that saw nothing, or where half the channels are always zero.
        """
        if not self.tokens(leader):
            return {}
        parts = {"token": torch.cat(self._norms[leader]), "channel": self._sums[leader].diagonal()}
        ratios = {name: float(values.max() / values.median()) for name, values in parts.items()}
        return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}

    def borrowed(self, leader: str) -> int:
        """How many tokens an expert lacks, which the Gram of all experts makes up for; 0 for any other linear."""
        needed = math.ceil(self._min_expert_tokens * self._linears[leader].in_features)
        name = ExpertName.parse(leader)
        if name is None or self.tokens(leader) >= needed or not self._pool(name)[1]:
            return 0
        return needed - self.tokens(leader)

    def gram(self, leader: str) -> Tensor:
        """(in, in) float32; zeros for a linear that neither saw nor borrowed a token."""
        total, tokens, borrowed = self._sums.get(leader), self.tokens(leader), self.borrowed(leader)
        if total is None:
            size = self._linears[leader].in_features
            total = torch.zeros(size, size, device=self._linears[leader].weight.device)
        name = ExpertName.parse(leader)
        if name is not None and borrowed:
            shared, count = self._pool(name)
            total = total + shared * (borrowed / count)
        return mirrored(total).div_(max(tokens + borrowed, 1))

    def _pool(self, name: ExpertName) -> tuple[Tensor, int]:
        """XᵀX (upper triangle) of what all experts of a layer saw in the place of one linear, and their tokens."""
        if name.pool not in self._pools:
            others = {other: ExpertName.parse(other) for other in self._leaders}
            leaders = [self._leaders[other] for other, parts in others.items() if parts and parts.pool == name.pool]
            total = sum((self._sums[leader] for leader in leaders), torch.zeros(()))
            self._pools[name.pool] = total, sum(self._tokens[leader] for leader in leaders)
        return self._pools[name.pool]
