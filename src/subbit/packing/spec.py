"""What every packed form of a linear can say of itself; one subclass a type of linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from subbit.errors import CheckpointError
from subbit.linears import CompressedLinear

__all__ = ["LinearSpec", "Shapes"]

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class LinearSpec(ABC):
    """All that is needed to read the packed tensors of one compressed linear."""

    kind: ClassVar[str]  # the word in config.json
    column_tensors: ClassVar[frozenset[str]] = frozenset()  # names of tensors that all rows share

    out_features: int
    in_features: int

    @property
    @abstractmethod
    def label(self) -> str:
        """What a table calls it: ``4:8``, ``3 bits``."""

    @abstractmethod
    def nominal(self, salient_share: float = 0.0) -> float:
        """Bits per weight as the papers count them: no masks, regions or scales."""

    @abstractmethod
    def tensors(self) -> Shapes:
        """Name → (shape, dtype) of every stored tensor."""

    @abstractmethod
    def decode_rows(self, tensors: dict[str, Tensor]) -> Tensor:
        """(rows, in) float32: the dense weights of the rows in ``tensors``, which may hold a slice of all rows.

        Equal, bit for bit, to the same rows of the linear's ``dense()``.
        """

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor]) -> CompressedLinear:
        """The linear; CheckpointError for contents that no encoder writes."""

    def check(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 (where every number is in its table)
        """CheckpointError for numbers outside of their tables that no encoder writes; nothing is decoded for it.

        What remains, a symbol that its column cannot have, :meth:`unpack` and :meth:`decode_rows` find.
        """

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())

    def row_slice(self, tensors: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The stored tensors of some rows."""
        return {name: tensor if name in self.column_tensors else tensor[rows] for name, tensor in tensors.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` reads it."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """CheckpointError for another kind, or for fields that this version does not know."""
        if values.get("kind") != cls.kind:
            raise CheckpointError(f"a linear of kind {values.get('kind')!r} is unknown to this version; upgrade subbit")
        try:
            return cls(**{key: value for key, value in values.items() if key != "kind"})
        except TypeError as error:
            raise CheckpointError(f"the description of a linear does not fit this version of subbit: {error}") from None
