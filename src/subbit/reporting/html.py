"""A report as one HTML file: style and figures inside, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from markupsafe import Markup, escape

from subbit.reporting.charts import bits_chart, input_peaks, peaks_chart, scales_chart, tuning_chart
from subbit.reporting.facts import Facts
from subbit.reporting.generations import Generation
from subbit.reporting.page import common, environment

__all__ = ["render_html"]


def render_html(facts: Facts, generations: Sequence[Generation] = ()) -> str:
    """The whole page."""
    peaks = input_peaks(facts)
    pages = environment(escape=True)
    pages.filters["breakable"] = breakable
    roles = dict.fromkeys(group.role for group in facts.scales if group.total)
    return pages.get_template("report.html.j2").render(
        **common(facts, generations, peaks),
        style=Markup(files("subbit.reporting").joinpath("templates/report.css").read_text(encoding="utf-8")),
        bits_chart=bits_chart(facts),
        tuning_chart=tuning_chart(facts) if facts.tuning else None,
        scales=[(role, scales_chart(facts.scales, role)) for role in roles],
        token_chart=peaks_chart(facts, peaks, tokens=True) if peaks else None,
        channel_chart=peaks_chart(facts, peaks, tokens=False) if peaks else None,
    )


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind an underscore or a dot."""
    return Markup(str(escape(name)).replace("_", "_<wbr>").replace(".", ".<wbr>"))
