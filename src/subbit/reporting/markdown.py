"""A report as Markdown: the same facts, tables instead of figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from subbit.reporting.charts import HeatMap, input_peaks
from subbit.reporting.facts import Facts
from subbit.reporting.generations import Generation
from subbit.reporting.page import common, environment

__all__ = ["cell", "fenced", "render_markdown"]


def render_markdown(facts: Facts, generations: Sequence[Generation] = ()) -> str:
    """The whole report."""
    pages = environment(escape=False)
    pages.filters |= {"table": table, "cell": cell, "fenced": fenced, "median": median, "highest": highest}
    return pages.get_template("report.md.j2").render(**common(facts, generations, input_peaks(facts)))


def table(map_: HeatMap) -> str:
    """The numbers of a heat map."""
    lines = [["layer", *map_.columns], ["---:"] * (1 + len(map_.columns))]
    lines += [[name, *(cell(entry.text) for entry in cells)] for name, cells in map_.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return " ".join(text.replace("|", "\\|").split())


def fenced(text: str, language: str = "") -> str:
    """A block of code around any text, whatever fences are in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def median(values: Sequence[float | None]) -> str:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else "–"


def highest(values: Sequence[float | None]) -> str:
    """Of those that are known, and the layer, counted from 0."""
    known = [(value, number) for number, value in enumerate(values) if value is not None]
    if not known:
        return "–"
    value, number = max(known)
    return f"{value:.3g} (layer {number})"
