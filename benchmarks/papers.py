"""The tables of STBLLM and PBS²P, their ablations, and codes below one bit: one sweep, in groups that can be chosen.

    python benchmarks/papers.py MODEL --group headline --out papers.json --report figures

Every group can be run alone, stopped and taken up again; results of all groups go into one file, and nothing is run
twice. ``--list`` prints what a group consists of. The report is comparison.md and the figures, of what is there.

    headline           the papers' tables: BiLLM, ARB-LLM (X, RC), STBLLM, PBS²P at 4:8, 5:8, 6:8 (and unpruned)
    baselines          RTN and GPTQ at 1 to 4 bits, BiLLM and ARB-LLM unpruned
    stbllm-ablations   one choice of STBLLM changed at a time
    stbllm-solved      choices of STBLLM with scales solved for the output, where it does not collapse
    pbs2p-ablations    one choice of PBS²P changed at a time
    frontier           codes at 0.5 to 1.4 stored bits, with --effort
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subbit
from subbit.comparison.entries import Entry, Protocol, with_seeds
from subbit.comparison.published import PUBLISHED_FILE
from subbit.effort import EFFORTS, merge
from subbit.progress import ConsoleProgress

SPARSITIES = ("4:8", "5:8", "6:8")
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.4)

# Series of the figures: what the papers call a method → recipe values.
SERIES: dict[str, dict[str, Any]] = {
    "BiLLM": {"method": "billm"},
    "ARB-LLM RC": {"method": "arb", "options": {"variant": "rc"}},
    "ARB-LLM X": {"method": "arb", "options": {"variant": "x"}},
    "STBLLM": {"method": "stbllm"},
    "STBLLM, scales solved": {"method": "stbllm", "options": {"scales": "gram"}},
    "STBLLM as released": {"method": "stbllm-as-released"},
    "PBS²P": {"method": "pbs2p"},
}
STBLLM_PAPER = {"options": {"compensation": "diagonal"}}
PBS2P_PAPER = {"options": {"compensation": "diagonal", "metric": "gram", "rescore": False}}
CLIPPED = "token norms clipped at twice the median"
# Changes that both methods can have.
SHARED: dict[str, dict[str, Any]] = {
    "compensation off": {"options": {"compensation": "off"}},
    "compensation diagonal": {"options": {"compensation": "diagonal"}},
    "grouping none": {"options": {"grouping": "none"}},
    "no salient columns": {"options": {"salient_columns": 0}},
    "salient columns once, not twice": {"options": {"residual_order": 1}},
    "up to 49 salient columns": {"options": {"salient_columns": 49}},
    "N the same in all layers": {"allocation": {"kind": "uniform"}},
    "N by outliers (OWL)": {"allocation": {"kind": "outliers"}},
    "N by depth (sine)": {"allocation": {"kind": "sine"}},
    "N by the order of importance": {"allocation": {"spread": "rank"}},
    "blocks of 64 columns": {"options": {"block_size": 64}},
    "blocks of 256 columns": {"options": {"block_size": 256}},
    "blocks of 512 columns": {"options": {"block_size": 512}},
    CLIPPED: {"calibration": {"clip_norm": 2.0}},
    "32 × 512 tokens": {"calibration": {"samples": 32, "seq_len": 512}},
    "512 × 512 tokens": {"calibration": {"samples": 512, "seq_len": 512}},
    "32 × 2048 tokens": {"calibration": {"samples": 32, "seq_len": 2048}},
    "layers tuned, 64 steps": {"reconstruction": {"steps": 64, "batch": 2}},
    "layers tuned, then all, 240 steps": {
        "reconstruction": {"steps": 64, "batch": 2},
        "distillation": {"steps": 240, "batch": 1, "held_out": 4},
    },
}
# What the paper writes differs from our STBLLM in "compensation diagonal" alone.
STBLLM_CHANGES: dict[str, dict[str, Any]] = {
    "score magnitude": {"options": {"score": "magnitude"}},
    "score Wanda": {"options": {"score": "wanda"}},
    "score SparseGPT": {"options": {"score": "sparsegpt"}},
    "score RIA (SI not standardized)": {"options": {"standardize": False}},
    "activation exponent 0.5": {"options": {"activation_exponent": 0.5}},
    "exponent 0.5, not standardized": {"options": {"activation_exponent": 0.5, "standardize": False}},
    "pruned weights not compensated in the block": {"options": {"prune_compensation": False}},
    "grouping bell": {"options": {"grouping": "bell"}},
    "thresholds on the saliency": {"options": {"search_on": "saliency"}},
    "scales on the Gram slice": {"options": {"scales": "gram", "metric": "gram"}},
    "scales on the conditional Gram": {"options": {"scales": "gram"}},
    "N by cosine similarity": {"allocation": {"kind": "cosine"}},
    **SHARED,
}
# Choices of STBLLM's paper where the method does not collapse, and its scores with clipping, which turns their order.
SOLVED = (
    "score magnitude",
    "score Wanda",
    "score SparseGPT",
    "score RIA (SI not standardized)",
    "activation exponent 0.5",
    "pruned weights not compensated in the block",
    "grouping bell",
    "grouping none",
    "thresholds on the saliency",
    "N the same in all layers",
    "N by cosine similarity",
    "N by the order of importance",
    "compensation off",
    "compensation diagonal",
    "no salient columns",
    "salient columns once, not twice",
    CLIPPED,
)
STBLLM_SOLVED: dict[str, dict[str, Any]] = {
    **{name: STBLLM_CHANGES[name] for name in SOLVED},
    **{f"{name}, {CLIPPED}": merge(STBLLM_CHANGES[name], SHARED[CLIPPED]) for name in SOLVED[:2]},
}
PBS2P_CHANGES: dict[str, dict[str, Any]] = {
    "as the paper writes it": PBS2P_PAPER,
    "at once, re-scored": {"options": {"steps": 1}},
    "M−N steps, not re-scored: OBS": {"options": {"rescore": False}},
    "at once, not re-scored: OBS": {"options": {"rescore": False, "steps": 1}},
    "not re-scored: magnitude": {"options": {"rescore": False, "score": "magnitude"}},
    "not re-scored: Wanda": {"options": {"rescore": False, "score": "wanda"}},
    "not re-scored: SparseGPT": {"options": {"rescore": False, "score": "sparsegpt"}},
    "not re-scored: RIA": {"options": {"rescore": False, "score": "ria"}},
    "not re-scored: SI": {"options": {"rescore": False, "score": "si"}},
    "scales on the Gram slice": {"options": {"metric": "gram"}},
    "grouping trisection": {"options": {"grouping": "trisection"}},
    "N by L2 importance": {"allocation": {"kind": "l2"}},
    **SHARED,
}


def recipe(common: dict[str, Any], *changes: dict[str, Any]) -> subbit.Recipe:
    """Recipe values on top of one another."""
    values = common
    for change in changes:
        values = merge(values, change)
    return subbit.Recipe.create(values)


def dense(group: str) -> Entry:
    """The model as it is, in every group: what all is measured against."""
    return Entry(None, "dense", group=group)


def headline(common: dict[str, Any], effort: str) -> list[Entry]:
    """Every binary method at every N:M; those that the papers also have unpruned, unpruned; the two as written."""
    entries = [dense("headline")]
    for series, values in SERIES.items():
        unpruned = ("none",) if values["method"] in ("billm", "arb") else ()
        for sparsity in (*SPARSITIES, *unpruned):
            label = "unpruned" if sparsity == "none" else sparsity
            entries.append(Entry(recipe(common, values, {"sparsity": sparsity}), series, label, "headline"))
    for series, method, paper in (
        ("STBLLM as written", "stbllm", STBLLM_PAPER),
        ("PBS²P as written", "pbs2p", PBS2P_PAPER),
    ):
        for sparsity in SPARSITIES:
            built = recipe(common, {"method": method, "sparsity": sparsity}, paper)
            entries.append(Entry(built, series, sparsity, "headline"))
    return entries


def baselines(common: dict[str, Any], effort: str) -> list[Entry]:
    """Plain quantization, and the binary methods that keep every weight."""
    entries = [dense("baselines")]
    for series, method in (("RTN", "rtn"), ("GPTQ", "gptq")):
        for bits in (1, 2, 3, 4):
            label = "1 bit" if bits == 1 else f"{bits} bits"
            built = recipe(common, {"method": method, "options": {"bits": bits}})
            entries.append(Entry(built, series, label, "baselines"))
    for series in ("BiLLM", "ARB-LLM RC", "ARB-LLM X"):
        entries.append(Entry(recipe(common, SERIES[series], {"sparsity": "none"}), series, "unpruned", "baselines"))
    return entries


def ablations(
    group: str, series: str, changes: dict[str, dict[str, Any]]
) -> Callable[[dict[str, Any], str], list[Entry]]:
    """A group: a method at 4:8, then the same with one thing changed."""

    def build(common: dict[str, Any], effort: str) -> list[Entry]:
        values = merge(SERIES[series], {"sparsity": "4:8"})
        base = Entry(recipe(common, values), series, "4:8", group)
        changed = [
            Entry(recipe(common, values, change), name, group=group, baseline=base.name)
            for name, change in changes.items()
        ]
        return [dense(group), base, *changed]

    return build


def frontier(common: dict[str, Any], effort: str) -> list[Entry]:
    """codes within budgets, calibrated on as much text as the effort says."""
    source = {"source": common["calibration"]["source"]}
    values = merge(EFFORTS[effort], {"method": "codes", "calibration": source, "embeddings": common["embeddings"]})
    entries = [
        Entry(recipe(values, {"bits": bits}), f"codes, {effort}", f"{bits} bits", "frontier") for bits in BUDGETS
    ]
    return [dense("frontier"), *entries]


GROUPS: dict[str, Callable[[dict[str, Any], str], list[Entry]]] = {
    "headline": headline,
    "baselines": baselines,
    "stbllm-ablations": ablations("stbllm-ablations", "STBLLM", STBLLM_CHANGES),
    "stbllm-solved": ablations("stbllm-solved", "STBLLM, scales solved", STBLLM_SOLVED),
    "pbs2p-ablations": ablations("pbs2p-ablations", "PBS²P", PBS2P_CHANGES),
    "frontier": frontier,
}


def build_entries(args: argparse.Namespace) -> list[Entry]:
    """The entries of the chosen groups, with their seeds."""
    calibration = {"source": args.calibration, "samples": args.samples, "seq_len": args.seq_len}
    common = {"calibration": calibration, "embeddings": "keep"}
    entries = [entry for group in args.group or GROUPS for entry in GROUPS[group](common, args.effort)]
    return with_seeds(entries, args.seeds)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, hub id or GGUF file")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="repeatable; default: all")
    parser.add_argument("--out", type=Path, default=Path("papers.json"), help="results (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="directory for the table and the figures")
    parser.add_argument("--list", action="store_true", help="print the entries and run nothing")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--effort", choices=list(EFFORTS), default="fast", help="of codes (default: %(default)s)")
    parser.add_argument("--dataset", action="append", help="to evaluate on, repeatable; default: wikitext2")
    parser.add_argument("--eval-seq-len", type=int, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--max-windows", type=int, default=20, help="of the text's start (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the evaluation (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints; default: beside the results")
    parser.add_argument("--keep", action="store_true", help="do not delete evaluated checkpoints")
    parser.add_argument("--retry", action="store_true", help="run failed entries again")
    parser.add_argument("--unpack", action="store_true", help="decode once before evaluating: faster, more memory")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> int:
    """List, or run and report."""
    args = parse()
    try:
        entries = build_entries(args)
        if args.list:
            print("\n".join(entry.title for entry in entries))
            return 0
        protocol = Protocol(
            tuple(args.dataset or ["wikitext2"]),
            seq_len=args.eval_seq_len,
            max_windows=args.max_windows,
            dtype=args.dtype,
        )
        settings = {name: getattr(args, name) for name in ("work", "keep", "retry", "unpack", "device")}
        subbit.sweep(args.model, entries, args.out, protocol, progress=ConsoleProgress(), **settings)
        print(subbit.compare([args.out], args.report, published=PUBLISHED_FILE), end="")
    except subbit.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is done is kept: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
