"""Products with packed linears against torch and against the speed of memory.

    python benchmarks/kernels.py --quick --json FILE                    # 11008 × 4096, batch 1, all threads: a minute
    python benchmarks/kernels.py --json FILE                            # every shape, thread count and batch

Weights are streamed: all contenders take turns of a few calls, each on another copy, and between two readings of a copy
several times the last-level cache is read. A figure is the median of the calls, without the first one of every turn:
layers of a model follow layers of the same kind, too. The memory bound of a product is the time in which the same
threads read as many bytes as the kernel reads, in pages of 2 MiB, measured in the same turns; `ratio_to_bound` is the
product's time over that. Times are of the operator as a model calls it, Python included; `kernel_us` and
`kernel_ratio_to_bound` are those of the kernel alone. `relative_error` is of inputs with eight channels fifty times as
large as the others, against float64.

Where llama-cpp-python can be found, the types of llama.cpp take turns, too, in the same kind of memory, and
`speedup_vs_ggml` is over the fastest of them, all below 2.1 bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import torch
from ggml_peer import OBJECTS, ROWS, Ggml, library_folder
from rich.console import Console
from rich.table import Table
from torch import Tensor
from user_errors import run

from subbit.packing.codec import codeword_bits, pack_bits
from subbit.packing.codes import CodesSpec
from subbit.runtime import native

KINDS = ["2:8", "1:8", "4:8", "3:8", "1:4", "1:16", "2:16", "3:16"]
SHAPES = ["11008x4096", "4096x4096", "4096x11008"]
BATCHES = [1, 8, 32, 512]
CALLS = 5  # of a turn
CHUNK = 16 << 20  # bytes whose reading is timed


@dataclass
class Contender:
    """Something that is timed; every call gets the number of the copy that it reads."""

    call: Callable[[int], Any]
    copies: int
    seconds: list[float] = field(default_factory=list)
    calls: int = 0

    def run(self) -> None:
        """A turn, its calls timed but for the first one."""
        for call in range(CALLS):
            started = time.perf_counter()
            self.call(self.calls % self.copies)
            if call:
                self.seconds.append(time.perf_counter() - started)
            self.calls += 1

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


def cache_bytes() -> int:
    """Of the last-level cache; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)


def copies_for(size: int) -> int:
    """How many copies of what the contenders read in a call each are four times the cache; two turns at least."""
    return max(2 * CALLS, -(-4 * cache_bytes() // size))


def processor() -> str:
    """What the machine calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def random_codes(kind: str, rows: int, columns: int, generator: torch.Generator) -> tuple[CodesSpec, Tensor]:
    """A linear of random codewords, repacked."""
    n, m = map(int, kind.split(":"))
    spec = CodesSpec(rows, columns, n, m, True)
    words = torch.randint(comb(m, n) << n, (rows, columns // m), generator=generator)
    tensors = {
        "codes": torch.cat([pack_bits(part, codeword_bits(n, m)) for part in words.split(512)]),
        "row_scales": torch.rand(rows, generator=generator).half(),
        "column_scales": (torch.rand(columns, generator=generator) + 0.5).half(),
    }
    return spec, native.repack(spec, tensors)


def copy_of(packed: Tensor) -> Tensor:
    """In the kind of memory in which a repacked linear is."""
    return native.zeros(packed.nbytes).copy_(packed)


def error_of(spec: CodesSpec, packed: Tensor, generator: torch.Generator) -> float:
    """Relative error with outlier channels, on the first thousand rows."""
    inputs = torch.randn(4, spec.in_features, generator=generator)
    inputs[:, torch.randperm(spec.in_features, generator=generator)[:8]] *= 50
    rows = slice(0, min(1024, spec.out_features))
    expected = inputs.double() @ native.decode(spec, packed, rows).double().T
    output = native.linear(inputs, spec, packed, None)[:, rows].double()
    return float((output - expected).norm() / expected.norm())


def dense_call(inputs: Tensor, weights: list[Tensor]) -> Callable[[int], Tensor]:
    """A product by torch."""
    return lambda copy: torch.nn.functional.linear(inputs, weights[copy])


def packed_calls(
    inputs: Tensor, spec: CodesSpec, packed: list[Tensor]
) -> tuple[Callable[[int], Tensor], Callable[[int], None]]:
    """A product by a native kernel, as the module calls it, and the kernel alone."""
    products = [native.Product.of(spec, one) for one in packed]
    output = torch.empty(len(inputs), spec.out_features)
    given = inputs.data_ptr(), False, len(inputs), 0, False, output.data_ptr(), torch.get_num_threads()

    def kernel(copy: int, kept: Tensor = output) -> None:  # alive as long as its address is used
        products[copy].multiply(*given)

    return lambda copy: products[copy](inputs, None), kernel


def ggml_call(
    ggml: Ggml, name: str, weight: Tensor, inputs: Tensor, threads: int, copies: int
) -> Callable[[int], Tensor]:
    """A product by a type of ggml; checked against the dense product as far as the type's precision goes."""
    packed = ggml.quantize(name, weight)
    room = packed.nbytes + inputs.nbytes + 4 * len(weight) * len(inputs) + OBJECTS
    calls = [ggml.product(name, packed, native.zeros(room), inputs, threads) for _ in range(copies)]
    expected = inputs @ weight[:ROWS].T
    found = calls[0]()[:, :ROWS]
    if torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.5:
        raise SystemExit(f"ggml's product with {name} is wrong: this version's structures may differ")
    return lambda copy: calls[copy]()


@dataclass(frozen=True)
class Race:
    """What takes turns on one shape, thread count and batch."""

    contenders: dict[str, Contender]
    sizes: dict[str, int]  # bytes that a call of an N:M or of a type of ggml reads
    errors: dict[str, float]  # of every N:M
    peers: list[str]  # types of ggml

    def run(self, rounds: int, seconds: float) -> None:
        """Turns of all, until ``rounds`` or, after five, ``seconds`` are over."""
        for contender in self.contenders.values():
            contender.run()
            contender.seconds.clear()
        started = time.perf_counter()
        for turn in range(rounds):
            if turn >= 5 and time.perf_counter() - started > seconds:
                break
            for contender in self.contenders.values():
                contender.run()


def line_up(rows: int, columns: int, batch: int, threads: int, kinds: list[str], ggml: Ggml | None) -> Race:
    """All contenders, with enough copies of what they read."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    linears = {kind: random_codes(kind, rows, columns, generator) for kind in kinds}
    peers = {name: ggml.row_bytes(name, columns) * rows for name in ggml.types} if ggml else {}
    sizes = {kind: packed.nbytes for kind, (_, packed) in linears.items()} | peers
    copies = copies_for(CHUNK + weight.nbytes * 3 // 2 + sum(sizes.values()))
    contenders: dict[str, Contender] = {}
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        weights = [weight.to(dtype, copy=True) for _ in range(copies)]
        contenders[name] = Contender(dense_call(inputs.to(dtype), weights), copies)
    if ggml:
        for name in peers:
            contenders[name] = Contender(ggml_call(ggml, name, weight, inputs, threads, copies), copies)
    memory = [native.zeros(CHUNK).fill_(1) for _ in range(copies)]
    for name in ("pause", "memory"):  # what comes next after torch's bfloat16 product is a fifth slower for a while
        contenders[name] = Contender(lambda i: native.read_memory(memory[i]), copies)
    errors = {}
    for kind, (spec, packed) in linears.items():
        errors[kind] = error_of(spec, packed, generator)
        call, kernel = packed_calls(inputs, spec, [copy_of(packed) for _ in range(copies)])
        # What comes next after reading memory is a tenth slower, too; it reads other copies than its timed turn does.
        contenders.setdefault("start", Contender(call, copies, calls=copies // 2))
        contenders[kind] = Contender(call, copies)
        contenders[f"{kind} kernel"] = Contender(kernel, copies, calls=copies // 2)
    return Race(contenders, sizes, errors, list(peers))


def figures(race: Race, weights: int) -> dict[str, Any]:
    """What comes out for a matrix of so many weights."""
    seconds = {name: contender.median for name, contender in race.contenders.items()}
    bits = {name: 8 * size / weights for name, size in race.sizes.items()}
    bounds = {name: size / CHUNK * seconds["memory"] for name, size in race.sizes.items()}
    best = min((seconds[name] for name in race.peers), default=None)
    return {
        "memory_gb_per_s": CHUNK / seconds["memory"] / 1e9,
        "torch_fp32_us": seconds["torch fp32"] * 1e6,
        "torch_bf16_us": seconds["torch bf16"] * 1e6,
        "ggml": {name: {"us": seconds[name] * 1e6, "bits_per_weight_read": bits[name]} for name in race.peers},
        "kernels": {
            kind: {
                "us": seconds[kind] * 1e6,
                "bits_per_weight_read": bits[kind],
                "ratio_to_bound": seconds[kind] / bounds[kind],
                "kernel_us": seconds[f"{kind} kernel"] * 1e6,
                "kernel_ratio_to_bound": seconds[f"{kind} kernel"] / bounds[kind],
                "speedup_vs_torch_fp32": seconds["torch fp32"] / seconds[kind],
                "speedup_vs_torch_bf16": seconds["torch bf16"] / seconds[kind],
                "speedup_vs_ggml": best and best / seconds[kind],
                "relative_error": error,
            }
            for kind, error in race.errors.items()
        },
    }


def measure(
    shape: str, threads: int, batch: int, kinds: list[str], rounds: int, seconds: float, ggml: Ggml | None
) -> dict[str, Any]:
    """All contenders on one shape, thread count and batch."""
    rows, columns = map(int, shape.split("x"))
    torch.set_num_threads(threads)
    race = line_up(rows, columns, batch, threads, kinds, ggml)
    race.run(rounds, seconds)
    return {"shape": shape, "threads": threads, "batch": batch, **figures(race, rows * columns)}


def show(result: dict[str, Any]) -> None:
    """One table."""
    title = f"{result['shape']}, batch {result['batch']}, {result['threads']} threads, {native.variant()}; "
    title += f"memory {result['memory_gb_per_s']:.1f} GB/s, torch fp32 {result['torch_fp32_us']:.0f} µs, "
    title += f"bf16 {result['torch_bf16_us']:.0f} µs"
    names = ("N:M", "bits read", "µs", "÷ bound", "kernel ÷ bound", "× fp32", "× bf16", "× ggml", "error")
    table = Table(*names, title=title, title_justify="left")
    for kind, row in result["kernels"].items():
        table.add_row(
            kind,
            f"{row['bits_per_weight_read']:.3f}",
            f"{row['us']:.0f}",
            f"{row['ratio_to_bound']:.2f}",
            f"{row['kernel_ratio_to_bound']:.2f}",
            f"{row['speedup_vs_torch_fp32']:.1f}",
            f"{row['speedup_vs_torch_bf16']:.1f}",
            "–" if row["speedup_vs_ggml"] is None else f"{row['speedup_vs_ggml']:.1f}",
            f"{row['relative_error']:.1e}",
        )
    for name, row in result["ggml"].items():
        table.add_row(name, f"{row['bits_per_weight_read']:.3f}", f"{row['us']:.0f}")
    Console().print(table)


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="11008x4096, batch 1, all threads, under a minute")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15, help="of the turns of one table, five turns at least")
    options = parser.parse_args()
    everyone = torch.get_num_threads()
    threads = options.threads or ([everyone] if options.quick else sorted({1, everyone}))
    shapes, batches = (SHAPES[:1], [1]) if options.quick else (options.shapes, options.batches)
    folder = library_folder()
    ggml = Ggml(folder) if folder else None
    results = []
    with torch.inference_mode():
        for shape in shapes:
            for batch in batches:
                for count in threads:
                    results.append(measure(shape, count, batch, options.kinds, options.rounds, options.seconds, ggml))
                    show(results[-1])
    if options.json:
        machine = {"cpu": processor(), "isa": native.variant(), "torch": torch.__version__, "cache": cache_bytes()}
        quick = {**results[0]["kernels"], "machine": machine, **results[0]}
        kept = quick if options.quick else {"machine": machine, "results": results}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
