"""What the papers published: perplexities of their models at their nominal bits, for a reader to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subbit.checkpoint.reader import read_json

__all__ = ["PUBLISHED_FILE", "read_published"]

PUBLISHED_FILE = Path(__file__).with_name("published.json")


def read_published(path: Path = PUBLISHED_FILE) -> dict[str, Any]:
    """The numbers of ``published.json``, or of another file of that form; CheckpointError when it is no JSON object."""
    return read_json(path)
