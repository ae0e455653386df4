"""Run a list of entries, one after the other, each in processes of its own; go on where a killed sweep was."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subbit.checkpoint.files import make_folder, write_json
from subbit.comparison.entries import Entry, Protocol, dataset_key, dataset_name, entry_key, recipe_key
from subbit.comparison.results import DONE, FAILED, place, read_results, record
from subbit.comparison.tasks import Task, facts_file, read_facts
from subbit.errors import UserError
from subbit.process import how_it_ended, run_module
from subbit.progress import Progress, SilentProgress

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What all entries of a sweep share."""

    model: str
    out: Path  # the results file
    protocol: Protocol
    work: Path  # checkpoints under way, and kept ones
    keep: bool = False
    retry: bool = False
    unpack: bool = False
    device: str = "auto"
    trust_remote_code: bool = False
    progress: Progress = field(default_factory=SilentProgress)

    @property
    def model_name(self) -> str:
        """What the model is called in results: a local one by its last folder or file."""
        path = Path(self.model).expanduser()
        return path.resolve().name if path.exists() else self.model


def sweep(
    model: str | Path,
    entries: Sequence[Entry],
    out: str | Path,
    protocol: Protocol | None = None,
    *,
    work: str | Path | None = None,
    keep: bool = False,
    retry: bool = False,
    unpack: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Compress a model with every recipe, evaluate what comes out, and collect it all in one JSON file.

    An entry that is in the file already is not run again, so an interrupted sweep, or a longer list, costs only what is
    missing; a checkpoint that was under way goes on at its next decoder layer. An entry that fails is recorded with its
    error, and the others run.

    Args:
        model: a directory, a hub id or a GGUF file.
        out: the results, JSON.
        work: folder of the checkpoints; default: beside ``out``.
        keep: leave finished checkpoints there; evaluating them on another data set later costs no compression.
        retry: run entries again that failed before.
        unpack: decode every linear once before evaluating, instead of at every use: faster, more memory, the same
            perplexity up to rounding.

    Returns:
        The results of ``entries``, in their order.

    Raises:
        UserError: the model, the protocol or ``out`` cannot be used; errors of single entries are results.
    """
    out = Path(out)
    protocol = protocol or Protocol()
    protocol.check()
    read_results(out)  # a file that is something else must stop the sweep now
    folder = Path(work) if work else out.with_suffix(".work")
    run = Sweep(
        str(model), out, protocol, folder, keep, retry, unpack, device, trust_remote_code, progress or SilentProgress()
    )
    make_folder(facts_file(folder / "model").parent)
    try:
        facts = model_facts(run)
        keys = run_all(run, entries, facts)
    finally:
        remove_if_empty(facts_file(folder / "model").parent)
        remove_if_empty(folder)
    results = {result["key"]: result for result in read_results(out)}
    return [results[key] for key in keys]


def remove_if_empty(folder: Path) -> None:
    """Leave no empty folder behind."""
    if not any(folder.iterdir()):
        folder.rmdir()


def model_facts(run: Sweep) -> dict[str, Any]:
    """Digest and size of the dense model; UserError when it cannot be read."""
    file = facts_file(run.work / "model")
    error = run_task(run, Task("model", run.model, str(file)))
    facts = read_facts(file)
    file.unlink(missing_ok=True)
    if error:
        raise UserError(error)
    return facts


def run_all(run: Sweep, entries: Sequence[Entry], model: dict[str, Any]) -> list[str]:
    """Run what is not recorded yet; the keys of all entries."""
    keyed = [(entry_key(entry.recipe, model["digest"], run.protocol), entry) for entry in entries]
    known = {result["key"]: result for result in read_results(run.out)}
    todo: dict[str, Entry] = {}
    for key, entry in keyed:
        if key in known and (known[key]["status"] == DONE or not run.retry):
            record(run.out, {**known[key], "places": [place(entry)]})  # it may have come with another list
        else:
            todo.setdefault(key, entry)
    failed = sum(key in known and known[key]["status"] == FAILED and key not in todo for key, _ in keyed)
    again = f", {failed} failed and are left out (--retry runs them again)" if failed else ""
    run.progress.line(f"{len(keyed)} entries: {len(todo)} to run{again}")
    started = time.monotonic()
    for number, (key, entry) in enumerate(todo.items()):
        run.progress.line(f"[{number + 1}/{len(todo)}] {entry.title}")
        result = run_entry(run, key, entry, model)
        places = [place(other) for other_key, other in keyed if other_key == key]
        record(run.out, {**result, "places": places})
        clear(run, entry, model["digest"], result)
        run.progress.line(
            f"[{number + 1}/{len(todo)}] {summary(result)}{eta(started, number + 1, len(todo) - number - 1)}"
        )
    return [key for key, _ in keyed]


# ---- one entry -------------------------------------------------------------------------------------------------------


def run_entry(run: Sweep, key: str, entry: Entry, model: dict[str, Any]) -> dict[str, Any]:
    """Compress and evaluate one entry; its result, with the error if there is one."""
    checkpoint, file = paths(run, entry, model["digest"])
    task = Task(
        "compress",
        run.model,
        str(file),
        checkpoint=str(checkpoint) if entry.recipe else "",
        recipe=entry.recipe.to_dict() if entry.recipe else None,
        protocol=dataclasses.asdict(run.protocol),
        unpack=run.unpack,
        device=run.device,
        trust_remote_code=run.trust_remote_code,
    )
    error = run_task(run, task) if entry.recipe else None
    error = error or run_task(run, dataclasses.replace(task, kind="evaluate"))
    facts = read_facts(file)
    measured = facts.get("perplexity", {})
    datasets = {dataset_name(d): measured.get(dataset_key(d, run.protocol)) for d in run.protocol.datasets}
    perplexity = {name: found for name, found in datasets.items() if found}
    return {
        "key": key,
        "status": FAILED if error else DONE,
        "error": error,
        "places": [],
        "model": {"name": run.model_name, "digest": model["digest"]},
        "recipe": entry.recipe.to_dict() if entry.recipe else None,
        "seed": entry.recipe.calibration.seed if entry.recipe else None,
        "protocol": run.protocol.to_dict(),
        "perplexity": perplexity,
        **size_of(facts if entry.recipe else model),
        **cost_of(facts, perplexity),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def size_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Bits, bytes and errors, as far as they are known."""
    fields = (
        "bits",
        "bytes",
        "linear_weights",
        "parameters",
        "output_error",
        "layer_errors",
        "left_dense",
        "calibration",
    )
    return {name: facts.get(name) for name in fields}


def cost_of(facts: dict[str, Any], perplexity: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of both steps, and where they ran; evaluation seconds are those of the forward passes."""
    compress, runs = facts.get("compress", {}), list(perplexity.values())
    ran: dict[str, Any] = next((run for run in [*runs, compress] if "versions" in run), {})
    return {
        "seconds": {
            "compress": compress.get("seconds"),
            "evaluate": round(sum(run["seconds"] for run in runs), 2) if runs else None,
        },
        "peak_bytes": {
            "compress": compress.get("peak_bytes"),
            "evaluate": max((run["peak_bytes"] for run in runs), default=None),
        },
        "versions": ran.get("versions"),
        "machine": ran.get("machine"),
    }


def paths(run: Sweep, entry: Entry, digest: str) -> tuple[Path, Path]:
    """The checkpoint of an entry, under a name that says something, and the file of its facts."""
    key = recipe_key(entry.recipe, digest)
    method = f"{entry.recipe.method}-{entry.recipe.sparsity.replace(':', '-')}" if entry.recipe else "dense"
    name = f"{method}-{key}"
    checkpoint = run.work / name
    return checkpoint, facts_file(checkpoint)


def clear(run: Sweep, entry: Entry, digest: str, result: dict[str, Any]) -> None:
    """Delete the checkpoint of an evaluated entry, unless it is to be kept; an unfinished one stays for a retry."""
    checkpoint, file = paths(run, entry, digest)
    if result["status"] == DONE and not run.keep:
        shutil.rmtree(checkpoint, ignore_errors=True)
        file.unlink(missing_ok=True)
    if result["status"] == FAILED and not checkpoint.exists():
        file.unlink(missing_ok=True)


# ---- the process of a step -------------------------------------------------------------------------------------------


def run_task(run: Sweep, task: Task) -> str | None:
    """Run a worker; None, or in one line why it failed."""
    file = Path(task.facts)
    if "error" in read_facts(file):
        write_json(file, {name: found for name, found in read_facts(file).items() if name != "error"})
    code, _ = run_module("subbit.comparison.worker", task)
    step = {"model": "reading the model", "compress": "compressing", "evaluate": "evaluating"}[task.kind]
    return None if code == 0 else str(read_facts(file).get("error") or how_it_ended(step, code))


# ---- what a person reads ---------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result["status"] == FAILED:
        return f"failed: {result['error']}"
    numbers = [
        f"{name} {'overflow' if found['value'] is None else format(found['value'], ',.2f')}"
        for name, found in result["perplexity"].items()
    ]
    return f"{result['bits']['stored']:.3f} stored bits; perplexity: {', '.join(numbers)}"


def eta(started: float, done: int, left: int) -> str:
    """How long the rest will take, if it goes on like this."""
    if not left:
        return ""
    minutes = (time.monotonic() - started) / done * left / 60
    time_left = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(minutes, 1):.0f} min"
    return f"; {left} left, about {time_left}"
