"""evaluation.json: what was measured of a checkpoint, beside its weights, for the report and the model card.

    {"subbit_evaluation": 1, "measurements": [{"kind": "perplexity", "protocol": {…}, "values": {…}}, …]}

The protocol is everything that a number depends on beside the checkpoint: text, windows, dtype, the reference model. A
measurement with the kind and protocol of an earlier one takes its place; the newest stands last.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subbit.checkpoint.files import write_json
from subbit.errors import UserError

__all__ = [
    "EVALUATION_FILE",
    "Measurement",
    "measurements_of",
    "plain",
    "read_evaluations",
    "record_evaluation",
    "speed_of",
]

EVALUATION_FILE = "evaluation.json"
VERSION = 1
# What was measured, or does not change what is measured; all other fields of a result are its protocol.
VALUES: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("value", "standard_error", "nll", "seconds"),
    "divergence": (
        "mean",
        "standard_error",
        "median",
        "p99",
        "maximum",
        "top1",
        "top1_standard_error",
        "reference_perplexity",
    ),
    "zero_shot": (
        "accuracy",
        "standard_error",
        "accuracy_norm",
        "standard_error_norm",
        "chance",
        "constant",
        "batch_size",
        "seconds",
    ),
    "speed": (
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "load_seconds",
        "peak_bytes",
        "model_bytes",
        "bytes_per_token",
    ),
}


@dataclass(frozen=True)
class Measurement:
    """Some numbers and how they were measured; both JSON-able. A value that is not finite is None."""

    kind: str  # one of VALUES; a reader may meet others, of a newer subbit
    protocol: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, result: Any, **protocol: Any) -> Measurement:
        """From what an evaluation returned.

        Args:
            kind: one of VALUES, which says which fields were measured.
            result: a dataclass or mapping.
            protocol: what the result does not say of how it was measured.
        """
        fields = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else dict(result)  # type: ignore[arg-type]
        if "dataset" in fields:
            fields["dataset"] = Path(fields["dataset"]).name  # of a text file: no folder, nobody else has it
        how = {key: value for key, value in fields.items() if key not in VALUES[kind]} | protocol
        return cls(kind, plain(how), plain({key: value for key, value in fields.items() if key in VALUES[kind]}))

    def same_protocol(self, other: Measurement) -> bool:
        """Whether one of the two is a repetition of the other."""
        return self.kind == other.kind and dict(self.protocol) == dict(other.protocol)


def plain(value: Any) -> Any:
    """JSON's own types: tuples as lists, numbers that JSON does not have as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def measurements_of(evaluation: Any) -> list[Measurement]:
    """All that :func:`subbit.evaluate_all` measured of a model."""
    results = [
        (kind, result)
        for kind in ("perplexity", "divergence", "zero_shot")
        for result in getattr(evaluation, kind).values()
    ]
    return [Measurement.of(kind, result) for kind, result in results]


def speed_of(bench: Any) -> list[Measurement]:
    """What :func:`subbit.bench` measured of the checkpoint, its last model, with the speed of the dense ones."""
    *dense, packed = bench.models
    if packed.error:
        return []
    machine = bench.environment.get("machine", {})
    protocol = {name: getattr(bench, name) for name in ("prompt_tokens", "new_tokens", "rounds")}
    protocol |= {"dtype": packed.dtype, **{name: machine.get(name) for name in ("processor", "device", "threads")}}
    values = {name: getattr(packed, name) for name in VALUES["speed"]}
    others = {model.dtype: model.decode_tokens_per_second for model in dense if not model.error}
    return [Measurement("speed", plain(protocol), plain({**values, "dense_decode_tokens_per_second": others}))]


def read_evaluations(directory: Path) -> list[Measurement]:
    """What was recorded of a checkpoint, the newest last; nothing where nothing was evaluated.

    Raises:
        UserError: the file is damaged, or a newer subbit wrote it.
    """
    path = directory / EVALUATION_FILE
    if not path.exists():
        return []
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents["subbit_evaluation"]
        listed = contents["measurements"] if version == VERSION else []  # another one may spell them differently
        measured = [Measurement(str(m["kind"]), dict(m["protocol"]), dict(m["values"])) for m in listed]
        good = isinstance(version, int) and all(map(has_numbers, measured))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        version, measured, good = VERSION, [], False
    if not good:
        raise UserError(f"{path} is damaged; delete it and evaluate again")
    if version != VERSION:
        raise UserError(f"{path} was written by another version of subbit (format {version}): pip install -U subbit")
    return measured


def has_numbers(measurement: Measurement) -> bool:
    """Whether the values that this version knows are numbers, or None."""
    known = [measurement.values.get(name) for name in VALUES.get(measurement.kind, ())]
    known.append(measurement.protocol.get("tokens"))
    return all(value is None or isinstance(value, (int, float)) for value in known)


def record_evaluation(directory: Path, measurements: Sequence[Measurement]) -> Path:
    """Add measurements to those of a checkpoint, each in the place of an earlier one of its protocol; atomic.

    Raises:
        UserError: the directory cannot be written, or what is there is damaged.
    """
    kept = read_evaluations(directory)
    for new in measurements:
        kept = [*(old for old in kept if not old.same_protocol(new)), new]
    path = directory / EVALUATION_FILE
    listed = [{"kind": m.kind, "protocol": dict(m.protocol), "values": dict(m.values)} for m in kept]
    write_json(path, {"subbit_evaluation": VERSION, "measurements": listed})
    return path
