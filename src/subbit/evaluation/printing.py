"""What `subbit eval` shows a person."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from subbit.evaluation.divergence import Divergence
from subbit.evaluation.perplexity import Perplexity
from subbit.evaluation.record import plain
from subbit.evaluation.suite import Evaluation
from subbit.evaluation.zero_shot import ZeroShot, paper_mean

__all__ = ["as_json", "print_evaluation"]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All results by kind and name; a number that JSON does not have is None."""
    return {kind: plain(results) for kind, results in dataclasses.asdict(evaluation).items()}


def print_evaluation(evaluation: Evaluation) -> None:
    """Lines for every text, then a table of the tasks."""
    for name, result in evaluation.perplexity.items():
        for line in _perplexity_lines(name, result):
            print(line)
        if name in evaluation.divergence:
            for line in _divergence_lines(name, evaluation.divergence[name]):
                print(line)
    if evaluation.zero_shot:
        _print_tasks(evaluation.zero_shot)
    for name, reason in evaluation.skipped.items():
        print(f"{name}: skipped, {reason}")


def _perplexity_lines(name: str, result: Perplexity) -> Iterator[str]:
    error = "" if result.standard_error is None else f" ± {result.standard_error:.2f} (standard error)"
    yield f"{name} {result.split} perplexity: {result.value:.3f}{error}"
    yield f"  {result.protocol}, {result.backend}; {result.origin}; {result.tokens_per_second:.0f} tokens/s"


def _divergence_lines(name: str, result: Divergence) -> Iterator[str]:
    yield (
        f"{name} {result.split} KL(dense ‖ model): mean {result.mean:.4f}{_error(result.standard_error, 4)}, "
        f"median {result.median:.4f}, 99th percentile {result.p99:.3f}, maximum {result.maximum:.3f} nats a token"
    )
    top1_error = None if result.top1_standard_error is None else 100 * result.top1_standard_error
    yield f"  same top token: {100 * result.top1:.2f}{_error(top1_error, 2)} %"
    yield f"  dense: {result.reference} in float32, perplexity {result.reference_perplexity:.3f} on the same windows"


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"


def _print_tasks(results: Mapping[str, ZeroShot]) -> None:
    """In percent, 80 columns wide; the standard errors are of the numbers before them."""
    names = ("acc", "acc_norm", "chance", "constant", "items")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("zero-shot, %", no_wrap=True), *columns)
    for name, result in results.items():
        items = f"{result.items:,}" + (f"/{result.items_in_all:,}" if result.items < result.items_in_all else "")
        accuracies = (result.accuracy, result.standard_error), (result.accuracy_norm, result.standard_error_norm)
        baselines = ((result.chance, None), (result.constant, None))
        table.add_row(name, *(_percent(*number) for number in (*accuracies, *baselines)), items)
    mean = paper_mean(results)
    if mean is not None:
        table.add_section()
        table.add_row("mean of seven", _percent(mean[0], mean[1]), "", _percent(mean[2], None), "", "")
    Console().print(table)
    one = next(iter(results.values()))
    print(f"  0-shot, {one.harness}, {one.dtype}, {one.backend}; constant: the best fixed answer to every item")
    if mean is not None:
        print("  mean of seven: the tasks of the papers, which is all but lambada_openai")
    for name, result in results.items():
        print(f"  {name}: {result.origin}" + (f" ({result.note})" if result.note else ""))


def _percent(share: float | None, error: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}" + _error(None if error is None else 100 * error, 1)
