"""What each choice of STBLLM and PBS²P is worth: relative output error of real linears, one choice changed at a time.

    python benchmarks/layer_error.py MODEL --calibration wikitext2 --json FILE

The statistics are those of the dense model (no error of earlier layers), the error is tr(E H Eᵀ) / tr(W H Wᵀ) on the
calibration text. Prints a table, variants × linears; --json keeps it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from real_linears import RealLinear, add_arguments, facts_of, real_linears
from rich.console import Console
from rich.table import Table
from torch import Tensor
from user_errors import run

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.layerwise import relative_output_error
from subbit.methods import METHODS
from subbit.methods.pbs2p import Pbs2pOptions
from subbit.methods.stbllm import StbllmOptions

KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Subject:
    """One real linear with its statistics."""

    name: str
    weight: Tensor
    gram: Tensor
    factor: InverseFactor


def variants() -> dict[str, tuple[str, Any]]:
    """Name → (method, options): the papers as written, then one choice after the other, then our defaults."""
    stbllm = StbllmOptions(compensation="diagonal", metric="gram")
    pbs2p = Pbs2pOptions(compensation="diagonal", metric="gram", rescore=False)
    ours = StbllmOptions()
    return {
        "stbllm: paper": ("stbllm", stbllm),
        "  activation exponent 0.5": ("stbllm", replace(stbllm, activation_exponent=0.5)),
        "  SI not standardized": ("stbllm", replace(stbllm, standardize=False)),
        "  score magnitude": ("stbllm", replace(stbllm, score="magnitude")),
        "  score wanda": ("stbllm", replace(stbllm, score="wanda")),
        "  score sparsegpt": ("stbllm", replace(stbllm, score="sparsegpt")),
        "  no compensation inside the block": ("stbllm", replace(stbllm, prune_compensation=False)),
        "  no compensation": ("stbllm", replace(stbllm, compensation="off")),
        "  grouping bell": ("stbllm", replace(stbllm, grouping="bell")),
        "  grouping none": ("stbllm", replace(stbllm, grouping="none")),
        "  no salient columns": ("stbllm", replace(stbllm, salient_columns=0)),
        "  search on saliency": ("stbllm", replace(stbllm, search_on="saliency")),
        "  scales on the Gram": ("stbllm", replace(stbllm, scales="gram")),
        "  exact compensation (our default)": ("stbllm", ours),
        "  exact, scales on the conditional Gram": ("stbllm", replace(ours, scales="gram")),
        "pbs2p: paper": ("pbs2p", pbs2p),
        "  at once": ("pbs2p", replace(pbs2p, steps=1)),
        "  re-scored": ("pbs2p", replace(pbs2p, rescore=True)),
        "  exact compensation": ("pbs2p", replace(pbs2p, compensation="exact")),
        "  conditional Gram": ("pbs2p", replace(pbs2p, metric="conditional")),
        "  exact, conditional": ("pbs2p", replace(pbs2p, compensation="exact", metric="conditional")),
        "  exact, conditional, re-scored (our default)": ("pbs2p", Pbs2pOptions()),
        "  our default, at once": ("pbs2p", Pbs2pOptions(steps=1)),
    }


def main() -> None:
    """Collect the linears, run every variant on each, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(samples=32)
    parser.add_argument("--clip-norm", type=float, default=2.0)
    parser.add_argument("--sparsity", default="4:8")
    parser.add_argument("--layers", type=int, nargs="+", help=f"{', '.join(KINDS)} of these instead of --linears")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.layers:
        args.linears = [f"{layer}.{kind}" for layer in args.layers for kind in KINDS]
    with torch.inference_mode():
        subjects = [subject_of(linear, args.clip_norm) for linear in real_linears(args, [args.clip_norm])]
        results = {}
        for name, (method, options) in variants().items():
            started = time.perf_counter()
            errors = {s.name: error_of(s, method, options, Sparsity.parse(args.sparsity)) for s in subjects}
            results[name] = {"errors": errors, "seconds": round(time.perf_counter() - started, 2)}
    show(results)
    if args.json:
        args.json.write_text(json.dumps({"arguments": facts_of(args), "results": results}, indent=1) + "\n")


def subject_of(linear: RealLinear, clip_norm: float) -> Subject:
    """A linear, ready for every variant."""
    gram = linear.grams[clip_norm]
    return Subject(linear.name, linear.weight, gram, inverse_factor(gram))


def error_of(subject: Subject, method: str, options: Any, sparsity: Sparsity) -> float:
    """Relative output error of one variant on one linear."""
    result = METHODS[method].run(subject.weight, subject.gram, subject.factor, sparsity, options)
    return relative_output_error(subject.weight, result.dense(), subject.gram)


def show(results: dict[str, dict[str, Any]]) -> None:
    """Variants × linears, with the mean."""
    names = list(next(iter(results.values()))["errors"])
    table = Table("", *names, "mean", "s")
    for variant, result in results.items():
        errors = list(result["errors"].values())
        mean = sum(errors) / len(errors)
        table.add_row(variant, *(f"{e:.3f}" for e in errors), f"{mean:.4f}", f"{result['seconds']:.0f}")
    Console(width=max(100, 46 + 13 * len(names))).print(table)


if __name__ == "__main__":
    run(main)
