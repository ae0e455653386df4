"""Do the orders that the papers claim hold, linear by linear? Real linears, or synthetic ones.

    python benchmarks/order_claims.py MODEL --statistics grams.safetensors --json FILE
    python benchmarks/order_claims.py --synthetic 10 --json FILE

A claim says that one choice leaves less output error, tr(E H Eᵀ) / tr(W H Wᵀ), than another:

    STBLLM    SI ≤ Wanda ≤ magnitude as the pruning score; three regions (trisection) < two (bell)
    PBS²P     the same, and pruning in M − N steps < pruning at once

each with the paper's choices (*written*: compensation diagonal, metric gram, PBS²P scoring once) and with our defaults
(*ours*, where PBS²P scores by what dropping a weight loses and so has no pruning score to choose), with token norms
clipped at twice the median and as they are. Adaptive N is a claim about whole models and is not here.

Synthetic layers have Gaussian weights and correlated Gaussian inputs. Heavy tails have the sizes of the columns of the
weight (*weights*), of the inputs (*inputs*), of both, larger inputs to smaller weights (*opposed*), or none (*plain*).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from real_linears import RealLinear, add_arguments, facts_of, real_linears
from torch import Tensor
from user_errors import run

from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.layerwise import relative_output_error
from subbit.methods import METHODS

CLIPS = {0.0: "not clipped", 2.0: "clipped at 2 ×"}
WRITTEN: dict[str, dict[str, Any]] = {
    "stbllm": {"compensation": "diagonal", "metric": "gram"},
    "pbs2p": {"compensation": "diagonal", "metric": "gram", "rescore": False},
}
SYNTHETIC = ("plain", "weights", "inputs", "opposed")
ROWS, COLUMNS, TOKENS = 384, 640, 4096


@dataclass(frozen=True)
class Claim:
    """``better`` should leave less error than ``worse``; ``base`` is what both share beside the setting."""

    method: str
    name: str
    better: dict[str, Any]
    worse: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ("written", "ours")

    def options(self, changes: dict[str, Any], setting: str) -> Any:
        """Options with one of the two sides."""
        defaults = METHODS[self.method].options(**(WRITTEN[self.method] if setting == "written" else {}))
        return replace(defaults, **{**self.base, **changes})


def score_claims(method: str, *settings: str) -> list[Claim]:
    """SI ≤ Wanda ≤ magnitude."""
    pairs = [("si", "wanda"), ("wanda", "magnitude"), ("si", "magnitude")]
    return [Claim(method, f"{a} ≤ {b}", {"score": a}, {"score": b}, {}, settings) for a, b in pairs]


CLAIMS = [
    *score_claims("stbllm", "written", "ours"),
    Claim("stbllm", "trisection < bell", {"grouping": "trisection"}, {"grouping": "bell"}),
    *score_claims("pbs2p", "written"),
    Claim("pbs2p", "trisection < bell", {"grouping": "trisection"}, {"grouping": "bell"}),
    Claim("pbs2p", "M − N steps < at once", {}, {"steps": 1}),
    Claim("pbs2p", "M − N steps < at once, scored again", {}, {"steps": 1}, {"rescore": True}, ("written",)),
]


def claims_of(linear: RealLinear, clip: float, sparsity: Sparsity) -> list[dict[str, Any]]:
    """Both errors of every claim in both settings."""
    gram = linear.grams[clip]
    factor = inverse_factor(gram)

    @cache
    def error(method: str, options: Any) -> float:
        dense = METHODS[method].run(linear.weight, gram, factor, sparsity, options).dense()
        return relative_output_error(linear.weight.double(), dense.double(), gram.double())

    return [
        {
            "claim": f"{claim.method}: {claim.name}",
            "setting": setting,
            "tokens": CLIPS[clip],
            "linear": linear.name,
            "better": error(claim.method, claim.options(claim.better, setting)),
            "worse": error(claim.method, claim.options(claim.worse, setting)),
        }
        for claim in CLAIMS
        for setting in claim.settings
    ]


def synthetic_linear(kind: str, seed: int) -> RealLinear:
    """One synthetic layer; sizes with heavy tails are exp(normal), some tens of times the median at most."""
    generator = torch.Generator().manual_seed(seed)

    def sizes() -> Tensor:
        return torch.randn(COLUMNS, generator=generator).exp()

    inputs, weights = torch.ones(COLUMNS), torch.ones(COLUMNS)
    if kind == "weights":
        weights = sizes()
    elif kind == "inputs":
        inputs = sizes()
    elif kind == "opposed":
        inputs = sizes()
        weights = inputs.rsqrt() * (0.3 * torch.randn(COLUMNS, generator=generator)).exp()
    mix = torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    tokens = torch.randn(TOKENS, COLUMNS, generator=generator) @ mix * inputs
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator) * weights
    return RealLinear(f"{kind} {seed}", weight, {0.0: tokens.T @ tokens / TOKENS})


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every claim, setting and Gram: mean errors, in how many linears it holds, in how many both are the same."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["claim"], row["setting"], row["tokens"], row.get("kind", ""))
        found.setdefault(key, []).append(row)
    return [
        {
            **dict(zip(("claim", "setting", "tokens", "kind"), key, strict=True)),
            "linears": len(same),
            "better": sum(row["better"] for row in same) / len(same),
            "worse": sum(row["worse"] for row in same) / len(same),
            "holds": sum(row["better"] < row["worse"] for row in same),
            "equal": sum(row["better"] == row["worse"] for row in same),
        }
        for key, same in found.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """One line for every claim in every setting."""
    print(f"{'claim':<44}{'setting':<9}{'':<16}{'better':>8}{'worse':>9}   holds in")
    for row in rows:
        equal = f", {row['equal']} equal" if row["equal"] else ""
        what = " ".join(filter(None, (row["tokens"], row["kind"])))
        numbers = f"{row['better']:>8.4f}{row['worse']:>9.4f}   {row['holds']} of {row['linears']}{equal}"
        print(f"{row['claim']:<44}{row['setting']:<9}{what:<16}{numbers}")


def write(args: argparse.Namespace, rows: list[dict[str, Any]], done: str) -> None:
    """Say what is done, and keep all there is so far."""
    print(done, flush=True)
    if args.json:
        facts = {"arguments": facts_of(args), "summary": summary(rows), "linears": rows}
        args.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, may_lack_model=True)
    parser.add_argument("--sparsity", default="4:8")
    parser.add_argument("--clips", type=float, nargs="+", choices=list(CLIPS), default=list(CLIPS))
    parser.add_argument("--synthetic", type=int, default=0, help="so many layers of every kind, instead of a model's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(None if arguments is None else list(arguments))
    if not (args.model or args.synthetic):
        parser.error("give a model, or --synthetic")
    sparsity = Sparsity.parse(args.sparsity)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if args.synthetic:
            for kind, seed in product(SYNTHETIC, range(args.synthetic)):
                found = claims_of(synthetic_linear(kind, seed), 0.0, sparsity)
                rows += [{**row, "tokens": "", "kind": kind} for row in found]
                write(args, rows, f"{kind} {seed}")
        else:
            for linear, clip in product(real_linears(args, list(CLIPS)), args.clips):
                rows += claims_of(linear, clip, sparsity)
                write(args, rows, f"{linear.name}, {CLIPS[clip]}")
    show(summary(rows))


if __name__ == "__main__":
    run(main)
