"""What a sweep tells a worker, and what workers leave for it: a JSON file for each checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subbit.checkpoint.files import write_json

__all__ = ["Task", "facts_file", "read_facts", "save_facts"]


@dataclass(frozen=True)
class Task:
    """What a worker has to do."""

    kind: str  # model: describe it; compress; evaluate
    model: str  # what to compress, or to describe
    facts: str  # JSON file that collects what is found
    checkpoint: str = ""  # to write or to evaluate; the model itself is evaluated as the dense one
    recipe: dict[str, Any] | None = None
    protocol: dict[str, Any] | None = None
    unpack: bool = False  # evaluate: decode every linear once, before the first window
    device: str = "auto"
    trust_remote_code: bool = False


def facts_file(checkpoint: Path) -> Path:
    """Where the facts of a checkpoint are: beside it, and hidden, so that ``work/*`` are the checkpoints alone."""
    return checkpoint.parent / ".facts" / f"{checkpoint.name}.json"


def read_facts(path: Path) -> dict[str, Any]:
    """What workers have found so far; nothing if the file is missing or was damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def save_facts(task: Task, **found: Any) -> None:
    """Add to the facts of a task."""
    path = Path(task.facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**read_facts(path), **found})
