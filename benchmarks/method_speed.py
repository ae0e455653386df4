"""How long the methods take on one linear, and how that grows with its size; the activation statistics are given.

    python benchmarks/method_speed.py --sizes 1024 2048 4096 8192 --json speed.json

Square layers of random weights with a few large columns, and the Gram of correlated inputs. Times are wall time of the
method alone and, in a row of their own, of the inverse factor that it needs of the Gram, which linears with one input
share. *Growth* is the exponent e of time ~ weights^e between two sizes: 1 means so many nanoseconds a weight whatever
the size; 1.5 is that of a product or a factorization of square matrices. *Peak* is the most memory while a method ran,
the layer, its Gram, its factor and Python with torch included (*before*: of these alone); on a GPU, of the GPU.

At 4096 × 4096 on two free cores STBLLM and PBS²P may take 60 s and BiLLM 30 s; the last lines say whether they did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from user_errors import run

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.layerwise import relative_output_error
from subbit.methods import METHODS
from subbit.process import peak_bytes, resident_bytes

FACTOR = "inverse factor"
# Method → (sparsity, what the options say); the defaults otherwise.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stbllm": ("4:8", {}),
    "pbs2p": ("4:8", {}),
    "billm": ("none", {}),
    "arb": ("none", {}),
    "codes": ("2:8", {}),
    "gptq": ("none", {"bits": 2}),
}
BAR_SIZE = 4096
BARS = {"stbllm": 60.0, "pbs2p": 60.0, "billm": 30.0}  # seconds at that size


@dataclass(frozen=True)
class Layer:
    """A linear, and what calibration would have told of it."""

    weight: Tensor  # (size, size)
    gram: Tensor  # (size, size)


def make_layer(size: int, device: torch.device) -> Layer:
    """Gaussian weights, some columns four times larger; inputs that share a sixteenth of a size of directions."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    weight[:, torch.randperm(size, generator=generator)[: size // 64]] *= 4
    shared = torch.randn(size, max(1, size // 16), generator=generator) / math.sqrt(max(1, size // 16))
    deviation = 0.3 + torch.rand(size, generator=generator)
    gram = deviation[:, None] * (shared @ shared.T) * deviation
    gram.diagonal().add_(0.3 * deviation.square())
    return Layer(weight.to(device), gram.to(device))


@dataclass(frozen=True)
class Cost:
    """What a call took."""

    seconds: float
    processor_seconds: float  # of all threads; less than `seconds` tells of other work on the machine
    before: int  # bytes of memory at its start
    peak: int  # and at most; 0 where the system does not tell


def cost_of(function: Any, repeats: int, device: torch.device) -> tuple[Any, Cost]:
    """The last result, and the shortest time with its memory."""
    best: Cost | None = None
    for _ in range(repeats):
        result = None  # the memory of an earlier one is not this one's
        synchronize(device)
        before = forget_peak(device)
        started, worked = time.perf_counter(), time.process_time()
        result = function()
        synchronize(device)
        cost = Cost(time.perf_counter() - started, time.process_time() - worked, before, peak_since(device))
        best = cost if best is None or cost.seconds < best.seconds else best
    assert best is not None
    return result, best


def forget_peak(device: torch.device) -> int:
    """Measure peaks from here on; the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes VmRSS
    return resident_bytes()


def peak_since(device: torch.device) -> int:
    """The most bytes since `forget_peak`; on systems other than Linux, since the process began."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: int, methods: list[str], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all methods at one size, the inverse factor first."""
    layer = make_layer(size, device)
    factor, cost = cost_of(lambda: inverse_factor(layer.gram), repeats, device)
    rows = [row_of(FACTOR, "", size, cost)]
    for method in methods:
        rows.append(measure_method(method, layer, factor, repeats, device))
        print(f"{size} × {size} {method}: {rows[-1]['seconds']:.2f} s", flush=True)
    return rows


def measure_method(
    method: str, layer: Layer, factor: InverseFactor, repeats: int, device: torch.device
) -> dict[str, Any]:
    """One method on one layer, with its output error, so that a broken run cannot pass for a fast one."""
    known, (sparsity, options) = METHODS[method], CASES[method]
    parsed, chosen = Sparsity.parse(sparsity), known.options(**options)
    linear, cost = cost_of(lambda: known.run(layer.weight, layer.gram, factor, parsed, chosen), repeats, device)
    error = relative_output_error(layer.weight, linear.dense(), layer.gram)
    what = ", ".join([sparsity, *(f"{key} {value}" for key, value in options.items())])
    return row_of(method, what, len(layer.weight), cost, round(float(error), 5))


def row_of(method: str, what: str, size: int, cost: Cost, error: float | None = None) -> dict[str, Any]:
    """One line of the table."""
    return {
        "method": method,
        "case": what,
        "size": size,
        "seconds": round(cost.seconds, 4),
        "processor_seconds": round(cost.processor_seconds, 4),
        "nanoseconds_per_weight": round(1e9 * cost.seconds / size**2, 2),
        "bytes_before": cost.before,
        "peak_bytes": cost.peak,
        "output_error": error,
    }


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its growth from the next smaller size of its method."""
    before: dict[str, dict[str, Any]] = {}
    grown = []
    for row in sorted(rows, key=lambda row: row["size"]):
        smaller = before.get(row["method"])
        growth = None
        if smaller and smaller["seconds"] > 0 and row["seconds"] > 0:
            weights = 2 * math.log(row["size"] / smaller["size"])
            growth = round(math.log(row["seconds"] / smaller["seconds"]) / weights, 2)
        grown.append({**row, "growth": growth})
        before[row["method"]] = row
    return grown


def show(rows: list[dict[str, Any]]) -> None:
    """Method by method, sizes ascending."""
    print(
        f"{'method':<16}{'case':<14}{'size':>6}{'seconds':>10}{'processor':>10}{'ns/weight':>11}{'growth':>8}{'error':>9}{'before':>10}{'peak':>10}"
    )
    for method in dict.fromkeys(row["method"] for row in rows):
        for row in [row for row in rows if row["method"] == method]:
            growth = "" if row["growth"] is None else f"{row['growth']:.2f}"
            error = "" if row["output_error"] is None else f"{row['output_error']:.4f}"
            memory = "".join(f"{row[key] / 2**20:>6.0f} MiB" for key in ("bytes_before", "peak_bytes"))
            print(
                f"{method:<16}{row['case']:<14}{row['size']:>6}{row['seconds']:>10.3f}"
                f"{row['processor_seconds']:>10.3f}{row['nanoseconds_per_weight']:>11.1f}{growth:>8}{error:>9}{memory}"
            )


def bars_met(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every method with a bar that was measured at its size: seconds, bar, and whether it is met."""
    measured = {row["method"]: row["seconds"] for row in rows if row["size"] == BAR_SIZE and row["method"] in BARS}
    return {
        method: {"seconds": seconds, "bar": BARS[method], "met": seconds <= BARS[method]}
        for method, seconds in measured.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="multiples of 8")
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=1, help="the shortest time counts")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with torch.inference_mode():
        measured = [row for size in args.sizes for row in measure(size, args.methods, max(1, args.repeats), device)]
    rows = with_growth(measured)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{machine}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}")
    show(rows)
    bars = bars_met(rows)
    for method, bar in bars.items():
        answer = "met" if bar["met"] else "MISSED"
        print(f"{method} at {BAR_SIZE} × {BAR_SIZE}: {bar['seconds']:.1f} s, at most {bar['bar']:.0f} s: {answer}")
    if args.json:
        facts = {"machine": machine, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
        facts |= {"torch": torch.__version__, "repeats": args.repeats, "bars": bars, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
