"""Results as rows: what a table and a figure show, seeds merged."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from subbit.comparison.entries import DENSE, without_later
from subbit.comparison.recorded import names_of, texts_of
from subbit.comparison.results import DONE, read_results
from subbit.comparison.tasks import facts_file, read_facts
from subbit.errors import UserError
from subbit.evaluation.record import Measurement, read_evaluations
from subbit.loading import inspect

__all__ = ["Measured", "Row", "Section", "read_sections"]


@dataclass(frozen=True)
class Measured:
    """Perplexity of a row on one data set. Over several seeds: the geometric mean, and the lowest and the highest."""

    value: float
    standard_error: float | None  # over windows
    lowest: float
    highest: float
    seeds: int
    windows: int

    @classmethod
    def of(cls, runs: Sequence[dict[str, Any]]) -> Measured:
        """From what was measured with each seed; all on the same text."""
        values = [safe_exp(run["nll"]) for run in runs]
        value = safe_exp(statistics.fmean(run["nll"] for run in runs))
        relative = [run["standard_error"] / run["value"] for run in runs if run["standard_error"] and run["value"]]
        error = value * statistics.fmean(relative) if len(relative) == len(runs) else None
        return cls(value, error, min(values), max(values), len(runs), runs[0]["windows"])

    @classmethod
    def recorded(cls, measurement: Measurement) -> Measured:
        """From what an evaluation left beside a checkpoint; JSON has no infinity, None stands for it."""
        values = measurement.values
        value = math.inf if values.get("value") is None else float(values["value"])
        return cls(value, values.get("standard_error"), value, value, 1, measurement.protocol.get("windows", 0))


@dataclass(frozen=True)
class Row:
    """One recipe, or one checkpoint, as a reader sees it."""

    group: str
    series: str
    label: str
    baseline: str | None
    method: str
    bits: dict[str, float] | None  # nominal, stored, model
    file_bytes: int | None
    output_error: float | None  # mean over linears
    perplexity: dict[str, Measured]  # by data set
    compress_seconds: float | None
    peak_bytes: int | None  # of compressing
    calibration: str
    error: str | None = None  # why there is no more
    others: dict[str, str] = field(
        default_factory=dict
    )  # KL divergence, accuracies: what was measured, how → the number

    @property
    def name(self) -> str:
        """In a table."""
        return f"{self.series} {self.label}".strip()

    @property
    def dense(self) -> bool:
        """Whether this is the model before it was compressed."""
        return self.method == DENSE


@dataclass(frozen=True)
class Section:
    """Rows that can be compared: one model, one way of measuring."""

    model: str
    protocol: dict[str, Any] | None  # None: checkpoints that no sweep has evaluated
    rows: list[Row]

    @property
    def datasets(self) -> list[str]:
        """All that any row was evaluated on, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.perplexity))

    @property
    def groups(self) -> list[str]:
        """In the order in which they were first recorded."""
        return list(dict.fromkeys(row.group for row in self.rows))

    @property
    def measured(self) -> str:
        """The protocol in words."""
        if self.protocol is None:
            return "not evaluated"
        windows = self.protocol["max_windows"]
        count = "all windows of the text" if windows is None else f"at most {windows} windows"
        return (
            f"{self.protocol['split']} text, {count} of {self.protocol['seq_len']} tokens without overlap, "
            f"{self.protocol['dtype']}"
        )

    def baseline(self, row: Row) -> Row | None:
        """The row that an ablation is measured against, if it has come out; best the one of the same group."""
        named = [other for other in self.rows if other.name == row.baseline and other.error is None]
        return next((other for other in named if other.group == row.group), next(iter(named), None))


def read_sections(sources: Sequence[Path]) -> list[Section]:
    """Sections of results files and of finished checkpoints; UserError for a path that is neither."""
    results: dict[str, dict[str, Any]] = {}
    checkpoints = []
    for source in sources:
        if source.is_dir():
            checkpoints.append(source)
        elif source.exists():
            results.update({result["key"]: result for result in read_results(source)})
        else:
            raise UserError(f"{source} does not exist; give results of 'subbit sweep', or finished checkpoints")
    sections = sections_of(list(results.values()))
    if checkpoints:
        sections.append(Section("checkpoints", None, checkpoint_rows(checkpoints)))
    if not any(section.rows for section in sections):
        raise UserError(f"there are no results in {', '.join(map(str, sources))} yet")
    return sections


def sections_of(results: Sequence[dict[str, Any]]) -> list[Section]:
    """Results by model and protocol; which data sets were asked for does not part them."""
    parted: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        shared = {name: value for name, value in result["protocol"].items() if name != "datasets"}
        parted.setdefault(json.dumps([result["model"], shared]), []).append(result)
    sections = []
    for key, members in parted.items():
        model, protocol = json.loads(key)
        sections.append(Section(model["name"], protocol, rows_of(members)))
    return sections


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for every place of every recipe, whatever its seed; a result with more data sets wins."""
    merged: dict[str, dict[Any, dict[str, Any]]] = {}
    for result in results:
        for place in result["places"]:
            key = json.dumps([place, without_seed(result["recipe"])])
            by_seed = merged.setdefault(key, {})
            old = by_seed.get(result["seed"])
            by_seed[result["seed"]] = merge_measurements(old, result) if old else result
    return [make_row(json.loads(key)[0], list(by_seed.values())) for key, by_seed in merged.items()]


def without_seed(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """What runs with different seeds have in common, also where an older version recorded some of them."""
    if recipe is None:
        return None
    recipe = without_later(recipe)
    return {**recipe, "calibration": {k: v for k, v in recipe["calibration"].items() if k != "seed"}}


def merge_measurements(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One recipe evaluated in two sweeps on different data sets."""
    best = new if new["status"] == DONE or old["status"] != DONE else old
    return {**best, "perplexity": {**old["perplexity"], **new["perplexity"]}}


def make_row(place: dict[str, Any], results: Sequence[dict[str, Any]]) -> Row:
    """One row of the runs of a recipe with different seeds; failed ones count only if all failed."""
    done = [result for result in results if result["status"] == DONE]
    first = (done or list(results))[0]
    recipe = first["recipe"]
    datasets = dict.fromkeys(name for result in done for name in result["perplexity"])
    row = Row(
        **place,
        method=recipe["method"] if recipe else DENSE,
        bits=first["bits"],
        file_bytes=(first["bytes"] or {}).get("file"),
        output_error=mean([result["output_error"] for result in results]),
        perplexity={},
        compress_seconds=mean([result["seconds"]["compress"] for result in results]),
        peak_bytes=max((p for r in results if (p := r["peak_bytes"]["compress"])), default=None),
        calibration=describe_calibration(recipe),
        error=None if done else first["error"],
    )
    runs = {name: [r["perplexity"][name] for r in done if name in r["perplexity"]] for name in datasets}
    return replace(row, perplexity={name: Measured.of(measured) for name, measured in runs.items()})


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def describe_calibration(recipe: dict[str, Any] | None) -> str:
    """Text and size."""
    if recipe is None:
        return ""
    calibration = recipe["calibration"]
    return f"{Path(calibration['source']).name}, {calibration['samples']} × {calibration['seq_len']} tokens"


def checkpoint_rows(directories: Sequence[Path]) -> list[Row]:
    """Finished checkpoints with what was measured of each; a name of a measurement is the same in all rows.

    A directory that is given twice is one row; two of one name go by their paths.
    """
    once = list({directory.resolve(): directory for directory in directories}.values())
    titles = [directory.resolve().name for directory in once]
    titles = [
        title if titles.count(title) == 1 else str(directory) for title, directory in zip(titles, once, strict=True)
    ]
    measured = [measurements_beside(directory) for directory in once]
    names = names_of([measurement for of_one in measured for measurement in of_one])
    return [checkpoint_row(*row, names) for row in zip(once, titles, measured, strict=True)]


def measurements_beside(directory: Path) -> list[Measurement]:
    """What a sweep with ``keep`` and then ``subbit eval`` left of a checkpoint, the newest last."""
    swept = read_facts(facts_file(directory.resolve())).get("perplexity", {}).values()
    return [*(Measurement.of("perplexity", found) for found in swept), *read_evaluations(directory)]


def checkpoint_row(
    directory: Path, title: str, measurements: Sequence[Measurement], names: Callable[[Measurement], str]
) -> Row:
    """One finished checkpoint.

    Args:
        title: what the row is called.
        measurements: of two that have one name the later counts.
        names: a name for each way of measuring.
    """
    facts = inspect(directory)
    compress = read_facts(facts_file(directory.resolve())).get("compress", {})
    perplexities = {names(m): Measured.recorded(m) for m in measurements if m.kind == "perplexity"}
    errors = [linear["error"] for layer in facts["layers"] for linear in layer["linears"]]
    return Row(
        group="checkpoints",
        series=title,
        label="",
        baseline=None,
        method=facts["method"],
        bits=facts["bits"],
        file_bytes=facts["file_bytes"],
        output_error=mean(errors),
        perplexity=perplexities,
        compress_seconds=compress.get("seconds"),
        peak_bytes=compress.get("peak_bytes"),
        calibration=str(facts["calibration"] or ""),
        others={key: text for m in measurements for key, text in texts_of(m, names(m)).items()},
    )


def safe_exp(nll: float) -> float:
    """Perplexity of an NLL in nats, infinite where it has no place in a float."""
    return math.exp(nll) if nll < 709 else math.inf
