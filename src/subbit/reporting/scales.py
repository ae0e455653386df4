"""How the scales of a checkpoint are distributed: counts of their magnitudes in narrow bins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from subbit.checkpoint.reader import Checkpoint
from subbit.linears import scale_slots
from subbit.packing.embedding import EmbeddingSpec
from subbit.packing.layout import CodesSpec, GroupedBinarySpec, UniformSpec
from subbit.packing.spec import LinearSpec

__all__ = ["BINS_PER_OCTAVE", "LOWEST", "ScaleGroup", "read_scales"]

LOWEST, HIGHEST = -24, 16  # float16 holds magnitudes from 2^-24 to 2^16
BINS_PER_OCTAVE = 16
BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE
ROWS = 512  # of a linear that are read at most, in a few slices: a report of a large model takes seconds as well
SLICES = 8

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ScaleGroup:
    """The magnitudes of the scales of one role in the linears of one kind."""

    role: str  # "scale of a row"
    kind: str  # "self_attn.q_proj"
    counts: tuple[int, ...]  # in bin b: 2^(LOWEST + b / BINS_PER_OCTAVE) and up, to the next
    zeros: int

    @property
    def total(self) -> int:
        """Of all but the zeros."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The magnitude below which a share of the scales lies, to within half a bin (2 %)."""
        number = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        return float(2 ** (LOWEST + (min(number, BINS - 1) + 0.5) / BINS_PER_OCTAVE))


def read_scales(checkpoint: Checkpoint, kind_of: Callable[[str], str]) -> tuple[ScaleGroup, ...]:
    """The scales of every linear and packed embedding, by role and kind; of tall matrices 512 rows.

    Args:
        kind_of: what linears have in common that are shown as one.
    """
    counts: dict[tuple[str, str], Counts] = {}
    zeros: dict[tuple[str, str], int] = {}
    specs: dict[str, LinearSpec] = {**checkpoint.specs, **checkpoint.embeddings.specs}
    for file in checkpoint.files:
        here = {name: spec for name, spec in specs.items() if file_of(checkpoint, name, spec) == file}
        if not here:
            continue
        with safe_open(checkpoint.directory / file, "pt") as stored:
            for name, spec in here.items():
                for role, values in roles(spec, partial(some_rows, stored, name)):
                    place = role, kind_of(name)
                    found, empty = count(values)
                    counts[place] = counts.get(place, 0) + found
                    zeros[place] = zeros.get(place, 0) + empty
    return tuple(ScaleGroup(*place, tuple(found.tolist()), zeros[place]) for place, found in counts.items())


def file_of(checkpoint: Checkpoint, name: str, spec: LinearSpec) -> str:
    """Where a linear's scales lie; all its tensors are in one file wherever subbit or transformers wrote them."""
    key = "row_scales" if isinstance(spec, CodesSpec) else "scales"
    return checkpoint.tensors[f"{name}.{key}"].file


def some_rows(file: Any, name: str, key: str) -> Tensor:
    """Rows of a stored tensor of a linear, evenly spread if it has more than ``ROWS`` of them."""
    stored = file.get_slice(f"{name}.{key}")
    count = stored.get_shape()[0]
    starts = [0] if count <= ROWS else [count * part // SLICES for part in range(SLICES)]
    return torch.cat([stored[start : start + ROWS // len(starts)] for start in starts])


def roles(spec: LinearSpec, read: Callable[[str], Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The float16 numbers of a linear by what they do; ``read`` gives a stored tensor by its short name."""
    if isinstance(spec, CodesSpec):
        yield "scale of a row", read("row_scales")
    elif isinstance(spec, UniformSpec):
        yield "step of a (row, group)", read("scales")[..., 1]
    elif isinstance(spec, EmbeddingSpec):
        yield "step of a (row, group) of an embedding", read("scales")
    elif isinstance(spec, GroupedBinarySpec):
        yield from grouped_roles(spec, read("scales"))
    if getattr(spec, "has_column_scales", False):
        yield "scale of a column", read("column_scales")


def grouped_roles(spec: GroupedBinarySpec, scales: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Those of ``grouped_binary``, in the order of docs/format.md: shifts, scales, and the salient columns' own."""
    slots = scale_slots(spec.regions, spec.scale_count)
    stored = slots if spec.has_column_scales else list(range(spec.scale_count))
    of_salient = slots[spec.regions :]
    parts = {
        "scale α of a (row, block, region)": slots[: spec.regions],
        "shift μ of a (row, block, region)": [slot for slot in range(spec.scale_count) if slot not in slots],
        "scale α of salient columns": of_salient[::2],
        "residual scale β of salient columns": of_salient[1::2],
    }
    for role, wanted in parts.items():
        places = [stored.index(slot) for slot in wanted if slot in stored]
        if places:
            yield role, scales[..., places]


def count(values: Tensor) -> tuple[Counts, int]:
    """How many magnitudes fall into each bin, and how many are zero."""
    magnitudes = values.float().abs().flatten().numpy()
    above = magnitudes[magnitudes > 0]
    places = np.floor((np.log2(above) - LOWEST) * BINS_PER_OCTAVE).astype(np.int64)
    return np.bincount(places.clip(0, BINS - 1), minlength=BINS), int(magnitudes.size - above.size)
