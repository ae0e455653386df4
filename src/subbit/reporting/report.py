"""report(): a finished checkpoint as one HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subbit.checkpoint.files import make_folder, write_text
from subbit.errors import UserError
from subbit.progress import Progress, SilentProgress
from subbit.reporting.facts import read_facts
from subbit.reporting.generations import PROMPTS, generate
from subbit.reporting.html import render_html
from subbit.reporting.markdown import render_markdown

__all__ = ["report"]


def report(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    generations: bool = False,
    reference: str | Path | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 48,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write what a compressed checkpoint is, and what was measured of it.

    Args:
        directory: the checkpoint; what ``subbit eval`` left there is shown.
        out: a file ending in .html, with the Markdown beside it, or a directory for report.html and report.md; None:
            NAME-report.html and NAME-report.md beside the checkpoint.
        generations: let the model continue some prompts, which takes time.
        reference: the dense model, to write its continuations beside them; means ``generations``.
        prompts: to continue, instead of the usual ones; mean ``generations``.

    Returns:
        The HTML and the Markdown file.

    Raises:
        CheckpointError: no, an unfinished or a damaged checkpoint.
        UserError: a place that cannot be written to, a damaged evaluation.json, a model that cannot be loaded.
    """
    page = page_file(Path(directory), None if out is None else Path(out))
    facts = read_facts(directory)
    written = []
    if generations or reference is not None or prompts:
        settings = max_new_tokens, device, trust_remote_code, progress or SilentProgress()
        written = generate(Path(directory), reference, list(prompts) or list(PROMPTS), *settings)
    text = page.with_suffix(".md")
    make_folder(page.parent)
    write_text(page, render_html(facts, written))
    write_text(text, render_markdown(facts, written))
    return page, text


def page_file(directory: Path, out: Path | None) -> Path:
    """Where the HTML goes; UserError for a name that is none of a page."""
    if out is None:
        place = directory.resolve()
        return place.parent / f"{place.name}-report.html"
    if out.suffix == ".html" and not out.is_dir():
        return out
    if out.is_file() or out.suffix in (".md", ".htm"):
        raise UserError(f"{out}: give a name that ends in .html (the Markdown gets the same with .md), or a directory")
    return out / "report.html"
