"""Whole models, decoding: SmolLM2 as it was compressed, and a model of the shape of LLaMA-7B with random codewords.

    python benchmarks/decode.py --dense smol --packed smol-codes-2-8 --json benchmarks/results/decode.json
    python benchmarks/decode.py --llama --layers 4 --json benchmarks/results/decode.json

Times are those of `subbit bench`: every measurement is a process of its own, models take turns, medians. The 7B-shaped
model is written to a folder as a 2:8 `codes` checkpoint of random codewords, beside a bfloat16 model of as many layers;
no float32 model is ever built. On a machine with less memory `--layers N` takes N of the 32 layers, and N / 2 for a
second point: time of a token, memory and file are then straight lines in the number of layers, and the figures at 32
are read from them (`extrapolated`). Whatever is in the file already is kept.

`memory_over_file` is what the process took for the model (resident memory after the last token less that before
loading) over its weight files; `resident_over_file` takes all memory of the process, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from user_errors import run

from subbit.checkpoint.files import FORMAT_VERSION, INDEX_FILE, MANIFEST_FILE, sha256, write_json, write_tensors
from subbit.evaluation.bench import Bench, Measured, bench, bench_table
from subbit.packing.codes import CodesSpec
from subbit.packing.embedding import EmbeddingSpec
from subbit.runtime import native

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
EMBEDDINGS = ("model.embed_tokens", "lm_head")
CODEWORDS, WIDTH = 112, 7  # of 2:8; eight of them take WIDTH bytes


@dataclass(frozen=True)
class Shape:
    """A model to write."""

    layers: int
    packed: bool
    embedding_bits: int  # of a packed model: 16, 8 or 4

    def config(self) -> dict[str, Any]:
        """What its config.json says."""
        from transformers import LlamaConfig  # not above: before subbit it would take kernels.py for a package

        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            vocab_size=VOCABULARY,
            num_hidden_layers=self.layers,
            num_attention_heads=32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        values: dict[str, Any] = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        if self.packed:
            linears = {
                f"model.layers.{layer}.{name}": codes_spec(*shape).to_dict() for layer, name, shape in self.linears()
            }
            embeddings = {name: self.embedding_spec().to_dict() for name in EMBEDDINGS if self.embedding_bits < 16}
            values["quantization_config"] = {
                "quant_method": "subbit",
                "format_version": FORMAT_VERSION,
                "method": "codes",
                "sparsity": "2:8",
                "linears": linears,
                "left_dense": {},
                "embeddings": embeddings,
            }
        return values

    def linears(self) -> list[tuple[int, str, tuple[int, int]]]:
        """(layer, name, shape) of all linears of the decoder layers."""
        return [(layer, name, shape) for layer in range(self.layers) for name, shape in SHAPES.items()]

    def embedding_spec(self) -> EmbeddingSpec:
        """Of the embedding and of the head."""
        return EmbeddingSpec(VOCABULARY, HIDDEN, self.embedding_bits)


def codes_spec(rows: int, columns: int) -> CodesSpec:
    """A 2:8 linear."""
    return CodesSpec(rows, columns, 2, 8, False)


def random_codes(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The stored tensors of a linear of random codewords."""
    words = torch.randint(CODEWORDS, (rows, columns // 64, 8), generator=generator)
    eight = (words << WIDTH * torch.arange(8)).sum(dim=2)
    codes = eight.view(torch.uint8).unflatten(1, (-1, 8))[:, :, :WIDTH].flatten(1)
    return {"codes": codes, "row_scales": torch.full((rows,), 1 / 32, dtype=torch.float16)}


def random_rows(spec: EmbeddingSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """The stored tensors of an embedding or head of random codes."""
    (shape, _), (grids, _) = spec.tensors()["codes"], spec.tensors()["zeros"]
    codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.full(grids, 2 ** (spec.bits - 1), dtype=torch.uint8)
    return {"codes": codes, "zeros": zeros, "scales": torch.full(grids, 1e-2, dtype=torch.float16)}


def random_weight(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A dense bfloat16 matrix."""
    return {"weight": torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16) / 64}


def write_model(shape: Shape, directory: Path) -> None:
    """Write a checkpoint of random weights, a decoder layer in memory at a time."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    make = random_codes if shape.packed else random_weight
    places: dict[str, str] = {}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {f"{prefix}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        for name, (rows, columns) in SHAPES.items():
            for key, tensor in make(rows, columns, generator).items():
                tensors[f"{prefix}.{name}.{key}"] = tensor
        write_shard(directory, f"model-layer-{layer:05d}.safetensors", tensors, places)
    tensors = {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    for name in EMBEDDINGS:
        packed = shape.packed and shape.embedding_bits < 16
        made = (
            random_rows(shape.embedding_spec(), generator) if packed else random_weight(VOCABULARY, HIDDEN, generator)
        )
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    write_shard(directory, "model-rest.safetensors", tensors, places)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": places})
    if shape.packed:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in directory.glob("*.safetensors")
        }
        write_json(directory / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": files})
    write_tokenizer(directory)
    write_json(directory / "config.json", shape.config())


def write_tokenizer(directory: Path) -> None:
    """One that knows no words."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


def write_shard(directory: Path, file: str, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    """One file, and where its tensors are."""
    write_tensors(directory / file, tensors)
    places.update(dict.fromkeys(tensors, file))


def compare_shapes(layers: int, options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> Bench:
    """The packed 7B-shaped model and its bfloat16 peer, of some layers."""
    packed, dense = folder / f"packed-{layers}", folder / f"dense-{layers}"
    write_model(Shape(layers, True, options.embedding_bits), packed)
    write_model(Shape(layers, False, 16), dense)
    return bench(packed, dense, dense_dtypes=["bfloat16"], **settings)


def figures(model: Measured) -> dict[str, Any]:
    """What is kept of a model."""
    if model.error or not model.decode_tokens_per_second or not model.file_bytes:
        return {"error": model.error}
    return {
        "prompt_tokens_per_second": model.prompt_tokens_per_second,
        "decode_tokens_per_second": model.decode_tokens_per_second,
        "load_seconds": model.load_seconds,
        "file_bytes": model.file_bytes,
        "model_bytes": model.model_bytes,
        "resident_bytes": model.resident_bytes,
        "peak_bytes": model.peak_bytes,
        "bytes_per_token": model.bytes_per_token,
        "memory_over_file": (model.model_bytes or 0) / model.file_bytes,
        "resident_over_file": (model.resident_bytes or 0) / model.file_bytes,
    }


def summary(result: Bench) -> dict[str, Any]:
    """All models of a run, and how much faster the packed one decodes than bfloat16."""
    models = {model.name: figures(model) for model in result.models}
    return {"models": models, "speedup_vs_bfloat16": speedup(models), "new_tokens": result.new_tokens}


def speedup(models: dict[str, dict[str, Any]]) -> float | None:
    """Tokens a second of the packed model over those of bfloat16, where both are known."""
    rates = {
        name.split()[0]: found.get("decode_tokens_per_second")
        for name, found in models.items()
        if "float32" not in name
    }
    packed, dense = rates.get("packed"), rates.get("dense")
    return packed / dense if packed and dense else None


def extrapolate(few: dict[str, Any], many: dict[str, Any], at: tuple[int, int], layers: int = LAYERS) -> dict[str, Any]:
    """Figures at ``layers``, on the straight lines through those ``at`` two numbers of layers."""

    def line(low: float, high: float) -> float:
        return low + (high - low) * (layers - at[0]) / (at[1] - at[0])

    models: dict[str, dict[str, Any]] = {}
    for name, one in few["models"].items():
        other = many["models"][name]
        rates = (found["decode_tokens_per_second"] for found in (one, other))
        found = {"decode_tokens_per_second": 1 / line(*(1 / rate for rate in rates))}
        for key in ("load_seconds", "file_bytes", "model_bytes", "resident_bytes", "peak_bytes", "bytes_per_token"):
            found[key] = line(one[key], other[key])
        found["memory_over_file"] = found["model_bytes"] / found["file_bytes"]
        found["resident_over_file"] = found["resident_bytes"] / found["file_bytes"]
        models[name] = found
    return {"layers": layers, "from_layers": list(at), "models": models, "speedup_vs_bfloat16": speedup(models)}


def run_llama(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The 7B-shaped model: the layers that are asked for, and if these are not all, a second point and the line."""
    results: dict[int, dict[str, Any]] = {}
    environment: dict[str, Any] = {}
    for layers in sorted({options.layers, max(1, options.layers // 2)} if options.layers < LAYERS else {LAYERS}):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            result = compare_shapes(layers, options, settings, Path(folder))
        Console().print(bench_table(result))
        results[layers], environment = summary(result), result.environment
    found = {"embedding_bits": options.embedding_bits, "layers": {str(layers): one for layers, one in results.items()}}
    if len(results) == 2:
        at = (min(results), max(results))
        found["extrapolated"] = extrapolate(results[at[0]], results[at[1]], at)
        print(json.dumps(found["extrapolated"], indent=1))
    return {**found, "environment": environment}


def run_models(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Every checkpoint of ``--packed`` beside the dense model."""
    found = {}
    for directory in options.packed:
        result = bench(directory, options.dense, **settings)
        Console().print(bench_table(result))
        found[directory.name] = {**summary(result), "environment": result.environment}
    return found


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="the dense model of --packed")
    parser.add_argument("--packed", type=Path, nargs="*", default=[], help="compressed checkpoints of --dense")
    parser.add_argument("--llama", action="store_true", help="the model of the shape of LLaMA-7B")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of its 32; fewer are extrapolated")
    parser.add_argument("--embedding-bits", type=int, default=8, choices=[16, 8, 4], help="of its embedding and head")
    parser.add_argument("--work", type=Path, help="folder for the model; it needs 0.5 GB and 0.45 GB for a layer")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="keep the figures here, beside what is there")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "rounds", "threads")}
    results: dict[str, Any] = {}
    if options.packed:
        results["models"] = run_models(options, settings)
    if options.llama:
        results[f"llama-7b, embeddings in {options.embedding_bits} bits"] = run_llama(options, settings)
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        write_json(options.json, {**kept, "isa": native.variant(), **results})


if __name__ == "__main__":
    run(main)
