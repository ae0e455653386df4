"""What a report shows, gathered from the files of a checkpoint: no model is loaded, no weight is decoded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from subbit.checkpoint.files import LOG_FILE, RECIPE_FILE
from subbit.checkpoint.reader import Checkpoint, open_checkpoint
from subbit.evaluation.record import Measurement, read_evaluations
from subbit.loading import describe_checkpoint, layer_of
from subbit.models.layout import ExpertName
from subbit.reporting.scales import ScaleGroup, read_scales

__all__ = ["Facts", "Grid", "KeptDense", "LinearFacts", "Part", "Tuning", "read_facts"]

DENSE = "dense"


@dataclass(frozen=True)
class LinearFacts:
    """One linear of a decoder layer."""

    name: str
    layer: str  # its number
    kind: str  # "self_attn.q_proj"; all experts of a layer are one kind, "mlp.experts.*.up_proj"
    label: str  # "4:8", "3 bits", or dense
    weights: int
    bytes: int
    nominal: float | None  # bits, without the residuals of salient columns; None where dense
    error: float | None  # relative squared error of its output on the calibration text
    token_peak: float | None  # of its input: the largest token norm over the median one
    channel_peak: float | None  # the largest channel energy over the median one


@dataclass(frozen=True)
class Grid:
    """Numbers over decoder layers (rows) and kinds of linears (columns); None where there is nothing to say."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]  # what stands in the cells
    notes: tuple[tuple[str, ...], ...]  # what a cell says at length

    @property
    def known(self) -> list[float]:
        """All numbers there are."""
        return [value for row in self.values for value in row if value is not None]


@dataclass(frozen=True)
class Part:
    """A share of the weight files."""

    name: str
    bytes: int


@dataclass(frozen=True)
class KeptDense:
    """Tensors that were not compressed."""

    name: str  # numbers of layers and experts as *
    count: int  # tensors
    bytes: int
    reason: str


@dataclass(frozen=True)
class Tuning:
    """What tuning a decoder layer against the dense one did to the error of its output."""

    layer: str
    before: float
    after: float


@dataclass(frozen=True)
class Facts:
    """All that a report and a model card show of a checkpoint, but for text that models generate."""

    name: str
    model_type: str
    dtype: str  # of what is dense, and of the model before
    method: str
    sparsity: str
    calibration: str | None
    bits: Mapping[str, float]  # nominal, stored, model
    parameters: int
    linear_weights: int
    file_bytes: int
    parts: tuple[Part, ...]
    linears: tuple[LinearFacts, ...]
    dense: tuple[KeptDense, ...]
    tuning: tuple[Tuning, ...]
    distillation: Mapping[str, float] | None  # divergence before and after, nats a token
    scales: tuple[ScaleGroup, ...]
    measurements: tuple[Measurement, ...]  # the newest last
    backends: Mapping[str, str]  # label of a linear → what multiplies with it on a CPU
    recipe: str | None  # YAML
    seconds: float | None  # that compressing the decoder layers took

    @property
    def dense_bytes(self) -> int:
        """Of all parameters in their dtype before compression."""
        return self.parameters * getattr(torch, self.dtype).itemsize

    @property
    def errors(self) -> Grid:
        """Relative output error of every linear; the mean over the experts of a layer."""
        return self.grid(lambda linear: linear.error, lambda value, _: two_digits(value))

    @property
    def allocation(self) -> Grid:
        """Nominal bits of every linear, N/M where weights are pruned; the text says N:M."""
        return self.grid(lambda linear: linear.nominal, lambda _, members: " ".join(labels_of(members)))

    def grid(
        self,
        measure: Callable[[LinearFacts], float | None],
        write: Callable[[float, Sequence[LinearFacts]], str],
    ) -> Grid:
        """A number for every layer and kind of linear.

        Args:
            measure: of one linear.
            write: the text of a cell, from the mean over its linears and these.
        """
        cells: dict[tuple[str, str], list[LinearFacts]] = {}
        for linear in self.linears:
            cells.setdefault((linear.layer, linear.kind), []).append(linear)
        rows = tuple(dict.fromkeys(linear.layer for linear in self.linears))
        columns = tuple(dict.fromkeys(linear.kind for linear in self.linears))
        values, texts, notes = [], [], []
        for row in rows:
            line = [cells.get((row, column), []) for column in columns]
            means = [mean([measure(linear) for linear in members]) for members in line]
            values.append(tuple(means))
            texts.append(tuple(cell_text(value, members, write) for value, members in zip(means, line, strict=True)))
            notes.append(tuple("; ".join(describe(members)) for members in line))
        return Grid(rows, columns, tuple(values), tuple(texts), tuple(notes))


def two_digits(value: float) -> str:
    """0.31, 0.30, 0.052."""
    return f"{value:.2f}" if value >= 0.0995 else f"{value:#.2g}"


def cell_text(
    value: float | None, members: Sequence[LinearFacts], write: Callable[[float, Sequence[LinearFacts]], str]
) -> str:
    """What stands in a cell: its number, that its linears are dense, or nothing."""
    if value is not None:
        return write(value, members)
    return DENSE if members and all(linear.label == DENSE for linear in members) else ""


def labels_of(members: Sequence[LinearFacts]) -> list[str]:
    """The N:M of some linears, each once."""
    return list(dict.fromkeys(linear.label for linear in members))


def describe(members: Sequence[LinearFacts]) -> list[str]:
    """What one cell says at length: of one linear, or of all experts of a layer."""
    if not members:
        return []
    first = members[0]
    name = first.name if len(members) == 1 else f"layer {first.layer}, {first.kind}, {len(members)} experts"
    errors = [linear.error for linear in members if linear.error is not None]
    lines = [name, ", ".join(labels_of(members))]
    if errors:
        spread = "" if len(errors) == 1 else f" on average, {min(errors):.4g} to {max(errors):.4g}"
        lines.append(f"output error {sum(errors) / len(errors):.4g}{spread}")
    weights, size = sum(linear.weights for linear in members), sum(linear.bytes for linear in members)
    return [*lines, f"{8 * size / weights:.3f} stored bits"]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_facts(directory: str | Path) -> Facts:
    """Everything that the files of a finished checkpoint say.

    Raises:
        CheckpointError: no, an unfinished or a damaged checkpoint.
        UserError: a damaged evaluation.json.
    """
    checkpoint = open_checkpoint(directory)
    measurements = read_evaluations(checkpoint.directory)
    facts = facts_of(checkpoint, measurements)
    order = list(dict.fromkeys(linear.kind for linear in facts.linears))
    scales = sorted(read_scales(checkpoint, kind_of), key=lambda group: place_in(order, group.kind))
    return replace(facts, scales=tuple(scales))


def facts_of(checkpoint: Checkpoint, measurements: Sequence[Measurement] = ()) -> Facts:
    """What a report shows of a checkpoint that is open, without its scales: these would have to be read."""
    described = describe_checkpoint(checkpoint)
    manifest, recipe = checkpoint.manifest, checkpoint.directory / RECIPE_FILE
    return Facts(
        name=checkpoint.directory.resolve().name,
        model_type=str(checkpoint.config.get("model_type", "")),
        dtype=dtype_of(checkpoint.config),
        method=described["method"],
        sparsity=described["sparsity"],
        calibration=described["calibration"],
        bits=described["bits"],
        parameters=described["parameters"],
        linear_weights=described["linear_weights"],
        file_bytes=described["file_bytes"],
        parts=parts_of(described),
        linears=linears_of(checkpoint, described),
        dense=kept_dense(checkpoint, described),
        tuning=tuning_of(manifest),
        distillation=manifest.get("distillation"),
        scales=(),
        measurements=tuple(measurements),
        backends=described["backends"],
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else None,
        seconds=seconds_of(checkpoint.directory / LOG_FILE),
    )


def dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype of what is not compressed, as torch calls it."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if isinstance(getattr(torch, name, None), torch.dtype) else "float32"


def parts_of(described: Mapping[str, Any]) -> tuple[Part, ...]:
    """What the weight files consist of; empty parts are left out."""
    packed = bool(described["embedding_bytes"])
    parts = (
        Part("linears of the decoder layers", described["linear_bytes"]),
        Part("packed embeddings and head", described["embedding_bytes"]),
        Part("norms, biases, others" if packed else "embeddings, head, norms, biases", described["dense_bytes"]),
        Part("headers", described["header_bytes"]),
    )
    return tuple(part for part in parts if part.bytes)


def linears_of(checkpoint: Checkpoint, described: Mapping[str, Any]) -> tuple[LinearFacts, ...]:
    """Every linear of the decoder layers, compressed or left dense."""
    recorded = {
        name: facts for layer in checkpoint.manifest.get("layers", []) for name, facts in layer["linears"].items()
    }
    linears = []
    order = list(dict.fromkeys(map(kind_of, recorded)))  # as in the model; config.json is alphabetical
    for layer in described["layers"]:
        for linear in sorted(layer["linears"], key=lambda linear: place_in(order, kind_of(linear["name"]))):
            name = linear["name"]
            spec, peaks = checkpoint.specs.get(name), recorded.get(name, {}).get("outliers") or {}
            linears.append(
                LinearFacts(
                    name=name,
                    layer=layer_of(name).rpartition(".")[2],
                    kind=kind_of(name),
                    label=linear["sparsity"],
                    weights=linear["weights"],
                    bytes=linear["bytes"],
                    nominal=spec.nominal() if spec else None,
                    error=linear["error"],
                    token_peak=peaks.get("token"),
                    channel_peak=peaks.get("channel"),
                )
            )
    return tuple(linears)


def place_in(order: Sequence[str], kind: str) -> int:
    """Where a kind stands; unknown ones last."""
    return order.index(kind) if kind in order else len(order)


def kind_of(name: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``; the experts of a layer are of one kind."""
    expert = ExpertName.parse(name)
    prefix = layer_of(name) + "."
    return (f"{expert.experts}.*.{expert.projection}" if expert else name).removeprefix(prefix)


def kept_dense(checkpoint: Checkpoint, described: Mapping[str, Any]) -> tuple[KeptDense, ...]:
    """What is stored as it was, and why; tensors that differ only in numbers are one entry."""
    reasons = dict(described["left_dense"])
    reasons |= {name: e["left_dense"] for name, e in described["embeddings"].items() if "left_dense" in e}
    specs = {**checkpoint.specs, **checkpoint.embeddings.specs}
    packed = {f"{name}.{key}" for name, spec in specs.items() for key in spec.tensors()}
    found: dict[tuple[str, str], list[int]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in packed:
            reason = reasons.get(name) or reasons.get(name.removesuffix(".weight"))
            reason = reason or usual_reason(checkpoint, len(tensor.shape))
            shown = "norms and biases" if len(tensor.shape) < 2 else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            found.setdefault((shown, reason), []).append(tensor.bytes)
    kept = [KeptDense(name, len(sizes), sum(sizes), reason) for (name, reason), sizes in found.items()]
    return tuple(sorted(kept, key=lambda entry: (-entry.bytes, entry.name)))


def usual_reason(checkpoint: Checkpoint, dimensions: int) -> str:
    """Why a tensor is dense of which the checkpoint says nothing."""
    if dimensions < 2:
        return "a few numbers each, which all others depend on"
    if checkpoint.embeddings.specs:
        return "no linear of a decoder layer"
    return "no linear of a decoder layer; --embeddings 8bit or 4bit packs the input embedding and the head"


def tuning_of(manifest: Mapping[str, Any]) -> tuple[Tuning, ...]:
    """The layers that were tuned against the dense ones."""
    layers = enumerate(manifest.get("layers", []))
    done = [(str(number), layer["reconstruction"]) for number, layer in layers if "reconstruction" in layer]
    return tuple(Tuning(number, facts["before"], facts["after"]) for number, facts in done)


def seconds_of(log: Path) -> float | None:
    """Wall time of the decoder layers, added up; None without a log, which does not travel with a checkpoint."""
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        taken = {line["index"]: float(line["seconds"]) for line in lines if line["event"] == "layer"}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return math.fsum(taken.values()) or None
