"""compress(): the one sequential loop over decoder layers, where all the parts meet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subbit.calibration.text import check_context
from subbit.checkpoint.files import FORMAT_VERSION, write_text
from subbit.checkpoint.reader import Checkpoint, open_checkpoint
from subbit.checkpoint.writer import CheckpointWriter, check_space
from subbit.device import pick_device
from subbit.distillation import WINDOWS, distill_model, own_text, own_windows
from subbit.embeddings import pack_matrices, pack_rest, plan_embeddings, quantized_source
from subbit.errors import UserError
from subbit.job import Job
from subbit.layerwise import compress_layer
from subbit.models.layout import find_layout
from subbit.models.source import model_digest, open_source
from subbit.models.streaming import LayerCall, capture_inputs, release
from subbit.planning import make_plan, plan_sparsity
from subbit.progress import Progress, SilentProgress
from subbit.recipe import Recipe
from subbit.reporting.card import CARD_FILE, new_card, source_facts

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
    embeddings = plan_embeddings(job)
    with torch.no_grad():
        read_rest(job)  # NaN in there must stop the run now, not after the last layer
        if writer.state:
            windows, hidden = writer.restore()
            packed = pack_matrices(job, embeddings)
            calls = job.capture_calls(windows)
            progress.line(f"resuming: {writer.layers_done} of {job.layout.num_layers} layers are done")
        else:
            plan = make_plan(job, may_be_empty=bool(embeddings.specs))
            text = recipe.calibration
            check_context(skeleton, max(text.seq_len, recipe.distillation_seq_len if recipe.distillation.steps else 0))
            windows, origin = job.draw_windows(tokenizer, text.samples, text.seq_len, text.seed)
            progress.line(f"calibration: {origin}, {text.samples} windows of {text.seq_len} tokens")
            # a text that is too short must stop the run now, not after the last layer
            own = own_windows(job, tokenizer) if recipe.distillation.steps and recipe.distillation.samples else None
            check_space(Path(out), estimate_bytes(job, windows))
            packed = pack_matrices(job, embeddings)
            quantized = quantized_source(job, embeddings, packed)
            with progress.stage("embedding") as report:
                student, calls = capture_inputs(
                    skeleton, job.layout, quantized, windows, device=job.device, progress=report
                )
            hidden = {"student": student}
            if job.needs_teacher:
                hidden["teacher"] = capture_inputs(skeleton, job.layout, source, windows, device=job.device)[0]
            sparsities, dense = plan_sparsity(job, plan, student, calls)
            planned = {"sparsities": sparsities, "left_dense": dense, "embeddings": embeddings.to_dict()}
            writer.begin({"calibration": origin, **planned}, windows, hidden)
            if own is not None:
                writer.save_work(WINDOWS, {"windows": own})
            writer.log("start", model=str(model), calibration=origin, device=str(job.device))
        hidden = {who: job.settled(states) for who, states in hidden.items()}
        compress_layers(job, writer, hidden, calls)
        if recipe.distillation.steps and "distillation" not in writer.state:
            quantized = quantized_source(job, embeddings, packed)
            if recipe.distillation.samples:
                windows, hidden["teacher"] = own_text(job, writer, tokenizer)
            distill_model(job, quantized, writer, windows, hidden["teacher"])
    rest = pack_rest(job, embeddings, packed, read_rest(job))
    writer.finish(rest, lambda directory: save_extras(job, writer, tokenizer, directory))
    writer.log("finished")
    return open_checkpoint(out)


def estimate_bytes(job: Job, windows: Tensor) -> int:
    """A safe guess of the disk space that a run needs: the rest of the model, 4 bits a weight, two hidden states.

    With a teacher twice as many hidden states. Distillation writes all layers twice and, where it tunes latents, keeps
    three float32 numbers a weight, in two files while it replaces one by the next.
    """
    source, distillation = job.source, job.recipe.distillation
    config = source.config.get_text_config()
    hidden = (4 if job.needs_teacher else 2) * windows.numel() * config.hidden_size * 4
    head = 2 * config.vocab_size * config.hidden_size * source.dtype.itemsize
    needed = hidden + head + sum(source.tensor(name).numel() for name in source.names) // 2
    if distillation.steps:
        tokens = distillation.samples * job.recipe.distillation_seq_len or windows.numel()
        needed += 2 * tokens * config.hidden_size * 4
        layers = range(job.layout.num_layers)
        weights = sum(linear.weight.numel() for index in layers for linear in job.linears(index).values())
        needed += weights // 2
        if job.recipe.distills_latents:
            needed += 24 * weights + (2 * weights if job.recipe.reconstruction.steps else 0)
    return needed


# ---- one decoder layer after the other -------------------------------------------------------------------------------


def compress_layers(job: Job, writer: CheckpointWriter, hidden: dict[str, Tensor], calls: list[LayerCall]) -> None:
    """Compress, pack and write every layer that is not done yet; ``hidden`` goes through the layers with them."""
    total = job.layout.num_layers
    with job.progress.stage("decoder layers") as report:
        for index in range(writer.layers_done, total):
            report(index, total)
            started = time.monotonic()
            layer = job.materialize(index)
            if "teacher" in hidden:
                hidden["teacher"] = job.run(index, calls[index], hidden["teacher"])
            tensors, facts = compress_layer(job, writer, index, hidden, calls[index])
            hidden["student"] = job.run(index, calls[index], hidden["student"])
            release(layer)
            if not bool(hidden["student"].isfinite().all()):
                raise UserError(f"the output of {job.layout.layer_name(index)} is not finite; check the source model")
            writer.write_layer(tensors, facts, hidden)
            writer.log("layer", index=index, seconds=round(time.monotonic() - started, 2))
            job.progress.line(layer_line(index, total, facts, time.monotonic() - started))


def layer_line(index: int, total: int, facts: dict[str, Any], seconds: float) -> str:
    """What the user reads when a layer is done."""
    linears = facts["linears"]
    if not linears:
        return f"layer {index + 1}/{total}: all dense"
    weights = sum(linear["weights"] for linear in linears.values())
    error = sum(linear["error"] for linear in linears.values()) / len(linears)
    bits = 8 * sum(linear["bytes"] for linear in linears.values()) / weights
    kinds = ", ".join(dict.fromkeys(linear["label"] for linear in linears.values()))
    tuned = ""
    if "reconstruction" in facts:
        tuned = ", tuned {before:.4f} → {after:.4f}".format(**facts["reconstruction"])
    return (
        f"layer {index + 1}/{total}: {kinds}, output error {error:.4f}{tuned}, {bits:.3f} stored bits, {seconds:.1f} s"
    )


# ---- what is not compressed ------------------------------------------------------------------------------------------


def read_rest(job: Job) -> dict[str, Tensor]:
    """All that is in no decoder layer: embeddings, final norm, head."""
    inside = {name for name in job.source.names if name.startswith(job.layout.layers_prefix + ".")}
    return job.read_others("", inside)


def save_extras(job: Job, writer: CheckpointWriter, tokenizer: Any, directory: Path) -> None:
    """Tokenizer, generation config, custom code, card and, last, config.json, which makes the checkpoint loadable."""
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
    text = config.to_json_string()
    complete = open_checkpoint(directory, json.loads(text))
    write_text(directory / CARD_FILE, new_card(complete, source_facts(job.source.directory)))
    write_text(directory / "config.json", text)


def quantization_config(job: Job, writer: CheckpointWriter) -> dict[str, Any]:
    """What config.json says so that the checkpoint can be loaded."""
    return {
        "quant_method": "subbit",
        "format_version": FORMAT_VERSION,
        "method": job.recipe.method,
        "sparsity": job.recipe.sparsity if job.recipe.bits is None else f"{job.recipe.bits:g} bits",
        "linears": {
            name: linear["spec"] for layer in writer.state["layers"] for name, linear in layer["linears"].items()
        },
        "left_dense": writer.state["left_dense"],
        "embeddings": writer.state["embeddings"],
    }
