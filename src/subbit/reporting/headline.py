"""Measurements and the headline of a report as a person reads them: a number, what it is, how it was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from subbit.comparison.tables import short
from subbit.evaluation.record import Measurement
from subbit.evaluation.zero_shot import PAPER_TASKS
from subbit.reporting.facts import Facts

__all__ = ["USUAL_DATASET", "Shown", "by_kind", "foremost", "headline", "megabytes", "perplexity_of", "show"]


@dataclass(frozen=True)
class Shown:
    """One number of a checkpoint; ``value`` is None where nobody measured it."""

    title: str
    value: str | None
    note: str


def headline(facts: Facts) -> list[Shown]:
    """What a reader wants first: size, the three kinds of bits, quality, speed; what is missing says how to get it."""
    before, after = facts.dense_bytes, facts.file_bytes
    shown = [
        Shown(
            "weight files",
            megabytes(after),
            f"before {megabytes(before)} ({facts.dtype}), {before / after:.1f}× smaller",
        ),
        Shown("stored bits", f"{facts.bits['stored']:.3f}", "of the file per linear weight, everything counted"),
        Shown("nominal bits", f"{facts.bits['nominal']:.3f}", "as the papers count: no masks, regions or scales"),
        Shown("model bits", f"{facts.bits['model']:.3f}", "of all weight files per parameter, embeddings included"),
    ]
    for kind, (title, command) in MISSING.items():
        of_kind = [measurement for measurement in facts.measurements if measurement.kind == kind]
        if kind == "zero_shot" and of_kind:
            shown.append(show_tasks(of_kind))
        elif of_kind:
            shown.append(show(foremost(of_kind)))
        else:
            shown.append(Shown(title, None, f"run: subbit {command.format(name=facts.name)}"))
    return shown


USUAL_DATASET = "wikitext2"  # what the papers measure on
MISSING = {
    "perplexity": ("perplexity", "eval {name} --perplexity wikitext2"),
    "divergence": ("KL divergence", "eval {name} --reference DENSE"),
    "zero_shot": ("zero-shot accuracy", "eval {name} --tasks all"),
    "speed": ("speed", "bench {name}"),
}


def foremost(measurements: Sequence[Measurement]) -> Measurement:
    """Of several of one kind: on WikiText-2, over the most tokens, the newest; so that no quick look hides the rest."""
    return max(
        reversed(measurements),
        key=lambda m: (m.protocol.get("dataset") == USUAL_DATASET, m.protocol.get("tokens", 0)),
    )


def by_kind(measurements: Sequence[Measurement]) -> list[Measurement]:
    """In the order of the headline, of one kind as they were recorded; unknown kinds last."""
    order = list(MISSING)
    return sorted(measurements, key=lambda m: order.index(m.kind) if m.kind in order else len(order))


def show(measurement: Measurement) -> Shown:
    """A measurement in words; one of a kind that this version does not know as its names and numbers."""
    return SHOWN.get(measurement.kind, show_any)(measurement)


def show_perplexity(measurement: Measurement) -> Shown:
    """With its standard error; the note is the whole protocol."""
    how, values = measurement.protocol, measurement.values
    value = perplexity_of(measurement)
    error = values.get("standard_error")
    spread = "" if error is None else f" ± {short(error, value)}"
    windows = "1 window" if how.get("windows") == 1 else f"{how.get('windows', '?')} windows"
    note = f"{how.get('seq_len', '?')}-token windows, no overlap, {windows}, {how.get('dtype', '?')}"
    title = f"perplexity, {how.get('dataset', '?')} {how.get('split', '')}".strip()
    return Shown(title, f"{short(value)}{spread}", note)


def perplexity_of(measurement: Measurement) -> float:
    """Its value; infinite where JSON has no number for it."""
    value = measurement.values.get("value")
    return math.inf if value is None else float(value)


def show_divergence(measurement: Measurement) -> Shown:
    """The mean over tokens; how often both models put the same token first is in the note."""
    how, values = measurement.protocol, measurement.values
    error = values.get("standard_error")
    spread = "" if error is None else f" ± {error:.2g}"
    top1 = values.get("top1")
    parts = [f"nats a token from {how.get('reference', '?')}, {how.get('dataset', '?')} {how.get('split', '')}".strip()]
    parts += [f"the same first token {top1:.1%} of the time"] if top1 is not None else []
    dense = values.get("reference_perplexity")
    parts += [f"perplexity of the dense model {short(dense)}"] if dense is not None else []
    parts.append(f"{how.get('windows', '?')} × {how.get('seq_len', '?')} tokens, {how.get('dtype', '?')}")
    return Shown("KL divergence", f"{number(values.get('mean'))}{spread}", "; ".join(parts))


def show_accuracy(measurement: Measurement) -> Shown:
    """Of one zero-shot task, with what guessing gives."""
    how, values = measurement.protocol, measurement.values
    norm, chance = values.get("accuracy_norm"), values.get("chance")
    items, of_all = how.get("items", "?"), how.get("items_in_all", "?")
    parts = [f"guessing {chance:.1%}"] if chance is not None else []
    parts += [f"length-normalized {norm:.1%}"] if norm is not None else []
    parts.append(f"{items} items" if items == of_all else f"the first {items} of {of_all} items")
    parts += [str(how[key]) for key in ("note", "harness", "dtype") if how.get(key)]
    value = percent(values.get("accuracy"), values.get("standard_error"))
    return Shown(f"accuracy, {how.get('task', '?')}", value, "; ".join(parts))


def show_tasks(measurements: Sequence[Measurement]) -> Shown:
    """The mean over zero-shot tasks, the newest measurement of each."""
    tasks = {str(m.protocol.get("task", "?")): m for m in measurements}
    papers = all(name in tasks for name in PAPER_TASKS)
    counted = [tasks[name] for name in PAPER_TASKS] if papers else list(tasks.values())
    accuracies = [m.values["accuracy"] for m in counted if m.values.get("accuracy") is not None]
    chances = [chance for m in counted if (chance := m.values.get("chance")) is not None]
    value = percent(statistics.fmean(accuracies) if accuracies else None, None)
    what = (
        "mean of the papers' seven tasks"
        if papers
        else f"mean of {', '.join(tasks)}"
        if len(tasks) > 1
        else next(iter(tasks))
    )
    guessing = f"; guessing {statistics.fmean(chances):.1%}" if len(chances) == len(counted) else ""
    partial = any(m.protocol.get("items") != m.protocol.get("items_in_all") for m in counted)
    return Shown("zero-shot accuracy", value, what + guessing + ("; of the first items only" if partial else ""))


def percent(value: float | None, error: float | None) -> str:
    """A share, with its standard error."""
    return "–" if value is None else f"{value:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")


def show_speed(measurement: Measurement) -> Shown:
    """Of decoding; that of reading a prompt, and of the dense model, is in the note."""
    how, values = measurement.protocol, measurement.values
    prompt, new = how.get("prompt_tokens", "?"), how.get("new_tokens", "?")
    parts = [f"writing {new} tokens after {prompt}, batch 1"]
    parts.append(f"{number(values.get('prompt_tokens_per_second'))} tokens/s reading")
    dense = values.get("dense_decode_tokens_per_second") or {}
    parts += [f"dense {dtype} {number(speed)} tokens/s writing" for dtype, speed in dense.items()]
    parts += [str(how[key]) for key in ("dtype", "processor") if how.get(key)]
    parts += ["1 thread" if how["threads"] == 1 else f"{how['threads']} threads"] if how.get("threads") else []
    return Shown("speed", f"{number(values.get('decode_tokens_per_second'))} tokens/s", "; ".join(parts))


def show_any(measurement: Measurement) -> Shown:
    """Names and numbers as they stand."""
    value = ", ".join(f"{key} {number(value)}" for key, value in flat(measurement.values).items())
    note = ", ".join(f"{key} {value}" for key, value in flat(measurement.protocol).items())
    return Shown(measurement.kind.replace("_", " "), value, note)


SHOWN: Mapping[str, Callable[[Measurement], Shown]] = {
    "perplexity": show_perplexity,
    "divergence": show_divergence,
    "zero_shot": show_accuracy,
    "speed": show_speed,
}


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, names joined by dots."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def number(value: object) -> str:
    """A number to four digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(number(item) for item in value)
    return "–" if value is None else str(value)


def megabytes(size: int) -> str:
    """Bytes as people say them, in powers of ten."""
    return (
        f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    )
