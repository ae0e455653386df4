"""compress(): the one sequential loop over decoder layers, where all the parts meet."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.calibration.gram import GramCollector
from subbit.calibration.text import calibration_windows, check_context
from subbit.checkpoint.files import FORMAT_VERSION, write_text
from subbit.checkpoint.reader import Checkpoint, open_checkpoint
from subbit.checkpoint.writer import CheckpointWriter, check_space
from subbit.errors import UserError
from subbit.job import Job
from subbit.methods import METHODS
from subbit.models.layout import find_layout
from subbit.models.source import ModelSource, open_source
from subbit.models.streaming import LayerCall, capture_inputs, release
from subbit.packing.layout import LinearSpec, pack
from subbit.planning import check_overrides, plan_sparsity
from subbit.progress import Progress, SilentProgress
from subbit.recipe import Recipe

__all__ = ["compress"]


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
            hidden = job.run(index, calls[index], hidden)
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


def compress_layer(
    job: Job, writer: CheckpointWriter, index: int, hidden: Tensor, call: LayerCall
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Compress all linears of a materialized layer, in place: it then holds the compressed weights.

    Returns:
        The tensors of the layer's shard by full name, and what the manifest says of each linear: its spec, N:M,
        bytes, relative output error and the damping that its Gram took.
    """
    planned: dict[str, str] = writer.state["sparsities"]
    linears = {name: linear for name, linear in job.linears(index).items() if name in planned}
    with GramCollector(linears, job.recipe.calibration.clip_norm) as grams:
        job.run(index, call, hidden)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for leader, names in grams.shared().items():
        gram = grams.gram(leader)
        factor = inverse_factor(gram, job.recipe.options.damping)
        for name in names:
            started = time.monotonic()
            spec, packed, error = compress_linear(job, name, linears[name], gram, factor, planned[name])
            tensors.update({f"{name}.{key}": value for key, value in packed.items()})
            facts[name] = {
                "spec": spec.to_dict(),
                "sparsity": planned[name],
                "weights": spec.out_features * spec.in_features,
                "bytes": sum(value.numel() * value.element_size() for value in packed.values()),
                "error": error,
                "damping": factor.damping,
            }
            seconds = round(time.monotonic() - started, 3)
            writer.log("linear", name=name, tokens=grams.tokens(leader), seconds=seconds, **facts[name])
            warn_about(job, name, factor, grams.tokens(leader))
    tensors.update(read_others(job.source, f"{job.layout.layer_name(index)}.", {f"{name}.weight" for name in facts}))
    return tensors, {name: facts[name] for name in linears if name in facts}


def warn_about(job: Job, name: str, factor: InverseFactor, tokens: int) -> None:
    """Say what the user should know about the statistics of a linear."""
    if factor.damping > job.recipe.options.damping:
        job.progress.line(f"{name}: the Gram is ill-conditioned, damping raised to {factor.damping:g}")
    if tokens == 0:
        job.progress.line(f"{name}: no calibration token reached it, so all its inputs count alike")


def compress_linear(
    job: Job, name: str, linear: nn.Linear, gram: Tensor, factor: InverseFactor, sparsity: str
) -> tuple[LinearSpec, dict[str, Tensor], float]:
    """Compress one linear in place; returns its spec, its packed tensors (CPU) and its relative output error."""
    weight = linear.weight.detach().clone()
    n, m = map(int, sparsity.split(":"))
    method = METHODS[job.recipe.method]
    result = method.run(weight, gram, factor, Sparsity(n, m), job.recipe.options)
    dense = result.dense()
    if not bool(result.scales.isfinite().all()):
        raise UserError(f"{name}: its scales do not fit in float16; the weights are too large for this format")
    spec, packed = pack(result)
    check_exact(name, dense, spec, packed)
    linear.weight.copy_(dense)
    return spec, {key: value.cpu() for key, value in packed.items()}, relative_output_error(weight, dense, gram)


def check_exact(name: str, dense: Tensor, spec: LinearSpec, packed: dict[str, Tensor]) -> None:
    """The packed form must decode to exactly what the method returned; anything else is a defect of ours."""
    if not torch.equal(spec.decode_rows(packed), dense):
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
