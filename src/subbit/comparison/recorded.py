"""Measurements of several checkpoints beside each other: a name for every way of measuring, and numbers as text.

Two measurements have one name only if everything that their numbers depend on is the same; so a column or a line of a
table that has one name as its title never holds numbers that cannot be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from subbit.evaluation.record import Measurement

__all__ = ["in_order", "names_of", "texts_of"]

DIVERGENCE, TOP = "KL divergence, nats a token", "same top token, %"
ACCURACY, NORMALIZED = "accuracy, %", "length-normalized accuracy, %"
ORDER = (DIVERGENCE, TOP, ACCURACY, NORMALIZED)
TEXT = ("dataset", "split", "windows", "seq_len", "stride", "dtype", "origin")
# What a number depends on. Left out is what changes it by rounding only (backend), or not at all.
PROTOCOL: Mapping[str, tuple[str, ...]] = {
    "perplexity": TEXT,
    "divergence": ("reference", *TEXT, "reference_digest"),
    "zero_shot": ("task", "items", "items_in_all", "dtype", "origin", "note", "harness"),
}


def names_of(measurements: Sequence[Measurement]) -> Callable[[Measurement], str]:
    """Names by protocol: short ones, and where different protocols would share one, with the fields that differ.

    Args:
        measurements: of all checkpoints that are compared.
    """
    sharing: dict[str, dict[str, dict[str, Any]]] = {}
    for measurement in measurements:
        protocol = protocol_of(measurement)
        sharing.setdefault(short_name(measurement), {})[json.dumps(protocol)] = protocol
    names = {}
    for name, protocols in sharing.items():
        differing = [
            key
            for key in next(iter(protocols.values()))
            if len({json.dumps(protocol[key]) for protocol in protocols.values()}) > 1
        ]
        for key, protocol in protocols.items():
            names[name, key] = "; ".join([name, *(f"{label(part)}: {protocol[part]}" for part in differing)])
    return lambda measurement: names[short_name(measurement), json.dumps(protocol_of(measurement))]


def protocol_of(measurement: Measurement) -> dict[str, Any]:
    """The fields of its protocol that its numbers depend on."""
    return {key: measurement.protocol.get(key) for key in PROTOCOL.get(measurement.kind, ())}


def label(key: str) -> str:
    """A field in words."""
    return key.replace("_", " ")


def short_name(measurement: Measurement) -> str:
    """What was measured on what, in a few words."""
    how = measurement.protocol
    if measurement.kind == "zero_shot":
        items, of_all = how.get("items", "?"), how.get("items_in_all", "?")
        return f"{how.get('task', '?')} ({items if items == of_all else f'first {items} of {of_all}'} items)"
    text = f"{how.get('dataset', '?')} {how.get('split', '')}".strip()
    size = f"({how.get('windows', '?')} × {how.get('seq_len', '?')} tokens, {how.get('dtype', '?')})"
    dense = f" against {how.get('reference', '?')}" if measurement.kind == "divergence" else ""
    return f"{text} {size}{dense}" if measurement.kind in PROTOCOL else measurement.kind


def texts_of(measurement: Measurement, name: str) -> dict[str, str]:
    """The numbers beside perplexity, each with its standard error; titles begin with what the number is.

    Args:
        name: of the way of measuring.
    """
    values = measurement.values
    if measurement.kind == "divergence":
        return {
            f"{DIVERGENCE}, {name}": with_error(values, "mean", "standard_error", 1, 3),
            f"{TOP}, {name}": with_error(values, "top1", "top1_standard_error", 100, 1),
        }
    if measurement.kind == "zero_shot":
        chance = values.get("chance")
        guessing = "" if chance is None else f", guessing {100 * chance:.1f}"
        texts = {f"{ACCURACY}, {name}{guessing}": with_error(values, "accuracy", "standard_error", 100, 1)}
        if values.get("accuracy_norm") is not None:
            normalized = with_error(values, "accuracy_norm", "standard_error_norm", 100, 1)
            texts[f"{NORMALIZED}, {name}{guessing}"] = normalized
        return texts
    return {}


def in_order(titles: Iterable[str]) -> list[str]:
    """Titles of :func:`texts_of`, each once, those of one kind of number together."""
    return sorted(
        dict.fromkeys(titles), key=lambda title: next(n for n, kind in enumerate(ORDER) if title.startswith(kind))
    )


def with_error(values: Mapping[str, Any], value: str, error: str, factor: float, digits: int) -> str:
    """A number with its standard error."""
    found, spread = values.get(value), values.get(error)
    if found is None:
        return "–"
    return f"{factor * found:.{digits}f}" + ("" if spread is None else f" ± {factor * spread:.{digits}f}")
