"""One step of a sweep in a process of its own, so that its peak memory and its end are its own.

``python -m subbit.comparison.worker`` does a :class:`subbit.comparison.tasks.Task` and leaves what it found in the file
that the task names. It ends with the sweep (:mod:`subbit.process`): two workers must never write one checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

import subbit
from subbit.comparison.entries import Protocol, dataset_key, dataset_name
from subbit.comparison.tasks import Task, read_facts, save_facts
from subbit.device import pick_device
from subbit.errors import UserError
from subbit.evaluation.perplexity import evaluate_perplexity
from subbit.loading import open_any
from subbit.models.layout import find_layout, layer_linears
from subbit.models.source import model_digest, open_source
from subbit.pipeline import compress
from subbit.process import environment, peak_bytes, read_job
from subbit.progress import ConsoleProgress
from subbit.recipe import Recipe

__all__ = ["KINDS", "main"]

# ---- the three kinds of tasks ----------------------------------------------------------------------------------------


def describe_model(task: Task) -> None:
    """Digest and size of the dense model."""
    source = open_source(task.model, task.trust_remote_code)
    skeleton = source.skeleton()
    linears = layer_linears(find_layout(skeleton).layers(skeleton))
    weights = sum(linear.weight.numel() for linear in linears.values())
    parameters = sum(source.tensor(name).numel() for name in source.names)
    size = source.dtype.itemsize
    save_facts(
        task,
        digest=model_digest(source),
        bits={"nominal": 8 * size, "stored": 8 * size, "model": 8 * size},
        bytes={"linears": weights * size, "file": parameters * size},
        linear_weights=weights,
        parameters=parameters,
    )


def compress_entry(task: Task) -> None:
    """Compress, or go on with it, and describe the checkpoint.

    Seconds are those of all attempts together; the facts are saved whenever a layer is done, so that an attempt that
    is killed counts as well.
    """
    before = read_facts(Path(task.facts)).get("compress", {})
    complete = (Path(task.checkpoint) / "config.json").exists()  # by an earlier sweep: its seconds are the ones to know
    started = time.monotonic()

    def save() -> None:
        seconds = before.get("seconds", 0.0) + time.monotonic() - started
        peak = max(before.get("peak_bytes", 0), peak_bytes())
        save_facts(task, compress={"seconds": round(seconds, 2), "peak_bytes": peak, **environment(task.device)})

    compress(
        task.model,
        Recipe.create(task.recipe or {}),
        task.checkpoint,
        resume=True,
        device=task.device,
        trust_remote_code=task.trust_remote_code,
        progress=ConsoleProgress() if complete else SavingProgress(save),
    )
    if not complete:
        save()
    save_facts(task, **describe_checkpoint(task.checkpoint))


class SavingProgress(ConsoleProgress):
    """Calls back with every line: the pipeline writes one when a layer is done."""

    def __init__(self, save: Any) -> None:
        super().__init__()
        self._save = save

    def line(self, text: str) -> None:
        """The line, and the call."""
        super().line(text)
        self._save()


def describe_checkpoint(directory: str) -> dict[str, Any]:
    """What a result says of a checkpoint: bits, bytes, errors; the mean error is over linears."""
    facts = subbit.inspect(directory)
    errors = [linear["error"] for layer in facts["layers"] for linear in layer["linears"]]
    known = [error for error in errors if error is not None]
    sizes = {"linears": "linear_bytes", "embeddings": "embedding_bytes", "others": "dense_bytes"}
    sizes |= {"headers": "header_bytes", "file": "file_bytes"}
    return {
        "bits": facts["bits"],
        "bytes": {name: facts[field] for name, field in sizes.items()},
        "linear_weights": facts["linear_weights"],
        "parameters": facts["parameters"],
        "output_error": sum(known) / len(known) if known else None,
        "layer_errors": [layer["error"] for layer in facts["layers"]],
        "left_dense": sorted(facts["left_dense"]),
        "calibration": facts["calibration"],
    }


def evaluate_entry(task: Task) -> None:
    """Perplexity on every data set that the facts do not have yet; they are saved after each."""
    values = task.protocol or {}
    protocol = Protocol(**{**values, "datasets": tuple(values["datasets"])})
    progress = ConsoleProgress()
    measured = read_facts(Path(task.facts)).get("perplexity", {})
    missing = [dataset for dataset in protocol.datasets if dataset_key(dataset, protocol) not in measured]
    if not missing:
        return
    device = str(pick_device(task.device))
    opened = open_any(task.checkpoint or task.model, task.trust_remote_code)
    model, tokenizer = opened.load(getattr(torch, protocol.dtype), device, task.unpack)
    for dataset in missing:
        with progress.stage(f"perplexity on {dataset}") as report:
            result = evaluate_perplexity(
                model,
                tokenizer,
                dataset,
                split=protocol.split,
                seq_len=protocol.seq_len,
                max_windows=protocol.max_windows,
                progress=report,
            )
        facts = {**dataclasses.asdict(result), "protocol": result.protocol, "peak_bytes": peak_bytes()}
        facts |= {"dataset": dataset_name(dataset), "unpacked": task.unpack, **environment(task.device)}
        facts["value"] = result.value if math.isfinite(result.value) else None  # JSON has no infinity; nll has it all
        measured[dataset_key(dataset, protocol)] = facts
        save_facts(task, perplexity=measured)


# ---- the process -----------------------------------------------------------------------------------------------------

KINDS = {"model": describe_model, "compress": compress_entry, "evaluate": evaluate_entry}


def main() -> int:
    """Exit codes: 0 done, 2 a mistake of the user, 1 one of ours; the facts then have the error in one line."""
    task = Task(**read_job())
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        KINDS[task.kind](task)
    except UserError as error:
        save_facts(task, error=str(error))
        return 2
    except Exception as error:  # whatever it is, it must not stop the other entries
        traceback.print_exc()
        save_facts(task, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
