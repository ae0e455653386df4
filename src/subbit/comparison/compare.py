"""compare(): results of sweeps, or finished checkpoints, as one table and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subbit.checkpoint.files import make_folder, write_text
from subbit.comparison.figures import check_matplotlib, draw
from subbit.comparison.rows import read_sections
from subbit.comparison.tables import markdown

__all__ = ["TABLE_FILE", "compare"]

TABLE_FILE = "comparison.md"


def compare(
    sources: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    figures: bool = True,
    published: str | Path | None = None,
) -> str:
    """Put results of sweeps, or finished checkpoints, beside each other.

    Args:
        sources: results files of ``subbit.sweep``, directories of compressed checkpoints, or both.
        out: a directory for the table (comparison.md) and the figures (SVG and PNG); None: only the return value.
        figures: draw them; needs matplotlib.
        published: a JSON file like comparison/published.json of this package, drawn in a second panel.

    Returns:
        The table, Markdown.

    Raises:
        UserError: a source that is neither, nothing to compare yet, no matplotlib.
    """
    sections = read_sections([Path(source) for source in sources])
    table = markdown(sections)
    if out is None:
        return table
    if figures:
        check_matplotlib()
    out = Path(out)
    make_folder(out)
    write_text(out / TABLE_FILE, table)
    if figures:
        draw(sections, out, Path(published) if published else None)
    return table
