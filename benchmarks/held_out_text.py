"""Perplexity on the parts of a calibration text that no calibration window touched.

    python benchmarks/held_out_text.py TEXT MODEL OUT… --json FILE

TEXT is a file that the recipes of some checkpoints OUT name as a source; MODEL is the dense model, measured beside
them. The windows that those recipes drew from TEXT are drawn again, and all models are measured on the same windows,
none of which shares a token with them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from user_errors import run

from subbit.calibration.text import (
    distinct_windows,
    held_out_by_source,
    load_text,
    sample_windows,
    split_sources,
    tokenize,
    turns,
)
from subbit.checkpoint.files import RECIPE_FILE
from subbit.evaluation.perplexity import perplexity
from subbit.loading import open_any, read_tokenizer
from subbit.recipe import Recipe


def touched(recipe: Recipe, text: str, tokens: int) -> Tensor:
    """[tokens] bool: which of them a run of the recipe has seen, in calibration or in distillation."""
    ids, seen = torch.arange(tokens), torch.zeros(tokens, dtype=torch.bool)
    calibration, distillation = recipe.calibration, recipe.distillation
    parts = split_sources(calibration.source)
    for turn, part in enumerate(parts):
        if Path(part).name != Path(text).name:
            continue
        own = len(turns(torch.arange(calibration.samples), len(parts))[turn])
        seen[sample_windows(ids, own, calibration.seq_len, calibration.seed)] = True
        if distillation.steps and distillation.samples:
            samples = distillation.samples
            own = len(turns(torch.arange(samples), len(parts))[turn])
            last = held_out_by_source(samples, recipe.held_out_of(samples), len(parts))[turn]
            seen[distinct_windows(ids, own, recipe.distillation_seq_len, recipe.distillation_seed, last)] = True
    return seen


def untouched_windows(seen: Tensor, seq_len: int, count: int) -> Tensor:
    """[count, seq_len] positions of windows in the gaps between what was seen, at most one of a gap, spread evenly."""
    edges = torch.cat([torch.tensor([True]), seen, torch.tensor([True])]).nonzero().flatten()
    starts = edges[:-1][edges.diff() > seq_len]
    if len(starts) < count:
        raise SystemExit(f"{len(starts)} windows of {seq_len} tokens were never seen: ask for fewer or shorter")
    chosen = starts[torch.linspace(0, len(starts) - 1, count).long()]
    return chosen[:, None] + torch.arange(seq_len)


def main() -> None:
    """Draw again, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("model", help="dense: directory, hub id or GGUF file")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=80, help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipes = [Recipe.from_yaml(path / RECIPE_FILE) for path in args.checkpoints]
    tokenizer = read_tokenizer(args.checkpoints[0], trust_remote_code=False)
    ids = tokenize(tokenizer, load_text(args.text, "train").text)
    seen = torch.stack([touched(recipe, args.text, ids.numel()) for recipe in recipes]).any(0)
    print(f"{int(seen.sum()):,} of {ids.numel():,} tokens were seen")
    flat = ids[untouched_windows(seen, args.seq_len, args.windows)].flatten()
    name = Path(args.text).name
    rows = []
    for path in (args.model, *args.checkpoints):
        model, _ = open_any(path).load(torch.bfloat16, unpack=True)
        found = perplexity(model, flat, dataset=name, split="never seen", origin=name, seq_len=args.seq_len)
        rows.append({"model": Path(path).name, "perplexity": found.value, "standard_error": found.standard_error})
        print(f"{found.value:12,.2f} ± {found.standard_error:,.2f}  {Path(path).name}", flush=True)
    if args.json:
        facts = {"text": name, "windows": args.windows, "seq_len": args.seq_len, "dtype": "bfloat16"}
        args.json.write_text(json.dumps({"arguments": facts, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
