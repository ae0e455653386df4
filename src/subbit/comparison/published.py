"""What the papers published: perplexities of their models at their nominal bits, for a reader to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subbit.checkpoint.reader import read_json
from subbit.errors import UserError

__all__ = ["PUBLISHED_FILE", "read_published"]

PUBLISHED_FILE = Path(__file__).with_name("published.json")
FIELDS = {"dense": dict, "points": list, "sources": dict, "stored_bits": dict}


def read_published(path: Path = PUBLISHED_FILE) -> dict[str, Any]:
    """The numbers of ``published.json``, or of another file of that form; UserError when it is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; --published takes a file like {PUBLISHED_FILE}")
    published = read_json(path)
    if not all(isinstance(published.get(field), kind) for field, kind in FIELDS.items()):
        raise UserError(f"{path} is not of the form of {PUBLISHED_FILE}: {', '.join(FIELDS)}")
    return published
