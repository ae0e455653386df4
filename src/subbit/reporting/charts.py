"""The figures of a report: what each shows, drawn with svg.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from subbit.comparison.figures import Point, published_points, series_of
from subbit.comparison.published import read_published
from subbit.comparison.tables import short
from subbit.evaluation.record import Measurement
from subbit.reporting.facts import Facts, Grid
from subbit.reporting.headline import USUAL_DATASET, foremost, perplexity_of
from subbit.reporting.scales import BINS_PER_OCTAVE, LOWEST, ScaleGroup
from subbit.reporting.svg import WIDTH, Axis, Canvas, Label, Line, Ridge, line_chart, ridges

__all__ = [
    "REFERENCE",
    "HeatMap",
    "InputPeaks",
    "bits_chart",
    "heat_map",
    "input_peaks",
    "peaks_chart",
    "scales_chart",
    "tuning_chart",
]

REFERENCE = "LLaMA-7B"  # the model whose published numbers stand beside those of a checkpoint
STEPS = 8  # of a colour ramp
SERIES = 6  # colours of lines


# ---- perplexity against bits -----------------------------------------------------------------------------------------


def bits_chart(facts: Facts) -> Markup:
    """Perplexity against bits: this checkpoint, and what was published of another model.

    Filled marks stand at stored bits, hollow ones at nominal bits.
    """
    known_here = [m for m in facts.measurements if m.kind == "perplexity" and on_usual(m)]
    measured = foremost(known_here) if known_here else None
    value = perplexity_of(measured) if measured else None
    value = value if value is not None and math.isfinite(value) else None
    published = read_published()
    top = 3 * max(100.0, value or 0)
    points = [point for point in published_points(published, REFERENCE) if point.value <= top]
    bases = {f"{REFERENCE} dense, 16 bits": published["dense"][REFERENCE]}
    own = dense_perplexity(facts.measurements, measured)
    if own is not None:
        bases["this one, dense"] = own
    known = [*(point.value for point in points), *bases.values(), *([value] if value else [])]
    margin = (max(known) / min(known)) ** 0.09  # for labels below the lowest line
    canvas = Canvas(350, "perplexity against bits per linear weight")
    frame = 54.0, 20.0, WIDTH - 6, 306.0
    x = Axis(0, max(4.2, facts.bits["stored"] * 1.1), frame[0], frame[2])
    y = Axis(min(known) / margin, max(known) * margin, frame[3], frame[1], log=True)
    canvas.x_axis(x, frame[3], frame[1], "bits per linear weight")
    canvas.y_axis(y, frame[0], frame[2], "WikiText-2 perplexity (log scale)")
    labels, markers, lines = draw_published(canvas, x, y, points)
    for name, base in bases.items():
        line = [(frame[0], y(base)), (frame[2], y(base))]
        canvas.path(f"line {'own' if base == own else 'faint'} dashed", line)
        labels.append(Label(f"{name}: {short(base)}", frame[0] + 70, y(base), "own" if base == own else "faint"))
        lines.append(line)
    stored, nominal = x(facts.bits["stored"]), x(facts.bits["nominal"])
    if value:
        canvas.path("line own", [(nominal, y(value)), (stored, y(value))])
        canvas.add("circle", "hollow own", cx=nominal, cy=y(value), r=4.5)
        tip = f"{facts.name}: {short(value)} at {facts.bits['stored']:.3f} stored bits"
        canvas.add("circle", "dot own", tip=tip, cx=stored, cy=y(value), r=5.5)
        markers += [(stored, y(value)), (nominal, y(value))]
        labels.insert(0, Label(f"this one: {short(value)}", stored, y(value), "own bold"))
    else:
        lines.append([(stored, frame[1]), (stored, frame[3])])
        canvas.path("line own dashed", lines[-1])
        labels.insert(0, Label("this one: not measured", stored, frame[1] + 20, "own bold"))
    canvas.labels(labels, markers, lines, frame)
    return canvas.markup()


def dense_perplexity(measurements: Sequence[Measurement], measured: Measurement | None) -> float | None:
    """Of the dense model, where the divergence from it was measured on the same windows."""
    how = measured.protocol if measured else {}
    same = [
        m
        for m in measurements
        if m.kind == "divergence"
        and on_usual(m)
        and all(m.protocol.get(k) == how.get(k) for k in ("windows", "seq_len"))
    ]
    return same[-1].values.get("reference_perplexity") if same else None


def on_usual(measurement: Measurement) -> bool:
    """Whether the published numbers can be beside it."""
    return measurement.protocol.get("dataset") == USUAL_DATASET


Places = list[tuple[float, float]]


def draw_published(
    canvas: Canvas, x: Axis, y: Axis, points: Sequence[Point]
) -> tuple[list[Label], Places, list[Places]]:
    """A line a method over nominal bits, and where somebody counted them the stored bits; labels, markers, lines."""
    labels, markers, lines = [], [], []
    for (series, _), members in series_of(points).items():
        line = [(x(point.nominal), y(point.value)) for point in members]
        canvas.path("line faint", line)
        lines.append(line)
        for point, (left, height) in zip(members, line, strict=True):
            tip = f"{series} {point.label}: {short(point.value)} at {point.nominal:g} nominal bits"
            if point.stored:
                canvas.path("line faint dashed", [(left, height), (x(point.stored), height)])
                canvas.add("circle", "dot faint", tip=tip, cx=x(point.stored), cy=height, r=3.5)
                markers.append((x(point.stored), height))
                lines.append([(left, height), (x(point.stored), height)])
            canvas.add("circle", "hollow faint", tip=tip, cx=left, cy=height, r=3.5)
            markers.append((left, height))
        best = min(range(len(members)), key=lambda number: members[number].value)
        labels.append(Label(f"{series} {members[best].label}", *line[best], "faint"))
    return labels, markers, lines


# ---- heat maps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: ``step`` is its place on the colour ramp, None where it has no number."""

    step: int | None
    text: str
    note: str


@dataclass(frozen=True)
class HeatMap:
    """A table to colour."""

    columns: tuple[str, ...]  # as short as they are clear
    full: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    low: str
    high: str


def heat_map(grid: Grid, low: str, high: str) -> HeatMap:
    """Colours for a grid, from its lowest to its highest number.

    Args:
        low: what the key says at its pale end.
        high: and at its deep one.
    """
    known = grid.known
    axis = Axis(min(known), max(known), 0, STEPS) if known else None
    rows = []
    for name, values, texts, notes in zip(grid.rows, grid.values, grid.texts, grid.notes, strict=True):
        steps = [None if v is None or axis is None else step_of(axis, v) for v in values]
        rows.append((name, tuple(Cell(*cell) for cell in zip(steps, texts, notes, strict=True))))
    return HeatMap(short_names(grid.columns), grid.columns, tuple(rows), low, high)


def step_of(axis: Axis, value: float) -> int:
    """The place of a value on the ramp; pale where all values are the same."""
    return min(STEPS - 1, int(axis(value))) if axis.high > axis.low else 1


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Last parts of dotted names where these tell them apart, without an ending that all of them share."""
    last = [name.rpartition(".")[2] for name in names]
    if len(set(last)) < len(last):
        last = [name.removeprefix("mlp.") for name in names]
    if all(name.endswith("_proj") for name in last):
        last = [name.removesuffix("_proj") for name in last]
    return tuple(last)


# ---- layers ----------------------------------------------------------------------------------------------------------


def tuning_chart(facts: Facts) -> Markup:
    """The output error of every decoder layer before and after it was tuned."""
    before = Line("before tuning", [tuning.before for tuning in facts.tuning], "s1 dashed")
    after = Line("after", [tuning.after for tuning in facts.tuning], "s0")
    names = [tuning.layer for tuning in facts.tuning]
    return line_chart([before, after], names, "tuning", "error of the layer's output", log=False)


@dataclass(frozen=True)
class InputPeaks:
    """How far the largest tokens and channels of one kind of input stand out, layer by layer."""

    name: str  # the linears that read it
    tokens: tuple[float | None, ...]
    channels: tuple[float | None, ...]

    @property
    def known(self) -> bool:
        """Whether anything was recorded."""
        return any(value is not None for value in (*self.tokens, *self.channels))


def input_peaks(facts: Facts) -> list[InputPeaks]:
    """By distinct input: linears that read the same have the same numbers. Nothing where nothing was recorded."""
    tokens = facts.grid(lambda linear: linear.token_peak, lambda value, _: "")
    channels = facts.grid(lambda linear: linear.channel_peak, lambda value, _: "")
    readers: dict[tuple[tuple[float | None, ...], ...], list[str]] = {}
    columns = zip(*tokens.values, strict=True), zip(*channels.values, strict=True)
    for name, of_tokens, of_channels in zip(short_names(tokens.columns), *columns, strict=True):
        readers.setdefault((of_tokens, of_channels), []).append(name)
    peaks = [InputPeaks(", ".join(names), *values) for values, names in readers.items()]
    return [peak for peak in peaks if peak.known]


def peaks_chart(facts: Facts, peaks: Sequence[InputPeaks], tokens: bool) -> Markup:
    """Lines over depth, one an input."""
    rows = tuple(dict.fromkeys(linear.layer for linear in facts.linears))
    title = "largest over median token norm" if tokens else "largest over median channel energy"
    lines = [
        Line(peak.name, [above_zero(v) for v in (peak.tokens if tokens else peak.channels)], f"s{number % SERIES}")
        for number, peak in enumerate(peaks)
    ]
    return line_chart(lines, rows, title, f"{title} (log scale)", log=True)


def above_zero(value: float | None) -> float | None:
    """For a logarithmic axis."""
    return value if value is not None and value > 0 else None


# ---- scales ----------------------------------------------------------------------------------------------------------

MERGED = 4  # bins of a quarter of an octave


def scales_chart(groups: Sequence[ScaleGroup], role: str) -> Markup:
    """Histograms of the magnitudes of one role's scales, one a kind of linear; the outermost 0.1 % are left out."""
    shown = [group for group in groups if group.role == role and group.total]
    names = short_names([group.kind for group in shown])
    low = min(group.quantile(0.001) for group in shown)
    high = max(group.quantile(0.999) for group in shown)
    first, last = bin_of(low), bin_of(high) + 1
    edges = [2.0 ** (LOWEST + number * MERGED / BINS_PER_OCTAVE) for number in range(first, last + 1)]
    rows = []
    for group, name in zip(shown, names, strict=True):
        counts = [sum(group.counts[number * MERGED : (number + 1) * MERGED]) for number in range(first, last)]
        low, middle, high = (group.quantile(share) for share in (0.05, 0.5, 0.95))
        tip = f"{group.kind}: median {middle:.3g}, 90 % in {low:.3g} to {high:.3g}"
        rows.append(Ridge(name, [count / group.total for count in counts], middle, tip))
    return ridges(rows, edges, role, "magnitude (log scale)")


def bin_of(value: float) -> int:
    """The merged bin that a magnitude falls into."""
    return int((math.log2(value) - LOWEST) * BINS_PER_OCTAVE) // MERGED
