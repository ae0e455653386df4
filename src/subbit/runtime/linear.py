"""SubbitLinear, the module that stands where a ``nn.Linear`` stood, and what all packed modules share."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from subbit.packing.codes import CodesSpec
from subbit.packing.grouped import GroupedBinarySpec
from subbit.packing.spec import LinearSpec
from subbit.runtime import native
from subbit.runtime.dispatch import choose
from subbit.runtime.reference import packed_linear

__all__ = ["PackedModule", "SubbitLinear", "unpack_linears"]


PREPARING = Lock()


def codes_spec(spec: LinearSpec) -> CodesSpec:
    """The description of a linear that native kernels run."""
    assert isinstance(spec, CodesSpec)
    return spec


class PackedModule(nn.Module):
    """A module whose weight exists only in packed form, as the buffers that docs/format.md lists.

    No ``nn.Linear`` or ``nn.Embedding``: model code that initializes weights must not find one here.
    """

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, (shape, dtype) in spec.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: self.get_buffer(name) for name in self.spec.tensors()}

    def settle(self, dtype: torch.dtype) -> None:
        """What is done once when a checkpoint was loaded, for inputs of a dtype.

        Raises:
            CheckpointError: the stored tensors hold numbers that no encoder writes.
        """
        self.spec.check(self.packed())

    @property
    def weight_bytes(self) -> int:
        """Bytes in memory of what a product reads."""
        return sum(tensor.nbytes for tensor in self.packed().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Casting a model to another dtype must not round the scales: they are what the file says, in float16.
        kept = PackedModule.packed(self)
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self


class SubbitLinear(PackedModule):
    """A linear with a packed weight.

    When a checkpoint is loaded, or on first use on the CPU, codewords are moved into the order in which the native
    kernels read them. They are then in memory in this order only: the buffer ``codes`` is empty, and whoever asks for
    the stored tensors, by :meth:`packed`, the state dict or a move to another device, gets them rebuilt.
    """

    def __init__(self, spec: LinearSpec, bias: nn.Parameter | None = None) -> None:
        super().__init__(spec)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.register_parameter("bias", bias)
        self._native: native.Product | None = None  # no buffer: nothing may save or cast it

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) → (..., out), dtype of ``inputs``."""
        needs_grad = inputs.requires_grad and torch.is_grad_enabled()
        kept = self._native
        if kept is None or needs_grad or inputs.dtype not in native.DTYPES or self._buffers["codes"].numel():  # type: ignore[union-attr]
            if choose(self.spec, inputs.device.type, inputs.dtype, needs_grad).name != "native":
                return packed_linear(inputs, self.spec, self.packed(), self._parameters["bias"])
            if isinstance(self.spec, GroupedBinarySpec):
                return native.grouped_linear(inputs, self.spec, self.packed(), self._parameters["bias"])
            kept = self.prepare()
        return kept(inputs, self._parameters["bias"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(self) -> native.Product:
        """The weight as the native kernels read it, made if need be; CheckpointError as in :func:`native.repack`."""
        with PREPARING:
            codes = self.get_buffer("codes")
            if self._native is None or codes.numel():
                spec = codes_spec(self.spec)
                self._native = native.Product.of(spec, native.repack(spec, super().packed()))
                self._buffers["codes"] = codes.new_empty(0)
            return self._native

    def settle(self, dtype: torch.dtype) -> None:
        """See :meth:`PackedModule.settle`: :meth:`prepare` where native kernels will run it, which checks as much."""
        device = self.get_buffer("codes").device.type
        if isinstance(self.spec, CodesSpec) and choose(self.spec, device, dtype).name == "native":
            self.prepare()
        else:
            super().settle(dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes in memory of what a product reads."""
        return super().weight_bytes if self._native is None else self._native.packed.nbytes

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        tensors = super().packed()
        if self._native is not None and not tensors["codes"].numel():
            tensors["codes"] = native.stored_codes(codes_spec(self.spec), self._native.packed)
        return tensors

    def release(self) -> None:
        """Have the stored tensors as buffers again, and no others."""
        with PREPARING:
            self._buffers["codes"], self._native = self.packed()["codes"], None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The order of the kernels stays through casts, and through a move to where the linear is already.
        if self._native is not None and fn(self._native.packed.new_empty(0)).device.type != "cpu":
            self.release()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # What is copied or pickled is what is stored: the other side may have no native kernels.
        buffers = {**self._buffers, "codes": self.packed()["codes"]}
        return {**self.__dict__, "_buffers": buffers, "_native": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._native is not None:
            destination[f"{prefix}codes"] = self.packed()["codes"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._native is not None:
            self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.spec.label}, bias={self.bias is not None}"


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the dense matrix of every packed linear in its place: the same numbers up to rounding, in one product."""
    for name, module in list(model.named_modules()):
        if type(module) is SubbitLinear:
            with torch.device("meta"):
                dense = nn.Linear(module.in_features, module.out_features, bias=False)
            weight = module.spec.decode_rows(module.packed()).to(dtype)
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.register_parameter("bias", module._parameters["bias"])
            model.set_submodule(name, dense)
