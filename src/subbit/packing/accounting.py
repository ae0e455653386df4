"""Counting bits: the nominal ones of the papers, those stored for the linears, and those of the whole file."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BitCount", "LinearCount"]


@dataclass(frozen=True)
class LinearCount:
    """One linear of a decoder layer, compressed or left dense."""

    weights: int
    bytes: int  # in the file: codes, symbols, scales, bitmaps, padding; the weight alone where it was left dense
    nominal: float  # bits per weight as the papers count: N/M · (1 + share of salient columns)

    @property
    def stored(self) -> float:
        """Bits per weight in the file."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class BitCount:
    """A sum over linears, and the file around them."""

    linear_weights: int
    linear_bytes: int
    nominal: float
    parameters: int  # of the dense model, embeddings included, tied ones once
    file_bytes: int

    @classmethod
    def of(cls, linears: list[LinearCount], parameters: int, file_bytes: int) -> BitCount:
        """Add up; ``nominal`` is weighted by weights."""
        weights = sum(linear.weights for linear in linears)
        nominal = sum(linear.nominal * linear.weights for linear in linears) / max(weights, 1)
        return cls(weights, sum(linear.bytes for linear in linears), nominal, parameters, file_bytes)

    @property
    def stored(self) -> float:
        """Bits per linear weight in the file."""
        return 8 * self.linear_bytes / max(self.linear_weights, 1)

    @property
    def model(self) -> float:
        """Bits per parameter of the whole file."""
        return 8 * self.file_bytes / max(self.parameters, 1)
