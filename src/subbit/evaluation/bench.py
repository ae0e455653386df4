"""How fast a compressed checkpoint loads, reads and writes, and how much memory it takes, beside its dense model."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from subbit.checkpoint.reader import Checkpoint, is_compressed, open_checkpoint
from subbit.errors import UserError
from subbit.loading import check_dense
from subbit.process import how_it_ended, run_module
from subbit.progress import Progress, SilentProgress

__all__ = ["Bench", "Job", "Measured", "Round", "bench", "bench_table"]

DENSE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Job:
    """What a worker measures."""

    path: str
    dtype: str | None  # of a dense model; None: a compressed checkpoint, as it is
    prompt_tokens: int
    new_tokens: int
    threads: int | None


@dataclass(frozen=True)
class Round:
    """What a worker found."""

    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    load_seconds: float  # model and tokenizer
    peak_bytes: int  # the most memory that the process ever had, Python and its libraries included
    resident_bytes: int  # when all tokens were written
    model_bytes: int  # of these, what the process did not have before it loaded the model
    bytes_per_token: int  # weights in memory that a decoded token needs
    dtype: str  # of the activations
    environment: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds of one model; numbers are None if it failed, and ``error`` says why."""

    name: str
    dtype: str | None
    file_bytes: int | None  # of its weight files; None where they are not in a local directory
    prompt_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    load_seconds: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    model_bytes: int | None = None
    bytes_per_token: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Bench:
    """Everything that was measured, and how."""

    directory: str
    dense: str | None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    models: tuple[Measured, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Contender:
    """One of the models."""

    name: str
    path: str
    dtype: str | None
    file_bytes: int | None


def bench(
    directory: str | Path,
    dense: str | Path | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    dense_dtypes: Sequence[str] = DENSE_DTYPES,
    progress: Progress | None = None,
) -> Bench:
    """Measure a compressed checkpoint and its dense model on the CPU, batch 1, greedy decoding with a KV cache.

    Every measurement is a process of its own, which loads the model, reads the prompt once to warm up, and is timed.
    The models take turns, and figures are medians over the rounds. Only one model is in memory at a time.

    Args:
        dense: a directory or hub id; default: the path that the checkpoint's config.json names, if it is there.
        threads: of torch; default: as many as torch takes.
        dense_dtypes: dtypes in which the dense model is measured.

    Raises:
        UserError: a checkpoint or model that cannot be used, more tokens than the context, counts below 1. A model that
            ends its process, by taking all memory for example, is a result with an ``error``.
    """
    progress = progress or SilentProgress()
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "rounds": rounds, "threads": threads}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{count} {name}: give 1 or more")
    checkpoint = open_checkpoint(directory)
    given = dense_model(checkpoint, dense)
    notes = () if given else ("the dense model is not known: give its path with --dense to measure it too",)
    contenders = [Contender(f"dense {dtype}", given, dtype, weight_bytes(given)) for dtype in dense_dtypes if given]
    contenders.append(Contender(f"packed {kinds(checkpoint)}".strip(), str(directory), None, checkpoint.file_bytes))
    found = run_rounds(contenders, Job("", None, prompt_tokens, new_tokens, threads), rounds, progress)
    models = tuple(summarize(contender, found[contender]) for contender in contenders)
    ran = next((one for runs in found.values() for one in runs if isinstance(one, Round)), None)
    environment = ran.environment if ran else {}
    return Bench(str(directory), given, prompt_tokens, new_tokens, rounds, models, environment, notes)


def dense_model(checkpoint: Checkpoint, given: str | Path | None) -> str | None:
    """The dense model of a checkpoint: the one that is given, or that its config names and that is there; or None."""
    if given is not None:
        check_dense(given)
        return str(given)
    names = (checkpoint.config.get(key) for key in ("_name_or_path", "_model_name_or_path"))
    there = (name for name in names if isinstance(name, str) and name and (Path(name) / "config.json").exists())
    return next((name for name in there if not is_compressed(Path(name))), None)


def weight_bytes(model: str) -> int | None:
    """Bytes of the safetensors files of a local directory."""
    sizes = [path.stat().st_size for path in Path(model).glob("*.safetensors")]
    return sum(sizes) if sizes else None


def kinds(checkpoint: Checkpoint) -> str:
    """``codes 2:8``: method and N:M of a checkpoint."""
    quantization = checkpoint.config["quantization_config"]
    return f"{quantization['method']} {quantization['sparsity']}".strip()


def run_rounds(
    contenders: Sequence[Contender], job: Job, rounds: int, progress: Progress
) -> dict[Contender, list[Round | str]]:
    """All models in turn, ``rounds`` times; one that failed is not run again."""
    found: dict[Contender, list[Round | str]] = {contender: [] for contender in contenders}
    with progress.stage("bench") as report:
        for turn in range(rounds):
            for place, contender in enumerate(contenders):
                report(turn * len(contenders) + place, rounds * len(contenders))
                if not any(isinstance(one, str) for one in found[contender]):
                    own = dataclasses.replace(job, path=contender.path, dtype=contender.dtype)
                    found[contender].append(run_worker(own))
    return found


def run_worker(job: Job) -> Round | str:
    """One measurement, or in a line why there is none; UserError for a mistake of the user."""
    code, output = run_module("subbit.evaluation.bench_worker", job)
    if code < 0:
        return how_it_ended("the process", code)
    try:
        result = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return how_it_ended("the process", code)
    if "error" in result:
        raise UserError(result["error"])
    return Round(**result)


def summarize(contender: Contender, runs: Sequence[Round | str]) -> Measured:
    """Medians, or the error."""
    rounds = [run for run in runs if isinstance(run, Round)]
    error = next((run for run in runs if isinstance(run, str)), None)
    if error is not None or not rounds:
        return Measured(contender.name, contender.dtype, contender.file_bytes, error=error)
    numbers = {
        field.name: statistics.median(getattr(run, field.name) for run in rounds)
        for field in dataclasses.fields(Round)
        if field.name not in ("dtype", "environment")
    }
    whole = {
        name: round(value) if name.endswith(("bytes", "bytes_per_token")) else value for name, value in numbers.items()
    }
    return Measured(contender.name, rounds[0].dtype, contender.file_bytes, **whole)


# What a row of the table shows of a model: a field, what a unit of it is divided by, digits.
ROWS = {
    "prompt, tokens per second": ("prompt_tokens_per_second", 1, 1),
    "decoding, tokens per second": ("decode_tokens_per_second", 1, 2),
    "load time, s": ("load_seconds", 1, 2),
    "weight files, MB": ("file_bytes", 1e6, 1),
    "weights read per token, MB": ("bytes_per_token", 1e6, 1),
    "memory of the model, MB": ("model_bytes", 1e6, 1),
    "peak memory, with Python, MB": ("peak_bytes", 1e6, 1),
}


def bench_table(result: Bench) -> Table:
    """For a person: a column for every model."""
    machine = result.environment.get("machine", {})
    where = f"{machine['processor']}, {machine['threads']} threads" if machine else ""
    how = f"{result.prompt_tokens} prompt tokens, then {result.new_tokens}, medians of {result.rounds} rounds"
    names = [Column(model.name, justify="right") for model in result.models]
    table = Table("", *names, caption=f"{where}\n{how}".strip(), caption_justify="left")
    table.add_row("activations", *(model.dtype or "–" for model in result.models))
    for title, (field, unit, digits) in ROWS.items():
        values = (getattr(model, field) for model in result.models)
        table.add_row(title, *("–" if value is None else f"{value / unit:,.{digits}f}" for value in values))
    return table
