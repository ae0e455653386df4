"""Is the fast code ever worse than the slow? Output errors of ours and of the papers' equations taken literally.

    python benchmarks/literal_error.py MODEL --rows 128 --statistics grams.safetensors --json FILE

Three errors of every linear and method, on the calibration text, each tr(E H Eᵀ) / tr(W H Wᵀ) in float64:

    literal       the transcription of the paper's equations in tests/reference.py, numpy loops in float64
    as written    ours with the paper's choices (compensation diagonal, metric gram)
    ours          with our defaults

The transcription of ARB-LLM_RC has one scale for every column, as our format does; *as published* is that of the
authors' code, with a scale of its own for every (column, set, sign).

The literal code takes 4 to 13 ms for every row of every block. --rows takes so many rows of every linear, evenly
spaced, for all three. Rows meet only in the searches for columns and thresholds, in the column sums of SI and in the
column scales of RC, which then are those of these rows. --json is written after every linear, and continued if it is
there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_linears import add_arguments, facts_of, real_linears
from torch import Tensor
from user_errors import run

from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.layerwise import relative_output_error
from subbit.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import Blockwise, Floats, StbllmChoices, stbllm_linear
from reference_baselines import (
    ArbChoices,
    BillmChoices,
    arb_linear,
    billm_linear,
    published_rc_linear,
    round_all_scales,
)

Results = dict[str, dict[str, dict[str, float]]]  # case → linear → what `compare` found

LITERAL: dict[str, tuple[Any, Any]] = {
    "billm": (billm_linear, BillmChoices),
    "arb": (arb_linear, ArbChoices),
    "stbllm": (stbllm_linear, StbllmChoices),
    "arb as published": (published_rc_linear, ArbChoices),
}


@dataclass(frozen=True)
class Case:
    """A method at one setting."""

    method: str
    sparsity: str
    options: dict[str, Any] = field(default_factory=dict)
    literal: str = ""  # the transcription; the method's own unless said

    def ours(self, written: bool) -> Any:
        """Our options, as the paper has them or with our defaults."""
        options = METHODS[self.method].options(**self.options)
        return replace(options, compensation="diagonal", metric="gram") if written else options


CASES = {
    "billm": Case("billm", "none"),
    "billm 4:8": Case("billm", "4:8"),
    "arb x": Case("arb", "none", {"variant": "x"}),
    "arb x 4:8": Case("arb", "4:8", {"variant": "x"}),
    "arb rc": Case("arb", "none", {"variant": "rc"}),
    "arb rc 4:8": Case("arb", "4:8", {"variant": "rc"}),
    "stbllm 4:8": Case("stbllm", "4:8"),
    "arb rc as published": Case("arb", "none", {"variant": "rc"}, "arb as published"),
    "arb rc 4:8 as published": Case("arb", "4:8", {"variant": "rc"}, "arb as published"),
}


def literal_dense(weight: Tensor, gram: Tensor, case: Case) -> Floats:
    """(out, in): what the transcription makes of a linear, with the paper's choices."""
    run, choices = LITERAL[case.literal or case.method]
    options, sparsity = asdict(case.ours(written=True)), Sparsity.parse(case.sparsity)
    common = {name: options[name] for name in Blockwise.__dataclass_fields__ if name in options}
    own = {name: options[name] for name in choices.__dataclass_fields__}
    shared = Blockwise(sparsity.n, sparsity.m, **common, settle=round_all_scales)
    W, H = weight.double().numpy(), gram.double().numpy()
    return np.asarray(run(W, H, shared, choices(**own)).dense, dtype=np.float64)


def compare(weight: Tensor, gram: Tensor, case: Case) -> dict[str, float]:
    """The three errors, and how long the literal code took."""

    def error(dense: Tensor) -> float:
        return relative_output_error(weight.double(), dense.double(), gram.double())

    def error_of_ours(written: bool) -> float:
        options, known = case.ours(written), METHODS[case.method]
        factor = inverse_factor(gram, options.damping)
        return error(known.run(weight, gram, factor, Sparsity.parse(case.sparsity), options).dense())

    started = time.process_time()
    literal = error(torch.from_numpy(literal_dense(weight, gram, case)))
    seconds = round(time.process_time() - started, 1)
    errors = {"literal": literal, "as_written": error_of_ours(True), "ours": error_of_ours(False)}
    return {**errors, "rows": len(weight), "literal_seconds": seconds}


def some_rows(weight: Tensor, count: int) -> Tensor:
    """So many rows, evenly spaced; 0: all."""
    if not 0 < count < len(weight):
        return weight
    return weight[torch.linspace(0, len(weight) - 1, count).round().long()]


def summary(results: Results) -> dict[str, dict[str, float]]:
    """Of every case the mean errors, and by how much ours differs from the literal at worst (negative: better)."""
    rows = {}
    for name, linears in results.items():
        if not linears:
            continue
        means = {
            key: float(np.mean([one[key] for one in linears.values()])) for key in ("literal", "as_written", "ours")
        }
        worst = {
            f"{key}_at_worst": max(one[key] / one["literal"] - 1 for one in linears.values())
            for key in ("as_written", "ours")
        }
        rows[name] = {"linears": len(linears), **means, **worst}
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    """One line a case."""
    print(f"{'':<26}{'linears':>8}{'literal':>10}{'as written':>12}{'ours':>9}   at worst: as written, ours")
    for name, row in rows.items():
        worst = f"{row['as_written_at_worst']:>+18.3%}{row['ours_at_worst']:>+11.2%}"
        means = f"{row['literal']:>10.5f}{row['as_written']:>12.5f}{row['ours']:>9.5f}"
        print(f"{name:<26}{row['linears']:>8}{means}{worst}")


def read(args: argparse.Namespace) -> Results:
    """What an earlier run has written; ends the program if that had other arguments."""
    if not (args.json and args.json.exists()):
        return {}
    found = json.loads(args.json.read_text())
    if {**found["arguments"], "cases": None} != {**facts_of(args), "cases": None}:
        raise SystemExit(f"{args.json} is of other arguments: {found['arguments']}")
    results: Results = found["results"]
    return results


def write(args: argparse.Namespace, results: Results) -> None:
    """All there is so far."""
    facts = {"arguments": facts_of(args), "summary": summary(results), "results": results}
    args.json.write_text(json.dumps(facts, indent=1) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--clip-norm", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=0, help="of every linear, evenly spaced; 0: all")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(None if arguments is None else list(arguments))
    results = read(args)
    with torch.inference_mode():
        linears = real_linears(args, sorted({0.0, args.clip_norm}))
        for name in args.cases:
            done = results.setdefault(name, {})
            for linear in linears:
                if linear.name in done:
                    continue
                weight = some_rows(linear.weight, args.rows)
                done[linear.name] = compare(weight, linear.grams[args.clip_norm], CASES[name])
                print(name, linear.name, done[linear.name], flush=True)
                if args.json:
                    write(args, results)
    show(summary(results))


if __name__ == "__main__":
    run(main)
