"""Charts as inline SVG without a plotting library: an axis, a line chart, ridges of histograms, direct labels.

Colours are classes of the page's style sheet, so that one drawing serves light and dark. All lengths are units of the
viewBox, about a pixel each; texts are sized so that they can be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from subbit.comparison.labels import Text, around, arrange

__all__ = ["Axis", "Canvas", "Label", "Line", "Ridge", "line_chart", "ridges"]

WIDTH = 380.0
LETTER, WIDE_LETTER = 6.2, 7.6  # mean width of a letter of a label, and of a bold one
ROW = 24.0  # of a ridge


@dataclass(frozen=True)
class Axis:
    """From a quantity to a place along one side of the plot."""

    low: float
    high: float
    start: float  # where ``low`` is drawn
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """About five round numbers."""
        return (log_ticks if self.log else linear_ticks)(self.low, self.high, 5)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, their double and half where there are few, or every second, third, … power."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        inside = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
        if len(inside) <= count + 2:
            return inside
    return inside[:: math.ceil(len(inside) / count)]


def short(value: float) -> str:
    """A tick as people write it."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):  # longer ones would not fit beside the axis
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


class Canvas:
    """An SVG under construction."""

    def __init__(self, height: float, title: str, width: float = WIDTH) -> None:
        self.width, self.height = width, height
        box = f"0 0 {width:g} {height:g}"
        self._root = ElementTree.Element("svg", {"viewBox": box, "role": "img", "class": "chart"})
        ElementTree.SubElement(self._root, "title").text = title

    def add(self, tag: str, classes: str, text: str | None = None, tip: str | None = None, **places: object) -> None:
        """An element: its attributes are places (rounded), its look is that of its classes; ``tip`` shows on hover."""
        values = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
            for name, value in places.items()
        }
        element = ElementTree.SubElement(self._root, tag, {"class": classes, **values})
        element.text = text
        if tip:
            ElementTree.SubElement(element, "title").text = tip

    def path(self, classes: str, points: Sequence[tuple[float, float]], close: bool = False) -> None:
        """A polyline, or an area."""
        steps = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
        self.add("path", classes, d=steps + ("Z" if close else ""))

    def markup(self) -> Markup:
        """The SVG element, for a page."""
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))

    def x_axis(self, axis: Axis, y: float, top: float, title: str) -> None:
        """Ticks below ``y`` with grid lines up to ``top``, and what is shown."""
        for value in axis.ticks:
            self.add("line", "grid", x1=axis(value), x2=axis(value), y1=top, y2=y)
            self.add("text", "tick middle", short(value), x=axis(value), y=y + 14)
        self.add("text", "axis middle", title, x=(axis.start + axis.end) / 2, y=y + 30)

    def y_axis(self, axis: Axis, x: float, right: float, title: str) -> None:
        """Ticks left of ``x`` with grid lines to ``right``, and what is shown, above the plot."""
        for value in axis.ticks:
            self.add("line", "grid", x1=x, x2=right, y1=axis(value), y2=axis(value))
            self.add("text", "tick end", short(value), x=x - 5, y=axis(value) + 3.5)
        self.add("text", "axis", title, x=2.0, y=11.0)

    def labels(
        self,
        labels: Sequence[Label],
        markers: Sequence[tuple[float, float]],
        lines: Sequence[Sequence[tuple[float, float]]],
        frame: tuple[float, float, float, float],
    ) -> None:
        """Direct labels, each where it covers least; the first ones choose first.

        Args:
            markers: points that stay visible.
            lines: polylines that stay visible if there is room.
            frame: left, top, right, bottom of the plot.
        """
        texts = [Text((label.x, label.y), label.width, 13.0) for label in labels]
        places = arrange(texts, [around(marker, 6) for marker in markers], lines, frame, 0.8)
        for label, ((left, top, right, bottom), far) in zip(labels, places, strict=True):
            middle, height = (left + right) / 2, (top + bottom) / 2
            if far:
                nearest = min(max(label.x, left), right), min(max(label.y, top), bottom)
                self.add("line", "leader", x1=label.x, y1=label.y, x2=nearest[0], y2=nearest[1])
            self.add("text", f"label middle {label.classes}", label.text, x=middle, y=height + 4)


@dataclass(frozen=True)
class Label:
    """A text at a point of the canvas."""

    text: str
    x: float
    y: float
    classes: str = ""

    @property
    def width(self) -> float:
        """About how wide it is in any font of the page."""
        return (WIDE_LETTER if "bold" in self.classes else LETTER) * len(self.text) + 2


@dataclass(frozen=True)
class Line:
    """A series of a line chart; None is a gap."""

    name: str
    values: Sequence[float | None]
    classes: str


def line_chart(lines: Sequence[Line], names: Sequence[str], title: str, y_title: str, log: bool) -> Markup:
    """Values over decoder layers.

    Args:
        names: of the layers, as many as every line has values.
        log: of the y axis.
    """
    canvas, bottom, left, right = Canvas(230, title), 190.0, 42.0, WIDTH - 8
    known = [value for line in lines for value in line.values if value is not None]
    low, high = (min(known), max(known)) if log else (0.0, max(known))
    y = Axis(low / 1.15 if log else 0.0, high * 1.15 if log else high * 1.05 or 1.0, bottom, 22, log)
    x = Axis(0, max(len(names) - 1, 1), left + 6, right - 6)
    canvas.y_axis(y, left, right, y_title)
    step = max(1, round(len(names) / 8))
    for number in range(0, len(names), step):
        canvas.add("text", "tick middle", names[number], x=x(number), y=bottom + 14)
    canvas.add("text", "axis middle", "decoder layer", x=(left + right) / 2, y=bottom + 30)
    for line in lines:
        for piece in pieces([None if value is None else (x(n), y(value)) for n, value in enumerate(line.values)]):
            canvas.path(f"line {line.classes}", piece)
        for number, value in enumerate(line.values):
            if value is not None:
                tip = f"{line.name}, layer {names[number]}: {value:.4g}"
                canvas.add("circle", f"dot {line.classes}", tip=tip, cx=x(number), cy=y(value), r=2.4)
    return canvas.markup()


def pieces(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """A line cut at its gaps."""
    found: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            found.append([])
        else:
            found[-1].append(point)
    return [piece for piece in found if len(piece) > 1]


@dataclass(frozen=True)
class Ridge:
    """One histogram of a chart of ridges: a share for every bin."""

    name: str
    shares: Sequence[float]
    middle: float  # the median, marked
    tip: str


def ridges(rows: Sequence[Ridge], edges: Sequence[float], title: str, x_title: str) -> Markup:
    """Histograms below each other over one logarithmic axis.

    Args:
        edges: of the bins, ascending, one more than there are shares.
    """
    left, top = min(140.0, 14 + LETTER * max(len(row.name) for row in rows)), 8.0
    bottom = top + ROW * len(rows)
    canvas = Canvas(bottom + 38, title)
    x = Axis(edges[0], edges[-1], left, WIDTH - 10, log=True)
    canvas.x_axis(x, bottom, top, x_title)
    tallest = max(share for row in rows for share in row.shares)
    for number, row in enumerate(rows):
        base = top + ROW * (number + 1)
        canvas.add("line", "base", x1=left, x2=WIDTH - 10, y1=base, y2=base)
        outline = [(x(edges[0]), base)]
        for share, low, high in zip(row.shares, edges[:-1], edges[1:], strict=True):
            height = base - (ROW - 3) * share / tallest
            outline += [(x(low), height), (x(high), height)]
        canvas.path("ridge", [*outline, (x(edges[-1]), base)], close=True)
        canvas.add("line", "median", tip=row.tip, x1=x(row.middle), x2=x(row.middle), y1=base - ROW + 6, y2=base)
        canvas.add("text", "label end", row.name, x=left - 6, y=base - 6)
    return canvas.markup()
