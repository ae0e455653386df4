"""Accuracy on the zero-shot tasks of the papers and on LAMBADA, measured by lm-evaluation-harness.

A task whose file is in the data folder is read from there (`tasks/loader.py` says how); the others are lm-eval's own,
which fetch their data from the hub. Either way prompts, scoring and metrics are lm-eval's.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from subbit.calibration.text import eval_mode
from subbit.errors import UserError
from subbit.evaluation.perplexity import backend_of
from subbit.evaluation.tasks.loader import LOCAL_TASKS, find_file
from subbit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ALL", "PAPER_TASKS", "TASKS", "PreparedTasks", "ZeroShot", "paper_mean", "prepare_tasks", "zero_shot"]

PAPER_TASKS = ("winogrande", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge", "rte")
TASKS = (*PAPER_TASKS, "lambada_openai")
ALL = "all"


@dataclass(frozen=True)
class ZeroShot:
    """The accuracy on one task; every share is between 0 and 1.

    accuracy_norm divides log-likelihoods by the length of the answer; None where the task does not have it. chance is
    what guessing gives, mean of 1 / number of answers; constant is what the best fixed answer gives ("yes" to every
    question of BoolQ). Both are of the items evaluated, and None where there are no answers to choose from.
    """

    task: str
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None
    standard_error_norm: float | None
    chance: float | None
    constant: float | None
    items: int
    items_in_all: int
    origin: str
    note: str
    harness: str
    batch_size: int
    dtype: str
    backend: str
    seconds: float


@dataclass(frozen=True)
class PreparedTask:
    """A task whose data are loaded."""

    task: Any  # lm-eval's object
    origin: str
    note: str = ""  # how its items differ from those of lm-eval's own task


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks by name, and the names of those that cannot be had, with the reason."""

    tasks: Mapping[str, PreparedTask] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def prepare_tasks(names: Sequence[str], progress: Progress) -> PreparedTasks:
    """Load the data of tasks before a model is loaded.

    names: of `TASKS`, or "all". Raises UserError for an unknown name, a malformed file, if lm-eval is not installed,
    or if no task can be had.
    """
    unknown = next((name for name in names if name not in (*TASKS, ALL)), None)
    wanted = list(dict.fromkeys(TASKS if ALL in names else names))
    if unknown is not None:
        raise UserError(f"unknown task {unknown!r}: choose {', '.join(TASKS)}, or all")
    if not wanted:
        return PreparedTasks()
    if any(importlib.util.find_spec(package) is None for package in ("lm_eval", "accelerate")):
        raise UserError('zero-shot tasks need lm-evaluation-harness; run: pip install "subbit[eval]"')
    from subbit.evaluation.harness import hub_tasks, local_tasks

    here = [name for name in wanted if find_file(name)]
    tasks = {
        name: PreparedTask(task, f"tasks/{LOCAL_TASKS[name].file}", LOCAL_TASKS[name].note)
        for name, task in local_tasks(here).items()
    }
    elsewhere = [name for name in wanted if name not in here]
    if elsewhere:
        progress.line(f"fetching from the Hugging Face hub: {', '.join(elsewhere)}")
    fetched, failed = hub_tasks(elsewhere)
    tasks |= {name: PreparedTask(task, f"lm-eval's {name} on the Hugging Face hub") for name, task in fetched.items()}
    skipped = {
        name: f"tasks/{LOCAL_TASKS[name].file} is not in the data folder, and {reason}"
        for name, reason in failed.items()
    }
    if not tasks:
        name, reason = next(iter(skipped.items()))
        raise UserError(f"no task can be had ({name}: {reason}): set SUBBIT_DATA to a folder with tasks/, or go online")
    return PreparedTasks({name: tasks[name] for name in wanted if name in tasks}, skipped)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: PreparedTasks,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Progress,
) -> dict[str, ZeroShot]:
    """Evaluate on every prepared task.

    limit: only so many items from the start of each. batch_size: None chooses by memory.
    Raises UserError for NaN logits, an answer longer than the model's context, or too little memory.
    """
    if not prepared.tasks:
        return {}
    from subbit.evaluation.harness import HarnessModel

    harness = HarnessModel(model, tokenizer, batch_size)
    results = {}
    for name, task in prepared.tasks.items():
        with progress.stage(name) as report, eval_mode(model):
            harness.report = report
            results[name] = _measure(harness, name, task, limit)
    return results


def _measure(harness: Any, name: str, prepared: PreparedTask, limit: int | None) -> ZeroShot:
    from subbit.evaluation.harness import run_task

    started = time.perf_counter()
    metrics, items, in_all = run_task(harness, prepared.task, limit)
    seconds = time.perf_counter() - started
    chance, constant = _baselines(prepared.task)
    norm = metrics.get("acc_norm")
    return ZeroShot(
        task=name,
        accuracy=float(metrics["acc"]),
        standard_error=_standard_error(metrics["acc"], items),
        accuracy_norm=None if norm is None else float(norm),
        standard_error_norm=None if norm is None else _standard_error(norm, items),
        chance=chance,
        constant=constant,
        items=items,
        items_in_all=in_all,
        origin=prepared.origin,
        note=prepared.note,
        harness=f"lm-eval {version('lm-eval')}",
        batch_size=int(harness.batch_size),
        dtype=str(harness.model.dtype).removeprefix("torch."),
        backend=backend_of(harness.model),
        seconds=seconds,
    )


def _standard_error(share: float, items: int) -> float | None:
    """Of the mean of zeros and ones, sample variance as lm-eval has it; None for a single item."""
    return math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else None


def _baselines(task: Any) -> tuple[float | None, float | None]:
    """Chance and the best constant answer over the items of a task that was evaluated."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, None
    answers = Counter(instance.doc_id for instance in task.instances)
    # Where the alternatives are contexts (Winogrande), lm-eval's "text" is the number of the right one.
    right = task.doc_to_text if task.multiple_input else task.doc_to_target
    keys = Counter(right(instance.doc) for instance in task.instances if instance.idx == 0)
    items = len(answers)
    return sum(1 / count for count in answers.values()) / items, max(keys.values()) / items


def paper_mean(results: Mapping[str, ZeroShot]) -> tuple[float, float | None, float] | None:
    """Mean accuracy of the papers' seven tasks, its standard error, and that of guessing; None unless all are there."""
    if not all(name in results for name in PAPER_TASKS):
        return None
    seven = [results[name] for name in PAPER_TASKS]
    errors = [result.standard_error for result in seven]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(e * e for e in known)) / len(seven) if len(known) == len(seven) else None
    chance = sum(result.chance or 0.0 for result in seven) / len(seven)
    return sum(result.accuracy for result in seven) / len(seven), error, chance
