"""SubbitLinear, the module that stands where a ``nn.Linear`` stood, and what all packed modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subbit.packing.spec import LinearSpec
from subbit.runtime.reference import packed_linear

__all__ = ["PackedModule", "SubbitLinear"]


class PackedModule(nn.Module):
    """A module whose weight exists only in packed form, as the buffers that docs/format.md lists.

    No ``nn.Linear`` or ``nn.Embedding``: model code that initializes weights must not find one here.
    """

    def __init__(self, spec: LinearSpec, device: str | None = None) -> None:
        super().__init__()
        self.spec = spec
        for name, (shape, dtype) in spec.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: self.get_buffer(name) for name in self.spec.tensors()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Casting a model to another dtype must not round the scales: they are what the file says, in float16.
        kept = self.packed()
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self


class SubbitLinear(PackedModule):
    """A linear with a packed weight."""

    def __init__(self, spec: LinearSpec, bias: nn.Parameter | None = None, device: str | None = None) -> None:
        super().__init__(spec, device)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) → (..., out), dtype of ``inputs``."""
        return packed_linear(inputs, self.spec, self.packed(), self._parameters["bias"])

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.spec.label}, bias={self.bias is not None}"
