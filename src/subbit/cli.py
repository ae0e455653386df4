"""The command line: one subcommand, one function of the API."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from subbit.errors import UserError
from subbit.evaluation.zero_shot import TASKS
from subbit.methods import METHODS

app = typer.Typer(
    help="Compress Hugging Face language models towards one bit per weight and below, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Of click, or of the copy that newer typers have of it: no such option, a value of another kind.
UsageError: Any = typer.BadParameter.__bases__[0]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine instead of text for a person.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A directory, a Hugging Face hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the compressed checkpoint.")],
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="N:M, N of every M weights are kept; M is 4, 8 or 16. none: all are kept.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="codes: stored bits per linear weight, everything counted, instead of N:M.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="codes: fast (no tuning), standard or best (hours); --set changes single values.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="keep, 8bit or 4bit: how the input embedding and the head are stored.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, ptb, c4, a .txt or .jsonl file, or self: text that the model itself samples; or several, "
            "with commas between."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration windows.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file; the options here go before it.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe field, for example --set options.block_size=64. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run of the same recipe.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Compress a model: calibrate, prune and binarize layer by layer, pack, write."""
    from subbit import compress as run
    from subbit import inspect as describe
    from subbit.progress import ConsoleProgress

    given: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "bits": bits,
        "embeddings": embeddings,
        "calibration.source": calibration,
        "calibration.samples": samples,
        "calibration.seq_len": seq_len,
        "calibration.seed": seed,
    }
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    try:
        run(
            model,
            build_recipe(recipe, {key: value for key, value in given.items() if value is not None}, set_ or [], effort),
            out,
            resume=resume,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=ConsoleProgress(),
        )
    except KeyboardInterrupt:
        print("interrupted; finished layers are kept: run again with --resume", file=sys.stderr)
        raise typer.Exit(130) from None
    facts = describe(out)
    print_json(facts) if json_ else print_totals(facts, left_dense=False)  # the run said so


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint or a dense model.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(help="wikitext2 (the default without --tasks), ptb, c4, or a .txt or .jsonl file. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seq_len: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only so many windows from the start.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The dense model: measure KL divergence and top-1 agreement on the same windows.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps what the dense model said, for the next model.")
    ] = None,
    tasks: Annotated[str, typer.Option(help=f"Comma-separated zero-shot tasks, or all: {', '.join(TASKS)}.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only so many items from the start of each task.")] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences of a task that run together; auto: by memory.")] = "auto",
    unpack: Annotated[
        bool,
        typer.Option("--unpack", help="Decode once, not at every use: faster without kernels, more memory."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Perplexity (2048-token windows without overlap, as in both papers), KL divergence, zero-shot accuracy."""
    from subbit import evaluate_all as run
    from subbit.device import pick_device
    from subbit.evaluation.printing import as_json, print_evaluation
    from subbit.evaluation.record import measurements_of
    from subbit.progress import ConsoleProgress

    if cache and not reference:
        raise UserError("--cache keeps what the dense model said: give that model with --reference")
    names = split_list(tasks)
    if tasks and not names:
        raise UserError(f"--tasks {tasks!r} names none: choose {', '.join(TASKS)}, or all")
    if limit is not None and not names:
        raise UserError("--limit is of the items of --tasks: for perplexity, give --max-windows")
    results = run(
        model,
        perplexity or ([] if tasks and not reference else ["wikitext2"]),
        split=split,
        seq_len=seq_len,
        max_windows=max_windows,
        reference=reference,
        cache=cache,
        tasks=names,
        limit=limit,
        batch_size=read_batch_size(batch_size),
        unpack=unpack,
        dtype=read_dtype(dtype),
        device=str(pick_device(device)),
        trust_remote_code=trust_remote_code,
        progress=ConsoleProgress(),
    )
    if json_:
        print_json({"model": model, **as_json(results)})
    else:
        print_evaluation(results)
    keep_results(Path(model), measurements_of(results))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint or a dense model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a text."""
    import torch
    from transformers import TextStreamer

    from subbit.calibration.text import check_context
    from subbit.device import pick_device
    from subbit.loading import load_any

    if not prompt or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise UserError(
            "give a prompt that is not empty, --max-new-tokens of at least 1 and --temperature of at least 0"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: give a number from 0 to 4294967295")
    loaded, tokenizer = load_any(model, read_dtype(dtype), str(pick_device(device)), trust_remote_code)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    check_context(loaded, inputs["input_ids"].shape[1] + max_new_tokens)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    loaded.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **sampling
    )


@app.command()
def bench(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    dense: Annotated[
        str | None, typer.Option(help="The dense model; default: what the checkpoint's config.json names, if there.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(help="Measurements of every model; they take turns.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Default: as many as torch takes.")] = None,
    json_: Json = False,
) -> None:
    """Speed, memory and load time of a checkpoint beside its dense model in float32 and bfloat16, on the CPU."""
    from subbit import bench as run
    from subbit.evaluation.bench import bench_table
    from subbit.evaluation.record import speed_of
    from subbit.progress import ConsoleProgress

    counts: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
    try:
        result = run(directory, dense, **counts, threads=threads, progress=ConsoleProgress())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    failures = [f"{model.name} failed: {model.error}" for model in result.models if model.error]
    if json_:
        print_json(result.to_dict())
    else:
        Console().print(bench_table(result))
        print("\n".join(f"note: {note}" for note in result.notes), end="\n" if result.notes else "")
    keep_results(directory, speed_of(result))
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint or a dense model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model: /reset forgets the conversation, /exit leaves, Ctrl-C stops a reply."""
    from subbit.chat import Sampling, run_chat
    from subbit.device import pick_device

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    run_chat(model, sampling, system, device=str(pick_device(device)), trust_remote_code=trust_remote_code)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    linears: Annotated[bool, typer.Option("--linears", help="A line for every linear, not only every layer.")] = False,
    json_: Json = False,
) -> None:
    """What a checkpoint holds: N:M, error and bytes of every layer; nominal, stored and model bits."""
    from subbit import inspect as describe

    facts = describe(directory)
    if json_:
        print_json(facts)
        return
    table = Table(Column("layer", no_wrap=True), "N:M", "nominal bits", "stored bits", "output error", "bytes")
    for layer in facts["layers"]:
        kinds = ", ".join(dict.fromkeys(linear["sparsity"] for linear in layer["linears"]))
        add_row(table, layer, kinds, layer["linear_bytes"])
        for linear in layer["linears"] if linears else []:
            add_row(table, linear, linear["sparsity"], linear["bytes"])
    Console().print(table)
    print_totals(facts)


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="A directory, a Hugging Face hub id, or a GGUF file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The results, JSON; entries that are in it are not repeated.")
    ],
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated: dense (the model as it is), {', '.join(METHODS)}.")
    ] = "dense,stbllm,pbs2p",
    sparsity: Annotated[str, typer.Option(help="Comma-separated N:M, or none, for the methods that prune.")] = "",
    bits: Annotated[str, typer.Option(help="codes: comma-separated stored bits, instead of N:M.")] = "",
    code_bits: Annotated[str, typer.Option(help="rtn, gptq: comma-separated bits of a code, 1 to 4.")] = "",
    effort: Annotated[str | None, typer.Option(help="codes: fast, standard or best.")] = None,
    entries: Annotated[
        Path | None, typer.Option(help="YAML file with a list 'entries' of recipes, instead of the options above.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="As for compress.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the calibration windows.")] = "0",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A recipe field for all entries, as for compress. Repeatable.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="wikitext2 (the default), ptb, c4, or a .txt or .jsonl file to evaluate on. Repeatable."),
    ] = None,
    eval_seq_len: Annotated[int, typer.Option(help="Tokens of an evaluation window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only so many windows from the start.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the evaluation: float32, bfloat16 or float16.")] = "float32",
    work: Annotated[Path | None, typer.Option(help="Folder of the checkpoints; default: beside the results.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Do not delete a checkpoint when it is evaluated.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run entries again that failed before.")] = False,
    unpack: Annotated[
        bool, typer.Option("--unpack", help="Decode once before evaluating: faster, more memory, the same numbers.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the entries and run nothing.")] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a model with many recipes, evaluate each, collect the results; stop and go on as you like."""
    from subbit import sweep as run
    from subbit.comparison.entries import Protocol, grid, read_entries, with_seeds
    from subbit.progress import ConsoleProgress

    given = {"source": calibration, "samples": samples, "seq_len": seq_len}
    common: dict[str, Any] = {"calibration": {key: value for key, value in given.items() if value is not None}}
    apply_assignments(common, set_ or [])
    if entries:
        listed = read_entries(entries, common)
    else:
        numbers = read_numbers("--bits", bits, float), read_numbers("--code-bits", code_bits, int)
        listed = grid(split_list(methods), split_list(sparsity), *numbers, common, effort)
    listed = with_seeds(listed, read_numbers("--seeds", seeds, int))
    if list_:
        print("\n".join(entry.title for entry in listed))
        return
    protocol = Protocol(tuple(dataset or ["wikitext2"]), "test", eval_seq_len, max_windows, dtype)
    settings: dict[str, Any] = {"work": work, "keep": keep, "retry": retry, "unpack": unpack, "device": device}
    settings |= {"trust_remote_code": trust_remote_code, "progress": ConsoleProgress()}
    try:
        results = run(model, listed, out, protocol, **settings)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    failed = sum(result["status"] == "failed" for result in results)
    print(f"{len(results) - failed} results in {out}" + (f", {failed} failed" if failed else ""))
    print(f"next: subbit compare {out} --out DIR")
    if failed:
        raise typer.Exit(1)


@app.command()
def compare(
    sources: Annotated[list[Path], typer.Argument(help="Results of subbit sweep, or compressed checkpoints.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory for comparison.md and the figures, SVG and PNG.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the figures; needs matplotlib.")] = True,
    published: Annotated[
        Path | None, typer.Option(help="JSON of published numbers for a second panel, like comparison/published.json.")
    ] = None,
) -> None:
    """Results of sweeps, or finished checkpoints, beside each other: a Markdown table, and figures with --out."""
    from subbit import compare as run

    print(run(sources, out, figures=figures, published=published), end="")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="NAME.html, or a directory; default: DIRECTORY-report.html, beside it."),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model continue some prompts: minutes.")] = False,
    reference: Annotated[
        str | None, typer.Option(help="The dense model: what it writes is shown beside that. Means --generate.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="To continue, instead of the usual ones. Repeatable. Means --generate.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 48,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What a checkpoint is and what was measured of it: one HTML page, and the same as Markdown."""
    from subbit import report as run
    from subbit.device import pick_device
    from subbit.progress import ConsoleProgress

    settings: dict[str, Any] = {"reference": reference, "prompts": prompt or (), "max_new_tokens": max_new_tokens}
    settings |= {"device": str(pick_device(device)), "trust_remote_code": trust_remote_code}
    for file in run(directory, out, generations=generate, progress=ConsoleProgress(), **settings):
        print(file)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    repo: Annotated[str, typer.Argument(help="NAME or ORGANIZATION/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is not for everybody.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the checkpoint and list what would be uploaded; no network.")
    ] = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face hub, after checking every file."""
    from subbit import push as run

    upload = run(directory, repo, private=private, dry_run=dry_run)
    for name, size in upload.files.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(upload.files.values()):>15,}  bytes in {len(upload.files)} files")
    if dry_run:
        print(f"\nthe metadata of its card:\n{upload.metadata}\n")
    for note in upload.notes:
        print(f"note: {note}")
    print(f"nothing was uploaded to {repo}" if upload.url is None else upload.url)


@app.command()
def env(json_: Json = False) -> None:
    """Versions, devices and what will run where: put this into a bug report."""
    import torch
    import transformers

    from subbit import __version__
    from subbit.calibration.text import data_root
    from subbit.runtime.dispatch import summary

    facts = {
        "subbit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": summary(),
        "data": f"{data_root()} ({'present' if data_root().is_dir() else 'absent: the hub is asked'})",
    }
    if json_:
        print_json(facts)
        return
    for key, value in facts.items():
        print(f"{key:13} {value if value is not None else 'none'}")


def build_recipe(file: Path | None, given: dict[str, Any], assignments: list[str], effort: str | None = None) -> Any:
    """The recipe of a file, changed by the options, changed by ``--set``; ``effort`` fills in what they leave open."""
    from subbit.effort import with_effort
    from subbit.recipe import Recipe, read_yaml

    values = read_yaml(file) if file else {}
    replace_rival(values, {*given, *(assignment.partition("=")[0] for assignment in assignments)})
    if "bits" in given and "method" not in values:
        given = {"method": "codes", **given}
    if "method" in given and given["method"] != values.get("method", Recipe().method):
        values = {key: value for key, value in values.items() if key not in ("options", "allocation")}
    for key, value in given.items():
        assign(values, key, value)
    apply_assignments(values, assignments)
    return Recipe.create(values if effort is None else with_effort(effort, values))


def replace_rival(values: dict[str, Any], named: set[str]) -> None:
    """Drop from the values of a file what ``bits`` or ``sparsity`` in ``named`` replaces: the other, its allocation."""
    for name, rival in (("bits", "sparsity"), ("sparsity", "bits")):
        if name not in named:
            continue
        values.pop(rival, None)
        allocation = values.get("allocation")
        if isinstance(allocation, dict) and (allocation.get("kind") == "budget") == (name == "sparsity"):
            values["allocation"] = {key: value for key, value in allocation.items() if key == "samples"}


def apply_assignments(values: dict[str, Any], assignments: list[str]) -> None:
    """Do what ``--set field=value`` says to recipe values."""
    import yaml

    from subbit.recipe import parse_yaml

    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {assignment!r} is not of the form field=value, for example options.block_size=64")
        try:
            assign(values, key, parse_yaml(text))
        except yaml.YAMLError as error:
            raise UserError(f"--set {assignment!r} is not YAML: {' '.join(str(error).split())}") from None


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_numbers(option: str, text: str, kind: type) -> list[Any]:
    """Numbers of a comma-separated option; UserError for anything else."""
    try:
        return [kind(part) for part in split_list(text)]
    except ValueError:
        raise UserError(f"{option} {text!r} is not a comma-separated list of numbers") from None


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings."""
    *path, last = key.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"recipe: {part} is not a section, so {key} cannot be set")
        values = inner
    values[last] = value


def read_dtype(name: str) -> Any:
    """A torch dtype; UserError for one that models do not run in."""
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name!r}: choose float32, bfloat16 or float16")
    return getattr(torch, name)


def keep_results(model: Path, measurements: list[Any]) -> None:
    """Leave what was measured of a checkpoint beside its weights and in its card; one line where that cannot be."""
    from subbit.checkpoint.reader import is_compressed
    from subbit.reporting.card import keep_measurements

    if not measurements or not is_compressed(model):
        return
    try:
        keep_measurements(model, measurements)
    except UserError as error:
        print(f"not kept: {error}", file=sys.stderr)


def read_batch_size(text: str) -> int | None:
    """None for auto; UserError for what is no whole number."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(f"--batch-size {text!r}: give a number, or auto")
    return int(text)


def add_row(table: Table, entry: dict[str, Any], kinds: str, size: int) -> None:
    """A layer or a linear."""
    error = "–" if entry["error"] is None else f"{entry['error']:.4f}"
    bits = entry["bits"]
    table.add_row(entry["name"], kinds, f"{bits['nominal']:.3f}", f"{bits['stored']:.3f}", error, f"{size:,}")


def print_totals(facts: dict[str, Any], left_dense: bool = True) -> None:
    """The sums, each with what it counts; ``left_dense``: and what stayed dense."""
    bits, weights, parameters = facts["bits"], facts["linear_weights"], facts["parameters"]
    linears, packed, others = facts["linear_bytes"], facts["embedding_bytes"], facts["dense_bytes"]
    print(f"{facts['method']} {facts['sparsity']}  {facts['directory']}")
    print(f"  nominal {bits['nominal']:.3f} bits  as the papers count: {nominal_rule(facts)}")
    print(f"  stored  {bits['stored']:.3f} bits  {linears:,} bytes for {weights:,} linear weights, everything counted")
    print(f"  model   {bits['model']:.3f} bits  {facts['file_bytes']:,} bytes in all for {parameters:,} parameters")
    for label, backend in facts["backends"].items():
        print(f"  runs    {label}: {backend}")
    embeddings = facts["embeddings"]
    all_packed = embeddings and not any("left_dense" in entry for entry in embeddings.values())
    rest = f"{packed:,} packed embeddings + " if packed else ""
    rest += f"{others:,} norms, biases, others" if all_packed else f"{others:,} embeddings, norms, biases"
    print(f"  files   {linears:,} linears + {rest} + {facts['header_bytes']:,} headers")
    reasons = {}
    for name, entry in embeddings.items():
        if "left_dense" in entry:
            reasons[name] = entry["left_dense"]
        elif "tied_to" in entry:
            print(f"  {name}: the matrix of {entry['tied_to']}")
        else:
            print(f"  {name}: {entry['label']}, {entry['stored']:.3f} stored, {entry['bytes']:,} bytes")
    for name, reason in ({**reasons, **facts["left_dense"]} if left_dense else {}).items():
        print(f"  left dense: {name} ({reason})")


def nominal_rule(facts: dict[str, Any]) -> str:
    """How the nominal bits of a checkpoint are counted."""
    method = METHODS.get(facts["method"])
    uniform = method and any(field.name == "bits" for field in dataclasses.fields(method.options))
    rule = "the bits of a code" if uniform else "N/M × (1 + share of salient columns)"
    return rule + ("; dense linears as stored" if facts["left_dense"] else "")


def print_json(value: Any) -> None:
    """Strict JSON on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()  # those of transformers and the hub; in a file they are noise around the one line
    try:
        code = app(prog_name="subbit", standalone_mode=len(sys.argv) < 2)  # without arguments typer shows the help
    except UsageError as error:
        complaint = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else "subbit"
        print(f"error: {complaint}; see: {command} --help", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


if __name__ == "__main__":
    main()
