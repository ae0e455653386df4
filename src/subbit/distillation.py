"""The last stage of a run that asks for it: tune the whole model against the dense one, and write its layers again."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from subbit.checkpoint.writer import CheckpointWriter
from subbit.errors import UserError
from subbit.job import Job
from subbit.layerwise import check_scales, install, load_latents, pack_exactly, relative_output_error
from subbit.linears import CompressedLinear
from subbit.models.source import ModelSource
from subbit.models.streaming import LayerCall, capture_inputs, outside_on_demand, release, run_head
from subbit.packing.layout import read_spec
from subbit.progress import Report
from subbit.tuning.distill import Head, Student, distill, mean_divergence, optimizer_tensors
from subbit.tuning.optimizer import Rates, tuned_norms
from subbit.tuning.precision import resolve_precision
from subbit.tuning.tunable import Tunable, make_tunable

__all__ = ["WINDOWS", "distill_model", "own_text", "own_windows"]

WINDOWS = "distillation-windows"  # what a run calls them in its working folder

SAVE_SECONDS = 300.0  # between two saved states: at most so much work is lost
ERROR_TOKENS = 4096  # that the output errors of the tuned linears are measured on


def own_windows(job: Job, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows (samples, seq_len) for distillation alone; UserError where the texts do not give so many."""
    recipe, samples = job.recipe, job.recipe.distillation.samples
    counts = samples, recipe.distillation_seq_len, recipe.distillation_seed, recipe.held_out_of(samples)
    windows, origin = job.draw_windows(tokenizer, *counts)
    job.progress.line(f"distillation: {origin}, {samples} windows of {windows.shape[1]} tokens")
    return windows


def own_text(job: Job, writer: CheckpointWriter, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Windows (samples, seq_len) for distillation alone, and what leaves the dense model's last decoder layer on them.

    Whatever goes through all stages of the layers costs several times as much a window, and the more different text
    distillation sees, the less it fits a text instead of the teacher.
    """
    name = "distillation-text"
    saved = writer.load_work(name)
    if saved is None:
        drawn = writer.load_work(WINDOWS)
        windows = own_windows(job, tokenizer) if drawn is None else drawn["windows"]
        hidden, calls = capture_inputs(job.model, job.layout, job.source, windows, device=job.device)
        teacher = job.dense_output("dense model", job.settled(hidden), calls)
        saved = writer.save_work(name, {"windows": windows, "teacher": teacher})
    return saved["windows"], saved["teacher"]


def distill_model(job: Job, source: ModelSource, writer: CheckpointWriter, windows: Tensor, teacher: Tensor) -> None:
    """Tune scales, norms and latents of all layers, then write all shards again. Goes on where a killed run was.

    Args:
        source: the model with the embedding that the compressed one will have.
        teacher: (samples, seq_len, hidden) float32, what leaves the last decoder layer of the dense model.
    """
    settings = job.recipe.distillation
    embedded, calls = embed(job, source, writer, windows)
    layers = [load_layer(job, writer, index) for index in range(job.layout.num_layers)]
    with ExitStack() as stack:
        stack.enter_context(outside_on_demand(job.model, job.layout, source, job.device))
        for layer in layers:
            stack.callback(release, layer)
        dtype = resolve_precision(settings.precision, job.device)
        head = make_head(job, source, embedded[:1, :1], dtype)
        student = Student(layers, calls, head, settings.checkpoint_activations)
        saved = writer.load_work("distillation") or {}
        start = int(saved["step"]) if "step" in saved else 0
        if start:
            restore_layers(layers, saved)
            job.progress.line(f"resuming: {start} of {settings.steps} steps of distillation are done")
        train = len(windows) - job.recipe.held_out_of(len(windows))
        held_out = embedded[train:], teacher[train:]
        before = float(saved["before"]) if "before" in saved else measure(job, student, *held_out, dtype)
        with job.progress.stage("distillation") as report:
            keeper = Keeper(job, writer, layers, report, before)
            distill(
                student,
                embedded[:train],
                teacher[:train],
                steps=settings.steps,
                batch=settings.batch,
                rates=Rates(settings.latent_rate, settings.scale_rate, settings.norm_rate),
                seed=job.recipe.calibration.seed,
                dtype=dtype,
                device=job.device,
                recorded=not routes_tokens(layers),
                start=start,
                optimizer_state={
                    k.removeprefix("optimizer."): v for k, v in saved.items() if k.startswith("optimizer.")
                },
                after_step=keeper,
            )
        after = measure(job, student, *held_out, dtype)
        facts: dict[str, float | None] = {"before": before, "after": after}
        said = f"divergence on held-out windows {before:.3f} → {after:.3f} nats a token"
        if train == len(windows):
            facts, said = dict.fromkeys(facts), "no window was held out, so the result is not measured"
        job.progress.line(f"distillation: {said}")
        tuned = [tuned_linears(job, layer, index) for index, layer in enumerate(layers)]
        errors = output_errors(job, tuned, embedded, calls)
        write_layers(job, writer, layers, tuned, errors, facts)


def routes_tokens(layers: list[nn.Module]) -> bool:
    """Whether a layer has experts: what they compute depends on the tokens."""
    return any(path.endswith("experts") for layer in layers for path, _ in layer.named_modules())


def embed(job: Job, source: ModelSource, writer: CheckpointWriter, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """What enters the first decoder layer, (samples, seq_len, hidden) in a file of the run, and the calls of all."""
    name = "distillation-inputs"
    saved = writer.load_work(name)
    if saved is not None:
        return saved["embedded"], job.capture_calls(windows)
    embedded, calls = capture_inputs(job.model, job.layout, source, windows, device=job.device)
    return writer.save_work(name, {"embedded": embedded})["embedded"], calls


def make_head(job: Job, source: ModelSource, any_hidden: Tensor, dtype: torch.dtype) -> Head:
    """Final norm and output matrix, for use inside ``outside_on_demand``; the matrix is kept in ``dtype``."""

    def head(hidden: Tensor) -> Tensor:
        return run_head(job.model, job.layout, source, hidden, device=job.device, gradient=True)

    head(any_hidden)  # fills it
    matrix = job.model.get_output_embeddings()
    if isinstance(matrix, nn.Linear):  # else what is made of it is the model's affair
        matrix.weight.data = matrix.weight.data.to(dtype)
    return head


def measure(job: Job, student: Student, embedded: Tensor, teacher: Tensor, dtype: torch.dtype) -> float:
    """Divergence on the windows held out; UserError when it is no number."""
    value = mean_divergence(student, embedded, teacher, dtype, job.device)
    if not math.isfinite(value):
        raise UserError("distillation diverged; lower its learning rates")
    return value


def load_layer(job: Job, writer: CheckpointWriter, index: int) -> nn.Module:
    """A decoder layer in memory with tunable linears and the norms of its shard."""
    layer = job.materialize(index)
    facts = writer.state["layers"][index]
    prefix = job.layout.layer_name(index)
    shard = load_file(writer.directory / facts["file"])
    for name, parameter in layer.named_parameters():
        if f"{prefix}.{name}" in shard:
            parameter.data.copy_(shard[f"{prefix}.{name}"])
    tunables: dict[str, Tunable] = {}
    for name, entry in facts["linears"].items():
        spec = read_spec(entry["spec"])
        linear = layer.get_submodule(name.removeprefix(prefix + "."))
        packed = {key: shard[f"{name}.{key}"].to(job.device) for key in spec.tensors()}
        assert isinstance(linear, nn.Linear)
        tunables[name] = make_tunable(spec.unpack(packed), linear.weight.detach(), linear.bias)
    load_latents(job, writer, index, tunables)
    install(layer, prefix, tunables)
    return layer


class Keeper:
    """Called after every step: progress, and every few minutes a saved state."""

    def __init__(
        self, job: Job, writer: CheckpointWriter, layers: list[nn.Module], report: Report, before: float
    ) -> None:
        self._job = job
        self._writer = writer
        self._layers = layers
        self._report = report
        self._before = before
        self._saved = time.monotonic()

    def __call__(self, done: int, loss: float, optimizer: torch.optim.Optimizer) -> None:
        """``done`` steps are done; ``loss`` is that of the last one. UserError when that is no number."""
        if not math.isfinite(loss):
            raise UserError(f"distillation diverged in step {done}; lower its learning rates")
        steps = self._job.recipe.distillation.steps
        self._report(done, steps)
        self._writer.log("distillation", step=done, divergence=round(loss, 5))
        if done % 10 == 0:
            self._job.progress.line(f"distillation step {done}/{steps}: divergence {loss:.3f} nats a token")
        if done == steps or time.monotonic() - self._saved > SAVE_SECONDS:
            tensors = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
            facts = {"step": torch.tensor(done), "before": torch.tensor(self._before, dtype=torch.float64)}
            self._writer.save_work("distillation", tensors | trained(self._layers) | facts)
            self._saved = time.monotonic()


def trained(layers: list[nn.Module]) -> dict[str, Tensor]:
    """Everything that training changes, by number of the layer and name."""
    return {
        f"{index}.{name}": parameter.detach().cpu()
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }


def restore_layers(layers: list[nn.Module], saved: dict[str, Tensor]) -> None:
    """The inverse of :func:`trained`."""
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if f"{index}.{name}" in saved:
                parameter.data.copy_(saved[f"{index}.{name}"])


def tuned_linears(job: Job, layer: nn.Module, index: int) -> dict[str, CompressedLinear]:
    """The compressed linears that a tuned decoder layer has now, by full name; UserError for scales beyond float16."""
    prefix = job.layout.layer_name(index)
    modules = layer.named_modules(prefix=prefix)
    linears = {name: module.linear() for name, module in modules if isinstance(module, Tunable)}
    for name, linear in linears.items():
        check_scales(name, linear)
    return linears


def output_errors(
    job: Job, tuned: list[dict[str, CompressedLinear]], embedded: Tensor, calls: list[LayerCall]
) -> dict[str, float]:
    """Relative squared output error of every linear, on what the dense model gives it for the first windows."""
    dense = replace(job, model=job.source.skeleton())  # the layers of job.model hold tunable linears
    few = embedded[: max(1, ERROR_TOKENS // embedded.shape[1])]
    names = {name for linears in tuned for name in linears}
    errors = {}
    for linears, layer in zip(tuned, dense.dense_pass("output errors", few, calls, names), strict=True):
        for leader, members in layer.grams.shared().items():
            gram = layer.grams.gram(leader)
            for name in members:
                errors[name] = relative_output_error(layer.linears[name].weight, linears[name].dense(), gram)
    return errors


def write_layers(
    job: Job,
    writer: CheckpointWriter,
    layers: list[nn.Module],
    tuned: list[dict[str, CompressedLinear]],
    errors: dict[str, float],
    facts: dict[str, Any],
) -> None:
    """Pack all layers again, and put the new shards into the places of the old ones."""
    described = []
    for index, (layer, linears, old) in enumerate(zip(layers, tuned, writer.state["layers"], strict=True)):
        prefix = job.layout.layer_name(index)
        tensors = load_file(writer.directory / old["file"])
        tensors.update({f"{prefix}.{name}": job.stored(norm) for name, norm in tuned_norms(layer).items()})
        for name, linear in linears.items():
            tensors.update(pack_exactly(name, linear, linear.dense())[1])
        entries = {name: {**entry, "error": errors[name]} for name, entry in old["linears"].items()}
        described.append({**old, "linears": entries, **writer.stage_layer(index, tensors)})
    writer.commit_staged(described, distillation=facts)
