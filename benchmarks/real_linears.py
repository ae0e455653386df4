"""Linears of a real model with the statistics of its calibration text: what the benchmarks of output errors share.

The statistics are those of the dense model: no error of earlier layers is in them.
"""

from __future__ import annotations

import argparse
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from subbit.calibration.gram import GramCollector
from subbit.calibration.text import calibration_windows
from subbit.loading import load_any
from subbit.models.layout import find_layout, layer_linears

# Ten decoder layers of thirty, every kind of linear among them.
TEN_LINEARS = (
    "0.q_proj",
    "3.k_proj",
    "6.v_proj",
    "9.o_proj",
    "12.gate_proj",
    "15.up_proj",
    "18.down_proj",
    "22.q_proj",
    "26.o_proj",
    "29.down_proj",
)


@dataclass(frozen=True)
class RealLinear:
    """One real linear with its statistics."""

    name: str  # layer and kind: "3.k_proj"
    weight: Tensor  # (out, in) float32
    grams: dict[float, Tensor]  # how often the median a token's norm may be (0: any) → H (in, in) float32


def add_arguments(parser: argparse.ArgumentParser, may_lack_model: bool = False) -> None:
    """The model, its text, and where to keep the statistics."""
    parser.add_argument("model", nargs="?" if may_lack_model else None)
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--linears", nargs="+", default=list(TEN_LINEARS), help="as 3.k_proj")
    parser.add_argument("--statistics", type=Path, help="kept in this file, and read from it if it is there")


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a result says of its command line."""
    paths = ("json", "statistics")
    facts = {name: value for name, value in vars(args).items() if name not in paths}
    return {**facts, "machine": platform.processor() or platform.machine()}


def real_linears(args: argparse.Namespace, clips: list[float]) -> list[RealLinear]:
    """The linears of the command line with one Gram for every clip, from the file of statistics where there is one."""
    wanted = repr((args.model, args.calibration, args.samples, args.seq_len, args.linears, clips))
    if args.statistics and args.statistics.exists():
        return read(args.statistics, wanted, args.linears, clips)
    linears = collect(args, clips)
    if args.statistics:
        tensors = {f"{one.name} {clip}": gram for one in linears for clip, gram in one.grams.items()}
        tensors |= {one.name: one.weight for one in linears}
        save_file(tensors, args.statistics, metadata={"arguments": wanted})
    return linears


def read(path: Path, wanted: str, names: list[str], clips: list[float]) -> list[RealLinear]:
    """What `real_linears` has saved; ends the program if that was with other arguments."""
    with safe_open(path, "pt") as file:
        if file.metadata() != {"arguments": wanted}:
            raise SystemExit(f"{path} holds statistics of other arguments: {file.metadata()}")
        return [
            RealLinear(name, file.get_tensor(name), {clip: file.get_tensor(f"{name} {clip}") for clip in clips})
            for name in names
        ]


def collect(args: argparse.Namespace, clips: list[float]) -> list[RealLinear]:
    """Run the model over the text, once for all clips."""
    model, tokenizer = load_any(args.model, torch.float32)
    windows, _ = calibration_windows(args.calibration, tokenizer, args.samples, args.seq_len, 0, lambda: model)
    layers = find_layout(model).layers(model)
    linears = {}
    for name in args.linears:
        index, kind = name.split(".")
        [linear] = [one for full, one in layer_linears(layers[int(index)]).items() if full.split(".")[-1] == kind]
        linears[name] = linear
    with ExitStack() as stack:
        collectors = {clip: stack.enter_context(GramCollector(linears, clip)) for clip in clips}
        for window in windows:
            model.base_model(window[None])
    grams = {
        name: {clip: collector.gram(leader) for clip, collector in collectors.items()}
        for leader, names in next(iter(collectors.values())).shared().items()
        for name in names
    }
    return [RealLinear(name, linear.weight.detach().clone(), grams[name]) for name, linear in linears.items()]
