"""The results of a sweep: one JSON file that is whole at any moment, and grows an entry at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from subbit.checkpoint.files import write_json
from subbit.comparison.entries import Entry
from subbit.errors import UserError

__all__ = ["DONE", "FAILED", "place", "read_results", "record"]

VERSION = 1
DONE, FAILED = "done", "failed"
# What a reader cannot do without.
FIELDS = {"key": str, "status": str, "places": list, "model": dict, "protocol": dict}


def place(entry: Entry) -> dict[str, Any]:
    """Where a result is shown: its table, its line there, and what it is compared with."""
    return {"group": entry.group, "series": entry.series, "label": entry.label, "baseline": entry.baseline}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file, in the order in which they were first recorded; none if there is no file.

    Raises:
        UserError: it is not such a file.
    """
    if not path.exists():
        return []
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version, results = contents["subbit_sweep"], contents["results"]
        good = all(isinstance(result.get(field), kind) for result in results for field, kind in FIELDS.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        version, results, good = VERSION, [], False
    if version != VERSION:
        raise UserError(f"{path} was written by another version of 'subbit sweep' (format {version})")
    if not good:
        raise UserError(f"{path} is no results file of 'subbit sweep', or is damaged")
    return list(results)


def record(path: Path, result: dict[str, Any]) -> None:
    """Put a result into the file in the place of the one with its key, or behind the others; atomic.

    The file is read anew. A result that several lists ask for, in other groups or by other names, keeps all places.
    """
    results = {known["key"]: known for known in read_results(path)}
    old = results.get(result["key"])
    places = list(old["places"]) if old else []
    places += [new for new in result["places"] if new not in places]
    results[result["key"]] = {**result, "places": places}
    if old != results[result["key"]]:
        write_json(path, {"subbit_sweep": VERSION, "results": list(results.values())})
