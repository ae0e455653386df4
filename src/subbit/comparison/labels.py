"""Direct labels of a figure: each beside its point, none on top of another label, a marker or a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Label", "Text", "around", "arrange", "place_labels"]

DISTANCES = (9, 15, 24, 36, 50, 66, 84)  # pixels at 100 dpi from the point to the nearest edge of its label
DIRECTIONS = tuple(angle * math.pi / 8 for angle in (0, 4, 12, 8, 2, 14, 6, 10, 1, 15, 3, 13, 5, 11, 7, 9))
LEADER = 20  # pixels from which a thin line says which point is meant


@dataclass(frozen=True)
class Label:
    """A text and the point that it belongs to, in the units of the axes."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False
    size: float = 8.5


@dataclass(frozen=True)
class Text:
    """What a label needs of a canvas: the point that it belongs to and its size, in pixels."""

    anchor: tuple[float, float]
    width: float
    height: float


# left, bottom, right, top in pixels; several boxes are the rows of an array (n, 4)
Box = tuple[float, float, float, float]


def area_in_common(box: Box, others: NDArray[np.float64]) -> float:
    """Sum over the others, (n, 4), of what they share with a box."""
    low, high = np.maximum(others[:, :2], box[:2]), np.minimum(others[:, 2:], box[2:])
    return float((high - low).clip(min=0).prod(axis=1).sum())


def boxes(listed: Sequence[Box]) -> NDArray[np.float64]:
    """(n, 4), also of none."""
    return np.array(listed, dtype=np.float64).reshape(-1, 4)


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    markers: Sequence[tuple[float, float]],
    lines: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Write every label where it covers least, the important (bold) ones first.

    Args:
        markers: points that should stay visible.
        lines: polylines that should, if there is room.
    """
    figure = axes.figure
    canvas = figure.canvas
    canvas.draw()
    scale = canvas.get_width_height()[0] / figure.get_size_inches()[0] / 100  # type: ignore[union-attr]
    solid = [around(to_pixels(axes, point), 6 * scale) for point in markers]
    legend = axes.get_legend()
    if legend is not None:
        solid.append(box_of(legend.get_window_extent()))
    ordered = sorted(labels, key=lambda label: not label.bold)
    texts = [Text(to_pixels(axes, (label.x, label.y)), *text_size(axes, label)) for label in ordered]
    pixels = [[to_pixels(axes, at) for at in line] for line in lines]
    places = arrange(texts, solid, pixels, box_of(axes.get_window_extent()), scale)
    for label, (box, far) in zip(ordered, places, strict=True):
        write(axes, label, box, far)


def arrange(
    texts: Sequence[Text],
    solid: Sequence[Box],
    lines: Sequence[Sequence[tuple[float, float]]],
    frame: Box,
    scale: float,
) -> list[tuple[Box, bool]]:
    """A place for every text where it covers least; the first ones choose first. All in pixels, on any canvas.

    Args:
        solid: what must stay visible.
        lines: polylines that should, if there is room.
        frame: what the texts should not leave.
        scale: of the distances, 1 at 100 dpi.

    Returns:
        For every text its box, and whether that is so far off that a thin line should say which point is meant.
    """
    steps = [point for line in lines for point in along(line, 8 * scale)]
    thin, inside = boxes([around(point, 2 * scale) for point in steps]), boxes([frame])
    taken, places = list(solid), []
    for text in texts:
        others = boxes(taken)
        best, cost = None, math.inf
        for distance, angle in itertools.product(DISTANCES, DIRECTIONS):
            box = beside(text.anchor, angle, distance * scale, text.width, text.height)
            covered = area_in_common(box, others) + 0.4 * area_in_common(box, thin)
            outside = text.width * text.height - area_in_common(box, inside)
            price = covered + 3 * outside + 0.35 * distance * scale**2
            if price < cost - 1e-9:
                best, cost = (box, distance > LEADER), price
        assert best is not None
        places.append(best)
        taken.append(best[0])
    return places


def box_of(extent: Any) -> Box:
    """matplotlib's bounding box as ours."""
    return extent.x0, extent.y0, extent.x1, extent.y1


def to_pixels(axes: Axes, point: tuple[float, float]) -> tuple[float, float]:
    """Where a point of the axes is on the canvas."""
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def around(point: tuple[float, float], radius: float) -> Box:
    """A square."""
    x, y = point
    return x - radius, y - radius, x + radius, y + radius


def along(line: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Points of a polyline, about ``step`` pixels apart."""
    points = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        count = max(1, int(math.hypot(x1 - x0, y1 - y0) / step))
        points += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
    return points


def beside(anchor: tuple[float, float], angle: float, distance: float, width: float, height: float) -> Box:
    """The place of a text whose edge is ``distance`` away from a point in one direction."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x = anchor[0] + distance * cosine + width / 2 * max(-1.0, min(1.0, 1.6 * cosine))
    y = anchor[1] + distance * sine + height / 2 * max(-1.0, min(1.0, 1.6 * sine))
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def text_size(axes: Axes, label: Label) -> tuple[float, float]:
    """Width and height of a label in pixels."""
    text = axes.text(0, 0, label.text, fontsize=label.size, fontweight="bold" if label.bold else "normal")
    box = text.get_window_extent()
    text.remove()
    return box.width + 2, box.height


def write(axes: Axes, label: Label, box: Box, leader: bool) -> None:
    """Put the text into its box."""
    place = axes.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(float(place[0]), float(place[1])),
        ha="center",
        va="center",
        color=label.colour,
        fontsize=label.size,
        fontweight="bold" if label.bold else "normal",
        arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.5, "alpha": 0.6, "shrinkB": 4}
        if leader
        else None,
        zorder=6,
    )
