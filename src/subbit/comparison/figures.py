"""Figures of a comparison: perplexity against bits, and ablations against their baseline. matplotlib is an extra."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subbit.comparison.labels import Label, place_labels
from subbit.comparison.published import read_published
from subbit.comparison.rows import Row, Section
from subbit.comparison.tables import change, short
from subbit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_matplotlib", "draw"]

# Okabe and Ito's palette, which colour-blind people tell apart; one colour a method, in all panels.
COLOURS = {
    "stbllm": "#D55E00",
    "pbs2p": "#0072B2",
    "codes": "#009E73",
    "billm": "#B05A8C",
    "arb": "#C98A00",
    "gptq": "#3FA0D8",
    "rtn": "#8A8A8A",
    "stbllm-as-released": "#222222",
}
OTHER_COLOURS = ("#7A4B12", "#5B5EA6", "#4F6D1F")
MARKERS = "osD^vP"  # series of one method
CEILING = 1e5  # of the perplexity axis: a model beyond it has forgotten all, how much does not matter
FAINT, GRID, TEXT = "#666666", "#E3E3E3", "#222222"


@dataclass(frozen=True)
class Point:
    """One recipe in a figure."""

    series: str
    label: str
    method: str
    value: float  # perplexity or error
    error: float | None
    nominal: float
    stored: float | None


def check_matplotlib() -> None:
    """UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('figures need matplotlib: pip install "subbit[report]"') from None


def draw(sections: Sequence[Section], out: Path, published: Path | None = None) -> list[Path]:
    """Write all figures that the results are enough for, as SVG and PNG.

    Args:
        published: JSON like that of this package (published.py), for a second panel beside the measured points.
    """
    check_matplotlib()
    literature = read_published(published) if published else None
    written = []
    for section, suffix in zip(sections, section_suffixes(sections), strict=True):
        if section.protocol is None and not section.datasets and points_of(section, None):
            written += save(error_figure(section), out / f"output-error{suffix}")
        for dataset in section.datasets:
            name = slug(dataset)
            if points_of(section, dataset):
                written += save(perplexity_figure(section, dataset, literature), out / f"perplexity-{name}{suffix}")
            for group in section.groups:
                if ablations_of(section, group, dataset):
                    figure = ablation_figure(section, group, dataset)
                    written += save(figure, out / f"{slug(group)}-{name}{suffix}")
    return written


def slug(text: str) -> str:
    """A part of a file name."""
    return re.sub(r"\W+", "-", text).strip("-")


def section_suffixes(sections: Sequence[Section]) -> list[str]:
    """Parts of file names that tell sections apart: none for the first."""
    return ["" if number == 0 else f"-{number + 1}" for number in range(len(sections))]


def save(figure: Figure, path: Path) -> list[Path]:
    """SVG and PNG; equal figures give equal files."""
    import matplotlib

    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": "subbit", "svg.fonttype": "none"}):
        figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=160)
    return files


# ---- perplexity against bits -----------------------------------------------------------------------------------------


def points_of(section: Section, dataset: str | None) -> list[Point]:
    """What a section's curve figure shows: no ablations, no dense model; without a data set the output error."""
    points: dict[tuple[str, str], Point] = {}
    for row in section.rows:
        measured = row.perplexity.get(dataset) if dataset else None
        value = measured.value if measured else None if dataset else row.output_error
        if row.dense or row.baseline or row.bits is None or not value or not math.isfinite(value):
            continue
        error = measured.standard_error if measured else None
        nominal, stored = row.bits["nominal"], row.bits["stored"]
        points.setdefault(
            (row.series, row.label), Point(row.series, row.label, row.method, value, error, nominal, stored)
        )
    return list(points.values())


def perplexity_figure(section: Section, dataset: str, published: dict[str, Any] | None) -> Figure:
    """Perplexity against stored bits, the nominal ones marked; beside it what was published."""
    figure = new_figure(13.2 if published else 8.2, 7.4)
    panels = figure.subplots(1, 2 if published else 1, sharex=True, squeeze=False)[0]
    dense = next((row for row in section.rows if row.dense and dataset in row.perplexity), None)
    base = (
        (dense.perplexity[dataset].value, f"dense, {(dense.bits or {}).get('stored', 16):.0f} bits") if dense else None
    )
    label = [curve_panel(panels[0], points_of(section, dataset), base, f"{dataset} perplexity (log scale)")]
    panels[0].set_title(f"Measured: {section.model}", **TITLE)
    if published:
        model, other = "LLaMA-7B", "LLaMA-65B"
        base = (published["dense"][model], f"{model}, dense, 16 bits")
        points = published_points(published, model)
        label.append(curve_panel(panels[1], points, base, "wikitext2 perplexity (log scale)", over_stored=False))
        faint_points(panels[1], published_points(published, other))
        panels[1].set_title(f"As published: {model} (pale: {other})", **TITLE)
    for panel in panels:
        panel.set_xlabel("bits per linear weight")
    heading(figure, "What a bit buys: perplexity against the bits in the file")
    notes = [f"Left: {footnote(section, dataset)}" if published else footnote(section, dataset)]
    if published:
        notes.append(f"Right: {published['sources']['perplexity']}.")
        notes.append(f"Stored bits there: {published['sources']['stored_bits']}.")
    finish(figure, notes)
    for write in label:
        write()
    return figure


def error_figure(section: Section) -> Figure:
    """Output error against stored bits, for checkpoints that were not evaluated."""
    figure = new_figure(8.2, 6.4)
    axes = figure.subplots()
    label = curve_panel(axes, points_of(section, None), None, "relative output error of a linear, mean (log scale)")
    axes.set_xlabel("bits per linear weight")
    heading(figure, "What a bit buys: output error against the bits in the file")
    finish(figure, ["Error on each checkpoint's own calibration text: compare only checkpoints calibrated alike."])
    label()
    return figure


def published_points(published: dict[str, Any], model: str) -> list[Point]:
    """The papers' numbers of one model; stored bits where somebody counted them."""
    stored = published["stored_bits"]
    return [
        Point(
            point["series"],
            point["label"],
            point["method"],
            point["perplexity"][model],
            None,
            point["nominal_bits"],
            stored.get(f"{point['method']} {point['label']}"),
        )
        for point in published["points"]
        if point["perplexity"].get(model)
    ]


def curve_panel(
    axes: Axes, points: Sequence[Point], base: tuple[float, str] | None, quantity: str, over_stored: bool = True
) -> Callable[[], None]:
    """One panel: filled markers at stored bits, hollow ones at nominal bits, and a line a series.

    Args:
        base: value and name of the dense model.
        over_stored: the lines join the filled markers; else the hollow ones, which published points always have.

    Returns:
        What writes the direct labels, to be called when the panel has its final place.
    """
    axes.set_yscale("log")
    axes.set_ylabel(quantity)
    points = [below_ceiling(point) for point in points]
    labels, markers, lines = [], [], []
    for (series, method), members in series_of(points).items():
        style = {"color": colour_of(method), "marker": marker_of(series, method, points)}
        line = [(point.stored if over_stored and point.stored else point.nominal, point.value) for point in members]
        pieces = rising_pieces(line)
        draw_series(axes, members, pieces, style)
        spans = [[(point.nominal, point.value), (point.stored or point.nominal, point.value)] for point in members]
        bars = [[(at, low), (at, high)] for at, low, high in (error_bar(point) for point in members)]
        lines += [*pieces, *spans, *bars]
        markers += [end for span in spans for end in span]
        labels += series_labels(members, line, style["color"])
    if base:
        lines += dense_line(axes, *base)
    decorate(axes, points, base)
    return lambda: place_labels(axes, labels, markers, lines)


def below_ceiling(point: Point) -> Point:
    """The point, or at the ceiling one that says where it would be."""
    if point.value <= CEILING:
        return point
    return replace(point, value=CEILING, error=None, label=f"{point.label} ↑ {short(point.value)}")


def error_bar(point: Point) -> tuple[float, float, float]:
    """Where it stands, and its ends; what would lie below half the value ends there, for the logarithm."""
    error = point.error or 0.0
    return point.stored or point.nominal, max(point.value - error, point.value / 2), point.value + error


def series_labels(points: Sequence[Point], line: Sequence[tuple[float, float]], colour: str) -> list[Label]:
    """The name of a series at its best point, and what the others are; of a long series only the ends."""
    best = min(range(len(points)), key=lambda number: points[number].value)
    shown = range(len(points)) if len(points) <= 4 else (0, best, len(points) - 1)
    return [
        Label(f"{points[n].series} {points[n].label}", *line[n], colour, bold=True, size=9)
        if n == best
        else Label(points[n].label, *line[n], colour)
        for n in dict.fromkeys(shown)
    ]


def rising_pieces(line: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """A line in the order of its nominal bits, cut where it would turn back: without a mask a point stores less."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for at in line:
        if pieces[-1] and at[0] < pieces[-1][-1][0]:
            pieces.append([])
        pieces[-1].append(at)
    return pieces


def dense_line(axes: Axes, value: float, name: str) -> list[list[tuple[float, float]]]:
    """A horizontal line for the dense model; it and its text, as lines that labels should leave visible."""
    axes.axhline(value, color=TEXT, lw=1, ls=(0, (6, 3)), zorder=1)
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"{name}: {short(value)}", (0, value), (4, -3), va="top", fontsize=8.5, color=TEXT, **where)
    return [[(0.0, value), (16.0, value)], [(0.0, value * 0.8), (1.5, value * 0.8)]]


def series_of(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by series, each in the order of its bits."""
    series: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.nominal):
        series.setdefault((point.series, point.method), []).append(point)
    return series


def draw_series(
    axes: Axes, points: Sequence[Point], pieces: Sequence[Sequence[tuple[float, float]]], style: dict[str, str]
) -> None:
    """The line, both positions of every point, and its error bar."""
    for piece in pieces:
        axes.plot([x for x, _ in piece], [y for _, y in piece], color=style["color"], lw=1.4, alpha=0.75, zorder=3)
    for point in points:
        hollow: dict[str, Any] = {**style, "ls": "", "ms": 6, "mfc": "white", "mew": 1.1, "zorder": 4}
        axes.plot([point.nominal], [point.value], **hollow)
        if point.stored is None:
            continue
        axes.plot([point.nominal, point.stored], [point.value] * 2, color=style["color"], lw=0.7, alpha=0.4, zorder=2)
        error = [[point.error], [point.error]] if point.error else None
        filled: dict[str, Any] = {**style, "ms": 6.5, "mew": 0, "capsize": 2.5, "elinewidth": 1.1, "zorder": 5}
        axes.errorbar([point.stored], [point.value], yerr=error, **filled)


def faint_points(axes: Axes, points: Sequence[Point]) -> None:
    """A second model in the background: lines without labels."""
    for (series, method), members in series_of(points).items():
        style: dict[str, Any] = {"color": colour_of(method), "marker": marker_of(series, method, points)}
        x, y = [point.nominal for point in members], [point.value for point in members]
        axes.plot(x, y, **style, lw=1, ms=4, mfc="white", alpha=0.28, zorder=1)


def colour_of(method: str) -> str:
    """The same for a method in every figure; methods that are not known share the other colours."""
    return COLOURS.get(method) or OTHER_COLOURS[sum(method.encode()) % len(OTHER_COLOURS)]


def marker_of(series: str, method: str, points: Sequence[Point]) -> str:
    """Tells the series of one method apart."""
    siblings = list(dict.fromkeys(point.series for point in points if point.method == method))
    return MARKERS[siblings.index(series) % len(MARKERS)]


def decorate(axes: Axes, points: Sequence[Point], base: tuple[float, str] | None) -> None:
    """Limits with room for labels, grid, and the key of filled and hollow."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

    values = [end for point in points for end in error_bar(point)[1:]] + ([base[0]] if base else [])
    span = math.log10(max(values) / min(values)) or 1.0
    axes.set_ylim(min(values) / 10 ** (0.1 * span), max(values) * 10 ** (0.14 * span))
    right = max([axes.get_xlim()[1] / 1.15, *(max(point.nominal, point.stored or 0) for point in points)])
    axes.set_xlim(0, 1.15 * right)
    axes.xaxis.set_major_locator(MultipleLocator(0.5 if right < 5 else 1))
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter() if span > 1 else plain)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    key: dict[str, Any] = {"ls": "", "marker": "o", "ms": 6.5, "color": FAINT}
    handles = [Line2D([], [], **key), Line2D([], [], **key, mfc="white", mew=1.1)]
    axes.legend(
        handles,
        ["stored bits: the file", "nominal bits: as the papers count"],
        loc="upper right",
        fontsize=8.5,
        frameon=True,
        edgecolor=GRID,
        labelcolor=FAINT,
        handletextpad=0.2,
    )


# ---- ablations -------------------------------------------------------------------------------------------------------


def ablations_of(section: Section, group: str, dataset: str) -> list[tuple[Row, list[Row]]]:
    """Every baseline of a group with the rows that change it in one place, where both were measured."""
    found: dict[str, tuple[Row, list[Row]]] = {}
    for row in section.rows:
        base = section.baseline(row)
        if row.group == group and base and dataset in row.perplexity and dataset in base.perplexity:
            found.setdefault(base.name, (base, []))[1].append(row)
    return list(found.values())


def ablation_figure(section: Section, group: str, dataset: str) -> Figure:
    """One line a variant: its perplexity beside that of the baseline."""
    families = ablations_of(section, group, dataset)
    rows = [row for base, variants in families for row in (base, *variants)]
    figure = new_figure(9.2, 2.6 + 0.27 * len(rows))
    axes = figure.subplots()
    axes.set_xscale("log")
    top = 0
    for base, variants in families:
        value, error = base.perplexity[dataset].value, base.perplexity[dataset].standard_error or 0.0
        span = (top - 0.5, top + len(variants) + 0.5)
        axes.fill_betweenx(span, max(value - error, value * 0.01), value + error, color=GRID, lw=0, zorder=0)
        axes.plot([value, value], span, color=FAINT, lw=1, ls=(0, (6, 3)), zorder=1)
        for number, row in enumerate([base, *variants]):
            ablation_row(axes, top + number, row, value, dataset)
        top += len(variants) + 1
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if row.baseline else "bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{dataset} perplexity (log scale)")
    plain_log_axis(axes)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    heading(figure, f"What one changed choice does to perplexity: {section.model}")
    band = (
        "Band and dashed line: the baseline ± one standard error. All rows read the same windows: errors go together."
    )
    finish(figure, [band, footnote(section, dataset)])
    return figure


def ablation_row(axes: Axes, place: int, row: Row, base: float, dataset: str) -> None:
    """A dot with its error bar and number; orange where perplexity rises, blue where it falls."""
    measured = row.perplexity[dataset]
    colour = TEXT if not row.baseline else COLOURS["stbllm"] if measured.value > base else COLOURS["pbs2p"]
    if not math.isfinite(measured.value):
        return
    axes.errorbar([measured.value], [place], xerr=measured.standard_error, color=colour, marker="o", ms=6, capsize=2.5)
    text = short(measured.value) + (f"  ({change(measured.value / base)})" if row.baseline else "")
    at = (measured.value + (measured.standard_error or 0), place)
    axes.annotate(text, at, (7, 0), textcoords="offset points", va="center", fontsize=8.5, color=colour)


def plain_log_axis(axes: Axes) -> None:
    """Numbers as people write them, with room for the text behind the last dot."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.16)
    decades = math.log10(axes.get_xlim()[1] / low)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else range(1, 10))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


# ---- what all figures share ------------------------------------------------------------------------------------------

TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10.5, "color": FAINT, "pad": 10}


def new_figure(width: float, height: float) -> Figure:
    """An empty one; no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, text: str) -> None:
    """The title of a whole figure."""
    figure.text(0.012, 0.985, text, ha="left", va="top", fontsize=13.5, fontweight="bold", color=TEXT)


def finish(figure: Figure, notes: Sequence[str]) -> None:
    """Footnotes, and the panels in the room between."""
    width, height = figure.get_size_inches()
    limit = int(16.5 * width)
    lines = list(itertools.chain.from_iterable(wrap(note, limit) for note in notes if note))
    line = 0.155 / height
    for number, text in enumerate(reversed(lines)):
        figure.text(0.012, 0.1 / height + number * line, text, ha="left", va="bottom", fontsize=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.15 / height + len(lines) * line, 1, 1 - 0.34 / height))


def wrap(text: str, limit: int) -> list[str]:
    """Lines of at most so many characters."""
    import textwrap

    return textwrap.wrap(text, limit)


def footnote(section: Section, dataset: str) -> str:
    """How the numbers of a figure were measured."""
    rows = [row for row in section.rows if dataset in row.perplexity]
    counts = sorted({row.perplexity[dataset].windows for row in rows})
    how = section.protocol
    windows = f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} windows"
    measured = f"{dataset}, windows without overlap"  # of checkpoints: the name says the rest
    if how:
        windows = f"{windows} of {how['seq_len']} tokens without overlap"
        measured = f"{dataset} {how['split']} text, {windows}, {how['dtype']}"
    texts = list(dict.fromkeys(row.calibration for row in rows if row.calibration and not row.baseline))
    calibration = f" Calibration: {' · '.join(texts)}." if 0 < len(texts) <= 2 else ""
    seeds = max((row.perplexity[dataset].seeds for row in rows), default=1)
    merged = f" Geometric mean over up to {seeds} seeds." if seeds > 1 else ""
    return f"{measured}; bars: ± one standard error over windows.{calibration}{merged}"
