"""compress(): the one sequential loop over decoder layers, where all the parts meet."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subbit.binary.allocate import allocate, cosine_importance, outlier_share, spread_importance
from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.calibration.gram import GramCollector
from subbit.calibration.text import calibration_windows, check_context
from subbit.checkpoint.files import FORMAT_VERSION, write_text
from subbit.checkpoint.reader import Checkpoint, open_checkpoint
from subbit.checkpoint.writer import CheckpointWriter, check_space
from subbit.errors import UserError
from subbit.linears import GroupedBinaryLinear
from subbit.methods import METHODS
from subbit.models.layout import ModelLayout, find_layout, fused_groups, layer_linears, uncompressed_matrices
from subbit.models.source import ModelSource, open_source
from subbit.models.streaming import LayerCall, capture_inputs, materialize, release, run_layer
from subbit.packing.layout import GroupedBinarySpec, decode_rows, pack
from subbit.progress import Progress, SilentProgress
from subbit.recipe import Recipe

__all__ = ["compress"]


@dataclass(frozen=True)
class Job:
    """One run: what is compressed, how, and where it happens."""

    source: ModelSource
    model: PreTrainedModel  # a skeleton: only the layer at work has memory
    layout: ModelLayout
    recipe: Recipe
    device: torch.device
    progress: Progress

    def layer(self, index: int) -> nn.Module:
        """A decoder layer of the skeleton."""
        return self.layout.layers(self.model)[index]

    def materialize(self, index: int) -> nn.Module:
        """Read a decoder layer into memory, float32."""
        layer = self.layer(index)
        materialize(layer, self.layout.layer_name(index), self.source, device=self.device)
        return layer


def compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Compress a causal language model and write it to ``out``.

    One decoder layer of the model, its Grams and the calibration activations are in memory, nothing else.

    Args:
        model: a directory, a hub id or a GGUF file.
        recipe: everything the result depends on; two runs of one recipe on one machine give the same files.
        out: an empty or new directory.
        resume: go on with an unfinished run of the same recipe; at most one decoder layer is done again.
        overwrite: replace an earlier output.
        device: "auto" (a GPU if there is one), "cpu", "cuda", …

    Raises:
        UserError: see its message; nothing half-written is left that could be mistaken for a checkpoint.
    """
    progress = progress or SilentProgress()
    source = open_source(model, trust_remote_code)
    if source.note:
        progress.line(source.note)
    skeleton = source.skeleton()
    job = Job(source, skeleton, find_layout(skeleton), recipe, pick_device(device), progress)
    tokenizer = source.tokenizer()
    writer = CheckpointWriter(Path(out), recipe, model_digest(source), resume=resume, overwrite=overwrite)
    if writer.finished:
        writer.tidy()
        progress.line(f"{out} is already complete")
        return open_checkpoint(out)
    with torch.no_grad():
        read_rest(job)  # NaN in there must stop the run now, not after the last layer
        if writer.state:
            windows, hidden = writer.restore()
            calls = capture_inputs(skeleton, job.layout, source, windows[:1], device=job.device)[1]
            progress.line(f"resuming: {writer.layers_done} of {job.layout.num_layers} layers are done")
        else:
            check_overrides(job)
            check_context(skeleton, recipe.calibration.seq_len)
            windows, origin = collect_windows(job, tokenizer)
            check_space(Path(out), estimate_bytes(source, windows))
            with progress.stage("embedding") as report:
                hidden, calls = capture_inputs(
                    skeleton, job.layout, source, windows, device=job.device, progress=report
                )
            sparsities, dense = plan_sparsity(job, hidden, calls)
            writer.begin({"calibration": origin, "sparsities": sparsities, "left_dense": dense}, windows, hidden)
            writer.log("start", model=str(model), calibration=origin, device=str(job.device))
        compress_layers(job, writer, hidden, calls)
    writer.finish(read_rest(job), lambda directory: save_extras(job, writer, tokenizer, directory))
    writer.log("finished")
    return open_checkpoint(out)


def pick_device(name: str) -> torch.device:
    """UserError for a device that this machine does not have."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not available here; use --device cpu") from None
    return device


def model_digest(source: ModelSource) -> str:
    """Tells models apart: config, tensor names, shapes, dtypes and the first values of every tensor.

    Where the model lies and which transformers reads it is no part of it: it must be the same after a move.
    """
    config = {k: v for k, v in source.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(source.names):
        tensor = source.tensor(name)
        head = tensor.flatten()[:64].float().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + head)
    return digest.hexdigest()


def collect_windows(job: Job, tokenizer: Any) -> tuple[Tensor, str]:
    """Calibration windows (samples, seq_len) int64, and a line that says where they are from."""
    calibration = job.recipe.calibration
    with job.progress.stage(f"calibration text ({calibration.source})") as report:
        windows, origin = calibration_windows(
            calibration.source,
            tokenizer,
            calibration.samples,
            calibration.seq_len,
            calibration.seed,
            load_model=job.source.load_model,
            progress=report,
        )
    job.progress.line(f"calibration: {origin}, {calibration.samples} windows of {calibration.seq_len} tokens")
    return windows, origin


def estimate_bytes(source: ModelSource, windows: Tensor) -> int:
    """A safe guess of the disk space that a run needs: the rest of the model, 4 bits a weight, two hidden states."""
    config = source.config.get_text_config()
    hidden = 2 * windows.numel() * config.hidden_size * 4
    head = 2 * config.vocab_size * config.hidden_size * source.dtype.itemsize
    return hidden + head + sum(source.tensor(name).numel() for name in source.names) // 2


# ---- how N is spread over the linears --------------------------------------------------------------------------------


def plan_sparsity(job: Job, hidden: Tensor, calls: list[LayerCall]) -> tuple[dict[str, str], dict[str, str]]:
    """N:M of every linear by full name, and why the others stay dense."""
    target = Sparsity.parse(job.recipe.sparsity)
    sparsities: dict[str, str] = {}
    left_dense: dict[str, str] = {}
    free: dict[str, int] = {}  # linears that the allocator decides on → weights
    for index in range(job.layout.num_layers):
        prefix = job.layout.layer_name(index)
        for name, linear in layer_linears(job.layer(index)).items():
            full = f"{prefix}.{name}"
            wish = job.recipe.sparsity_of(full)
            m = wish.m if isinstance(wish, Sparsity) else target.m
            if wish == "dense":
                left_dense[full] = "the recipe says so"
            elif linear.in_features % m:
                left_dense[full] = f"in_features {linear.in_features} is not a multiple of M = {m}"
            elif isinstance(wish, Sparsity):
                sparsities[full] = str(wish)
            else:
                free[full] = linear.weight.numel()
        for name, shape in uncompressed_matrices(job.layer(index)).items():
            left_dense[f"{prefix}.{name}"] = f"a parameter of shape {list(shape)}, not a linear"
    if not free and not sparsities:
        raise UserError(
            f"nothing to compress: no linear of the model has in_features that is a multiple of M = {target.m}"
        )
    sparsities.update(allocate_linears(job, free, target, hidden, calls))
    for name, reason in left_dense.items():
        job.progress.line(f"left dense: {name} ({reason})")
    return {name: sparsities[name] for name in linear_names(job) if name in sparsities}, left_dense


def linear_names(job: Job) -> list[str]:
    """Full names of the linears of all decoder layers, in order."""
    depth = range(job.layout.num_layers)
    return [f"{job.layout.layer_name(index)}.{name}" for index in depth for name in layer_linears(job.layer(index))]


def check_overrides(job: Job) -> None:
    """UserError for an override that no linear matches: a misspelled name must not compress what it was to protect."""
    names = linear_names(job)
    for pattern in job.recipe.overrides:
        if not any(Recipe.matches(pattern, name) for name in names):
            raise UserError(f"recipe: overrides: {pattern!r} matches no linear of the model, which has {names[0]}, …")


def allocate_linears(
    job: Job, free: dict[str, int], target: Sparsity, hidden: Tensor, calls: list[LayerCall]
) -> dict[str, str]:
    """N:M of the linears that no override decides."""
    allocation = job.recipe.allocation
    if allocation.kind == "uniform" or not free:
        return {name: str(target) for name in free}
    units = allocation_units(job, free)
    sizes = [sum(free[name] for name in unit) for unit in units]
    importance = unit_importance(job, units, hidden[: allocation.samples], calls)
    low = target.n - 1.0 if allocation.n_low is None else allocation.n_low
    high = target.n + 1.0 if allocation.n_high is None else allocation.n_high
    numbers = allocate(spread_importance(importance, low, high), sizes, target.n, target.m)
    return {name: f"{n}:{target.m}" for unit, n in zip(units, numbers, strict=True) for name in unit}


def allocation_units(job: Job, free: dict[str, int]) -> list[list[str]]:
    """Linears that get one N: a whole decoder layer (cosine, sine), or what serving engines fuse (l2, outliers)."""
    units: list[list[str]] = []
    for index in range(job.layout.num_layers):
        prefix = job.layout.layer_name(index)
        names = [f"{prefix}.{n}" for n in layer_linears(job.layer(index)) if f"{prefix}.{n}" in free]
        units += [names] if job.recipe.allocation.kind in ("cosine", "sine") else fused_groups(names)
    return [unit for unit in units if unit]


def unit_importance(job: Job, units: list[list[str]], hidden: Tensor, calls: list[LayerCall]) -> list[float]:
    """Importance of every unit, from the dense model; larger keeps more.

    l2: root mean square of the weights (STBLLM, section 3.3). outliers: :func:`outlier_share`. cosine:
    :func:`cosine_importance`. sine: half a sine wave over the depth, the middle layers least important.
    """
    kind = job.recipe.allocation.kind
    if kind == "sine":
        depth = job.layout.num_layers
        return [1 - math.sin(math.pi * (layer_index(job, unit[0]) + 0.5) / depth) for unit in units]
    if kind == "l2":
        return [rms([job.source.tensor(f"{name}.weight") for name in unit]) for unit in units]
    by_layer: list[dict[str, float]] = []
    with job.progress.stage("layer importance") as report:
        for index in range(job.layout.num_layers):
            by_layer.append(layer_importance(job, index, hidden, calls[index]))
            report(index + 1, job.layout.num_layers)
    merged = {name: value for layer in by_layer for name, value in layer.items()}
    return [sum(merged[name] for name in unit) / len(unit) for unit in units]


def layer_importance(job: Job, index: int, hidden: Tensor, call: LayerCall) -> dict[str, float]:
    """Importance of the linears of one dense layer; ``hidden`` becomes the layer's output, in place."""
    layer = job.materialize(index)
    prefix = job.layout.layer_name(index)
    linears = layer_linears(layer)
    if index == 0:
        hidden = hidden.clone()
    with GramCollector(linears, job.recipe.calibration.clip_norm) as grams:
        output = run_samples(job, layer, call, hidden)
    if job.recipe.allocation.kind == "cosine":
        value = cosine_importance(hidden.flatten(0, 1), output.flatten(0, 1))
        result = {f"{prefix}.{name}": value for name in linears}
    else:
        norms = {n: grams.gram(leader).diagonal().sqrt() for leader, names in grams.shared().items() for n in names}
        result = {f"{prefix}.{n}": outlier_share(linear.weight, norms[n]) for n, linear in linears.items()}
    release(layer)
    hidden.copy_(output)
    return result


def layer_index(job: Job, name: str) -> int:
    """The decoder layer that a linear is in."""
    return int(name[len(job.layout.layers_prefix) + 1 :].split(".")[0])


def rms(tensors: list[Tensor]) -> float:
    """Root mean square of all values."""
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


# ---- one decoder layer after the other -------------------------------------------------------------------------------


def compress_layers(job: Job, writer: CheckpointWriter, hidden: Tensor, calls: list[LayerCall]) -> None:
    """Compress, pack and write every layer that is not done yet."""
    total = job.layout.num_layers
    with job.progress.stage("decoder layers") as report:
        for index in range(writer.layers_done, total):
            report(index, total)
            started = time.monotonic()
            layer = job.materialize(index)
            tensors, linears = compress_layer(job, writer, index, hidden, calls[index])
            hidden = run_samples(job, layer, calls[index], hidden)
            release(layer)
            if not bool(hidden.isfinite().all()):
                raise UserError(f"the output of {job.layout.layer_name(index)} is not finite; check the source model")
            writer.write_layer(tensors, {"linears": linears}, hidden)
            writer.log("layer", index=index, seconds=round(time.monotonic() - started, 2))
            job.progress.line(layer_line(index, total, linears, time.monotonic() - started))


def layer_line(index: int, total: int, linears: dict[str, dict[str, Any]], seconds: float) -> str:
    """What the user reads when a layer is done."""
    if not linears:
        return f"layer {index + 1}/{total}: all dense"
    weights = sum(linear["weights"] for linear in linears.values())
    error = sum(linear["error"] for linear in linears.values()) / len(linears)
    bits = 8 * sum(linear["bytes"] for linear in linears.values()) / weights
    kinds = ", ".join(dict.fromkeys(linear["sparsity"] for linear in linears.values()))
    return f"layer {index + 1}/{total}: {kinds}, output error {error:.4f}, {bits:.3f} stored bits, {seconds:.1f} s"


def run_samples(job: Job, layer: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    """The layer's output (samples, seq_len, hidden) float32 on the CPU, a sample at a time."""
    output = torch.empty_like(hidden)
    for index, sample in enumerate(hidden):
        output[index] = run_layer(layer, call, sample[None].to(job.device))[0].cpu()
    return output


def compress_layer(
    job: Job, writer: CheckpointWriter, index: int, hidden: Tensor, call: LayerCall
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Compress all linears of a materialized layer, in place: it then holds the compressed weights.

    Returns:
        The tensors of the layer's shard by full name, and what the manifest says of each linear: its spec, N:M,
        bytes, relative output error and the damping that its Gram took.
    """
    layer = job.layer(index)
    prefix = job.layout.layer_name(index)
    planned: dict[str, str] = writer.state["sparsities"]
    linears = {name: linear for name, linear in layer_linears(layer).items() if f"{prefix}.{name}" in planned}
    with GramCollector(linears, job.recipe.calibration.clip_norm) as grams:
        run_samples(job, layer, call, hidden)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for leader, names in grams.shared().items():
        gram = grams.gram(leader)
        factor = inverse_factor(gram, job.recipe.options.damping)
        for name in names:
            full = f"{prefix}.{name}"
            started = time.monotonic()
            spec, packed, error = compress_linear(job, full, linears[name], gram, factor, planned[full])
            tensors.update({f"{full}.{key}": value for key, value in packed.items()})
            facts[full] = {
                "spec": spec.to_dict(),
                "sparsity": planned[full],
                "weights": spec.out_features * spec.in_features,
                "bytes": sum(value.numel() * value.element_size() for value in packed.values()),
                "error": error,
                "damping": factor.damping,
            }
            seconds = round(time.monotonic() - started, 3)
            writer.log("linear", name=full, tokens=grams.tokens(leader), seconds=seconds, **facts[full])
            warn_about(job, full, factor, grams.tokens(leader))
    tensors.update(read_others(job.source, f"{prefix}.", {f"{full}.weight" for full in facts}))
    return tensors, {name: facts[name] for name in sorted(facts, key=list(planned).index)}


def warn_about(job: Job, name: str, factor: InverseFactor, tokens: int) -> None:
    """Say what the user should know about the statistics of a linear."""
    if factor.damping > job.recipe.options.damping:
        job.progress.line(f"{name}: the Gram is ill-conditioned, damping raised to {factor.damping:g}")
    if tokens == 0:
        job.progress.line(f"{name}: no calibration token reached it, so all its inputs count alike")


def compress_linear(
    job: Job, name: str, linear: nn.Linear, gram: Tensor, factor: InverseFactor, sparsity: str
) -> tuple[GroupedBinarySpec, dict[str, Tensor], float]:
    """Compress one linear in place; returns its spec, its packed tensors (CPU) and its relative output error."""
    weight = linear.weight.detach().clone()
    n, m = map(int, sparsity.split(":"))
    method = METHODS[job.recipe.method]
    result = method.run(weight, gram, factor, Sparsity(n, m), job.recipe.options)
    dense = result.dense()
    if not bool(result.scales.isfinite().all()):
        raise UserError(f"{name}: its scales do not fit in float16; the weights are too large for this format")
    spec, packed = pack(result)
    check_exact(name, result, spec, packed)
    linear.weight.copy_(dense)
    return spec, {key: value.cpu() for key, value in packed.items()}, relative_output_error(weight, dense, gram)


def check_exact(name: str, result: GroupedBinaryLinear, spec: GroupedBinarySpec, packed: dict[str, Tensor]) -> None:
    """The packed form must decode to exactly what the method returned; anything else is a defect of ours."""
    if not torch.equal(decode_rows(spec, packed), result.dense()):
        raise RuntimeError(f"{name}: the packed weights differ from the method's result; please report this")


def relative_output_error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ): the squared output error of a linear on the calibration text."""
    lost = weight - dense
    total = float(((weight @ gram) * weight).sum())
    return float(((lost @ gram) * lost).sum()) / total if total > 0 else 0.0


# ---- what is not compressed ------------------------------------------------------------------------------------------


def read_others(source: ModelSource, prefix: str, done: set[str]) -> dict[str, Tensor]:
    """Stored tensors under ``prefix`` except ``done``, in the dtype of the checkpoint (float16 for GGUF)."""
    tensors = {name: source.tensor(name) for name in source.names if name.startswith(prefix) and name not in done}
    if source.gguf_file is not None:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        finite = not tensor.is_floating_point() or all(bool(end.isfinite()) for end in tensor.aminmax())
        if tensor.numel() and not finite:
            raise UserError(f"tensor {name} in {source.directory} holds NaN or infinity; download the model again")
    return tensors


def read_rest(job: Job) -> dict[str, Tensor]:
    """All that is in no decoder layer: embeddings, final norm, head."""
    inside = {name for name in job.source.names if name.startswith(job.layout.layers_prefix + ".")}
    return read_others(job.source, "", inside)


def save_extras(job: Job, writer: CheckpointWriter, tokenizer: Any, directory: Path) -> None:
    """Tokenizer, generation config, custom code and, last, config.json, which makes the checkpoint loadable."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exceptions, also for a full disk
        raise UserError(f"cannot save the tokenizer in {directory}: {error}; then run again with --resume") from error
    for pattern in ("generation_config.json", *(["*.py"] if job.source.trust_remote_code else [])):
        for file in job.source.directory.glob(pattern):
            (directory / file.name).write_bytes(file.read_bytes())
    config = job.source.skeleton().config
    config._name_or_path = ""
    config.dtype = torch.float16 if job.source.gguf_file else job.source.dtype
    config.architectures = [type(job.model).__name__]
    config.quantization_config = quantization_config(job, writer)
    # Not save_pretrained, which refuses configs with generation settings and can leave half a file.
    write_text(directory / "config.json", config.to_json_string())


def quantization_config(job: Job, writer: CheckpointWriter) -> dict[str, Any]:
    """What config.json says so that the checkpoint can be loaded."""
    return {
        "quant_method": "subbit",
        "format_version": FORMAT_VERSION,
        "method": job.recipe.method,
        "sparsity": job.recipe.sparsity,
        "linears": {
            name: linear["spec"] for layer in writer.state["layers"] for name, linear in layer["linears"].items()
        },
        "left_dense": writer.state["left_dense"],
    }
