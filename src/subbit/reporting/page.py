"""What the two forms of a report have in common: words, tables, and the templates' environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from subbit.comparison.figures import Point, published_points
from subbit.comparison.published import read_published
from subbit.comparison.tables import short
from subbit.reporting.charts import REFERENCE, HeatMap, InputPeaks, heat_map
from subbit.reporting.facts import Facts
from subbit.reporting.generations import Generation
from subbit.reporting.headline import by_kind, headline, megabytes, show

__all__ = ["common", "environment", "version"]


def environment(escape: bool) -> Environment:
    """Templates of this package; ``escape``: for HTML."""
    loader = PackageLoader("subbit.reporting", "templates")
    options: dict[str, Any] = {"undefined": StrictUndefined, "keep_trailing_newline": True}
    found = Environment(loader=loader, autoescape=escape, **options)
    found.filters |= {"bytes": megabytes, "share": share, "short": short}
    return found


def common(facts: Facts, generations: Sequence[Generation], peaks: Sequence[InputPeaks]) -> dict[str, Any]:
    """The variables that both templates read."""
    errors = facts.errors
    known = errors.known
    return {
        "facts": facts,
        "summary": summary(facts),
        "headline": headline(facts),
        "measured": [show(measurement) for measurement in by_kind(facts.measurements)],
        "reference": reference(),
        "errors": heat_map(errors, f"{min(known):.2g}", f"{max(known):.2g}") if known else None,
        "errors_missing": missing_errors(facts),
        "allocation": allocation_map(facts),
        "allocation_note": allocation_note(facts),
        "peaks": peaks,
        "distillation": distillation_line(facts),
        "generations": generations,
        "generations_note": generations[0].note if generations else "",
        "version": version(),
    }


def version() -> str:
    """Of this package."""
    from subbit import __version__  # here: the package imports this module

    return __version__


def share(percent: float) -> str:
    """With one digit where a whole number says too little, and a space that does not break."""
    return f"{percent:.{0 if percent >= 10 else 1}f}\N{NO-BREAK SPACE}%"


def summary(facts: Facts) -> str:
    """The one line under the title."""
    labels = list(dict.fromkeys(linear.label for linear in facts.linears if linear.label != "dense"))
    kept = facts.sparsity if facts.sparsity != "1:1" else ", ".join(labels)  # methods that prune nothing
    parts = [
        f"{facts.method} {kept}".strip(),
        f"{facts.model_type}, {parameters(facts.parameters)} parameters, {facts.linear_weights / facts.parameters:.0%} "
        "of them in linears of decoder layers",
    ]
    if facts.seconds:
        parts.append(f"compressing the layers took {duration(facts.seconds)}")
    return " · ".join(parts)


def parameters(count: int) -> str:
    """As people say it."""
    return (
        f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"
    )


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def reference() -> dict[str, Any]:
    """What was published of one model."""
    published = read_published()
    points: list[Point] = published_points(published, REFERENCE)
    return {"model": REFERENCE, "dense": published["dense"][REFERENCE], "points": points, **published["sources"]}


def missing_errors(facts: Facts) -> str:
    """Why a checkpoint may have no output errors."""
    if facts.distillation is not None:
        return "Not recorded: an older version of subbit distilled this checkpoint."
    return "Not recorded: the checkpoint has no subbit_manifest.json."


def allocation_map(facts: Facts) -> HeatMap:
    """N:M or bits of a code, coloured by the share of weights that is kept."""
    grid = facts.allocation
    known = grid.known or [0.0]
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return heat_map(grid, low if low != high else "", f"{high} nominal bits")


def allocation_note(facts: Facts) -> str:
    """How the cells of that map are to be read."""
    counts: dict[str, int] = {}
    for linear in facts.linears:
        counts[linear.label] = counts.get(linear.label, 0) + linear.weights
    shares = ", ".join(
        f"{label}: {share(100 * weights / facts.linear_weights)}"
        for label, weights in sorted(counts.items(), key=lambda item: -item[1])
    )
    return f"N:M: N of every M weights are kept. Of all weights of linears: {shares}."


def distillation_line(facts: Facts) -> str | None:
    """What tuning the whole model did; None where it was not."""
    if facts.distillation is None:
        return None
    before, after = facts.distillation.get("before"), facts.distillation.get("after")
    if before is None or after is None:
        return "Distilled as a whole; no window was held out, so the result is not measured."
    return f"Distilled as a whole: divergence on held-out calibration windows {before:.3f} → {after:.3f} nats a token."
