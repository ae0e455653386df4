"""One decoder layer: statistics, the method on every linear, tuning, packing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subbit.binary.compensate import InverseFactor, inverse_factor
from subbit.binary.nm import Sparsity
from subbit.calibration.gram import GramCollector
from subbit.checkpoint.writer import CheckpointWriter
from subbit.errors import UserError
from subbit.job import Job
from subbit.linears import CompressedLinear
from subbit.methods import METHODS
from subbit.models.layout import ExpertName
from subbit.models.streaming import LayerCall
from subbit.packing.layout import LinearSpec, pack
from subbit.tuning.optimizer import Rates, tuned_norms
from subbit.tuning.precision import resolve_precision
from subbit.tuning.reconstruct import reconstruct
from subbit.tuning.tunable import Tunable, TunableCodes, make_tunable, separate

__all__ = ["check_scales", "compress_layer", "install", "load_latents", "pack_exactly", "relative_output_error"]


def compress_layer(
    job: Job, writer: CheckpointWriter, index: int, hidden: dict[str, Tensor], call: LayerCall
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compress all linears of a materialized layer, in place: it then holds the compressed weights and tuned norms.

    Args:
        hidden: what enters the layer in the student; what leaves it in the teacher, where that is needed.

    Returns:
        The tensors of the layer's shard by full name, and what the manifest says of the layer.
    """
    planned: dict[str, str] = writer.state["sparsities"]
    linears = {name: linear for name, linear in job.linears(index).items() if name in planned}
    with job.collect_grams(linears) as grams:
        job.run(index, call, hidden["student"])
    report_short_experts(job, grams)
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    results: dict[str, CompressedLinear] = {}
    dampings: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for leader, names in grams.shared().items():
        gram = grams.gram(leader)
        factor = inverse_factor(gram, job.recipe.options.damping)
        for name in names:
            started = time.monotonic()
            results[name] = run_method(job, name, weights[name], gram, factor, planned[name])
            dampings[name] = factor.damping
            seconds[name] = round(time.monotonic() - started, 3)
            warn_about(job, name, factor, grams.tokens(leader) + grams.borrowed(leader))
    facts: dict[str, Any] = {}
    others = job.read_others(f"{job.layout.layer_name(index)}.", {f"{name}.weight" for name in results})
    if job.recipe.reconstruction.steps and results:
        results, norms, facts["reconstruction"] = reconstruct_layer(job, writer, index, hidden, call, results, weights)
        others.update(norms)
    packed: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for leader, names in grams.shared().items():
        gram = grams.gram(leader)
        counts = {"tokens": grams.tokens(leader), "borrowed_tokens": grams.borrowed(leader)}
        for name in names:
            dense = results[name].dense()
            spec, tensors = pack_exactly(name, results[name], dense)
            packed.update(tensors)
            described[name] = {
                **describe(spec),
                "error": relative_output_error(weights[name], dense, gram),
                "sparsity": planned[name],
                "damping": dampings[name],
                "outliers": grams.peaks(leader),
            }
            writer.log("linear", name=name, **counts, seconds=seconds[name], **described[name])
            linears[name].weight.copy_(dense)
    facts["linears"] = {name: described[name] for name in linears}
    return packed | others, facts


def report_short_experts(job: Job, grams: GramCollector) -> None:
    """Say how many experts saw too few tokens to be judged by them alone."""
    names = {leader: parts for leader in grams.shared() if (parts := ExpertName.parse(leader))}
    for experts in dict.fromkeys(parts.experts for parts in names.values()):
        leaders = [leader for leader, parts in names.items() if parts.experts == experts]
        short = {names[leader].number for leader in leaders if grams.borrowed(leader)}
        if short:
            fewest = min(grams.tokens(leader) for leader in leaders)
            count = len({names[leader].number for leader in leaders})
            job.progress.line(
                f"{experts}: {len(short)} of {count} experts saw fewer calibration tokens than min_expert_tokens asks "
                f"for, the least {fewest}; the Gram of all experts makes up for what they lack"
            )


def warn_about(job: Job, name: str, factor: InverseFactor, tokens: int) -> None:
    """Say what the user should know about the statistics of a linear."""
    if factor.damping > job.recipe.options.damping:
        job.progress.line(f"{name}: the Gram is ill-conditioned, damping raised to {factor.damping:g}")
    if tokens == 0:
        job.progress.line(f"{name}: no calibration token reached it, so all its inputs count alike")


def run_method(
    job: Job, name: str, weight: Tensor, gram: Tensor, factor: InverseFactor, sparsity: str
) -> CompressedLinear:
    """Compress one linear; UserError when the result does not fit in the format."""
    method = METHODS[job.recipe.method]
    result = method.run(weight, gram, factor, Sparsity.parse(sparsity), job.recipe.options)
    check_scales(name, result)
    return result


def check_scales(name: str, linear: CompressedLinear) -> None:
    """UserError for scales that float16 does not hold."""
    if not bool(linear.scales.isfinite().all()):
        raise UserError(f"{name}: its scales do not fit in float16; the weights are too large for this format")


def reconstruct_layer(
    job: Job,
    writer: CheckpointWriter,
    index: int,
    hidden: dict[str, Tensor],
    call: LayerCall,
    results: dict[str, CompressedLinear],
    weights: dict[str, Tensor],
) -> tuple[dict[str, CompressedLinear], dict[str, Tensor], dict[str, float]]:
    """Tune a layer against the teacher; it then holds tuned norms, rounded as they are stored.

    Latents that distillation will tune further are kept in the run's working folder.

    Returns:
        The tuned linears, the tuned norms by full name in the dtype of the checkpoint, and the error before and after.

    Raises:
        UserError: the learning rates are too large.
    """
    layer, settings = job.layer(index), job.recipe.reconstruction
    dtype = resolve_precision(settings.precision, job.device)
    plain = job.linears(index)
    prefix = job.layout.layer_name(index)
    tunables = {name: make_tunable(result, weights[name], plain[name].bias) for name, result in results.items()}
    install(layer, prefix, tunables)
    rates = Rates(settings.latent_rate, settings.scale_rate, settings.norm_rate)
    before, after = reconstruct(
        layer,
        call,
        hidden["student"],
        hidden["teacher"],
        steps=settings.steps,
        batch=settings.batch,
        rates=rates,
        token_exponent=settings.token_exponent,
        first_token=settings.first_token,
        seed=index,
        dtype=dtype,
        device=job.device,
    )
    if not math.isfinite(before + after):
        raise UserError(f"{prefix}: reconstruction diverged; lower its learning rates")
    norms = {f"{prefix}.{name}": job.stored(norm) for name, norm in tuned_norms(layer).items()}
    for name, norm in tuned_norms(layer).items():
        norm.data.copy_(norms[f"{prefix}.{name}"])
    install(layer, prefix, plain)
    if job.recipe.distills_latents:
        save_latents(writer, index, tunables)
    tuned = {name: tunable.linear() for name, tunable in tunables.items()}
    for name, linear in tuned.items():
        check_scales(name, linear)
    return tuned, norms, {"before": before, "after": after}


def save_latents(writer: CheckpointWriter, index: int, tunables: Mapping[str, Tunable]) -> None:
    """Keep the latents of a layer for :func:`load_latents`, in float16: half the disk, and only where a run begins."""
    latents = {name: latent for name, tunable in tunables.items() for latent in tunable.latent_parameters()}
    writer.save_work(f"latents-{index:05d}", {name: latent.detach().cpu().half() for name, latent in latents.items()})


def load_latents(job: Job, writer: CheckpointWriter, index: int, tunables: Mapping[str, Tunable]) -> None:
    """Give the tunables of a layer the latents that its reconstruction ended with, where it kept some."""
    kept = writer.load_work(f"latents-{index:05d}") or {}
    for name, values in kept.items():
        tunable = tunables[name]
        assert isinstance(tunable, TunableCodes)
        tunable.latent.data.copy_(separate(values.to(job.device, torch.float32), tunable.sparsity))


def install(layer: nn.Module, prefix: str, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of linears, by full name; ``prefix`` is the name of the layer."""
    for name, module in modules.items():
        layer.set_submodule(name.removeprefix(prefix + "."), module)


def pack_exactly(name: str, linear: CompressedLinear, dense: Tensor) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The description of a linear, and its stored tensors (CPU) by full name.

    The packed form must decode to exactly ``dense``, the value of the linear; anything else is a defect of ours.
    """
    spec, packed = pack(linear)
    if not torch.equal(spec.decode_rows(packed), dense):
        raise RuntimeError(f"{name}: the packed weights differ from the method's result; please report this")
    return spec, {f"{name}.{key}": value.cpu() for key, value in packed.items()}


def describe(spec: LinearSpec) -> dict[str, Any]:
    """What the manifest says of every linear of a description."""
    return {
        "spec": spec.to_dict(),
        "label": spec.label,
        "weights": spec.out_features * spec.in_features,
        "bytes": spec.stored_bytes,
    }


def relative_output_error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ): the squared output error of a linear on the calibration text."""
    lost = weight - dense
    total = float(((weight @ gram) * weight).sum())
    return float(((lost @ gram) * lost).sum()) / total if total > 0 else 0.0
