"""Sections of results as Markdown: a table for every group, each with what its columns mean and how it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from subbit.comparison.recorded import in_order
from subbit.comparison.rows import Measured, Row, Section

__all__ = ["change", "markdown", "short"]

LEGEND = (
    "*Nominal* bits are those of the papers, N/M · (1 + share of salient columns); *stored* bits are the bytes in the "
    "file of all that the linears need, per linear weight; *model* bits are the whole file per parameter. "
    "*Output error* is the relative error of a linear's output on the calibration text, the mean over linears. "
    "± is the standard error over evaluation windows."
)


def markdown(sections: Sequence[Section]) -> str:
    """All tables, then what failed."""
    parts = [LEGEND]
    for section in sections:
        parts.append(f"## {section.model}\n\n{notes(section)}")
        parts += [part for group in section.groups for part in (table(section, group), measurements(section, group))]
        failed = dict.fromkeys(f"- {row.name}: {row.error}" for row in section.rows if row.error)
        if failed:
            parts.append("Failed:\n\n" + "\n".join(failed))
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(section: Section) -> str:
    """How the numbers of a section were measured."""
    texts = list(dict.fromkeys(row.calibration for row in section.rows if row.calibration))
    calibration = f"Calibration: {' · '.join(texts)}." if len(texts) <= 3 else "Calibration differs between the rows."
    seeds = max((m.seeds for row in section.rows for m in row.perplexity.values()), default=1)
    merged = " Perplexities of several seeds: geometric mean, lowest and highest." if seeds > 1 else ""
    measured = f"Perplexity: {section.measured}. " if section.protocol else ""
    apart = " Each perplexity column is one way of measuring: compare down a column only."
    several = apart if section.protocol is None and len(section.datasets) > 1 else ""
    return f"{measured}{calibration}{merged}{several}"


def table(section: Section, group: str) -> str:
    """The rows of a group; ablations are related to their baseline."""
    rows = [row for row in section.rows if row.group == group and row.error is None]
    if not rows:
        return ""
    datasets = [name for name in section.datasets if any(name in row.perplexity for row in rows)]
    ablations = any(row.baseline for row in rows)
    head = [group, "nominal bits", "stored bits", "model bits", "weight files, MB", "output error"]
    for dataset in datasets:
        head += [f"perplexity, {dataset}"] + (["against the baseline"] if ablations else [])
    costs = any(row.compress_seconds is not None for row in rows)  # a sweep measures them
    head += ["compressing, min", "peak memory, GB"] if costs else []
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [cells(section, row, datasets, ablations)[: len(head)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(section: Section, row: Row, datasets: Sequence[str], ablations: bool) -> list[str]:
    """One line of a table."""
    bits = row.bits or {}
    line = [f"**{row.name}**" if ablations and not row.baseline else row.name]
    line += [number(bits.get(kind), ".0f" if row.dense else ".3f") for kind in ("nominal", "stored", "model")]
    line += [number(row.file_bytes, ".1f", 1e-6), number(row.output_error, ".4f")]
    for dataset in datasets:
        line.append(perplexity(row.perplexity.get(dataset)))
        if ablations:
            line.append(relative(row, section.baseline(row), dataset))
    return [*line, number(row.compress_seconds, ".1f", 1 / 60), number(row.peak_bytes, ".2f", 1e-9)]


def measurements(section: Section, group: str) -> str:
    """What else was measured of the rows of a group: a line for every way of measuring, so that none are mixed."""
    rows = [row for row in section.rows if row.group == group and row.error is None and row.others]
    if not rows:
        return ""
    names = in_order(name for row in rows for name in row.others)
    lines = [["measured", *(row.name for row in rows)], ["---", *["---:"] * len(rows)]]
    lines += [[name, *(row.others.get(name, "–") for row in rows)] for name in names]
    listed = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Each line is one way of measuring; –: not measured in this way. ± is the standard error.\n\n{listed}"


def number(value: float | None, style: str, factor: float = 1.0) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value * factor, style)


def perplexity(measured: Measured | None) -> str:
    """With its standard error and, of several seeds, the range."""
    if measured is None:
        return "–"
    spread = ""
    if measured.seeds > 1:
        spread = f" ({short(measured.lowest)} … {short(measured.highest)}, {measured.seeds} seeds)"
    error = "" if measured.standard_error is None else f" ± {short(measured.standard_error, measured.value)}"
    return f"{short(measured.value)}{error}{spread}"


def relative(row: Row, baseline: Row | None, dataset: str) -> str:
    """A row's perplexity against that of its baseline."""
    if baseline is None or dataset not in row.perplexity or dataset not in baseline.perplexity:
        return "–"
    ratio = row.perplexity[dataset].value / baseline.perplexity[dataset].value
    return change(ratio) if math.isfinite(ratio) else "–"


def change(ratio: float) -> str:
    """A ratio as people say it: ``+12 %``, or ``3.4 ×`` from twice as much on."""
    if ratio >= 2:
        return f"{ratio:,.1f} ×"
    percent = 100 * (ratio - 1)
    sign = "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.{1 if abs(percent) < 10 else 0}f} %"


def short(value: float, scale: float | None = None) -> str:
    """Three or four digits that mean something; ``scale`` is the number that it stands behind."""
    size = abs(scale if scale is not None else value)
    if math.isinf(size):
        return "∞"
    if size >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.{2 if size < 100 else 1 if size < 1000 else 0}f}"
