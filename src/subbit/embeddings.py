"""The input embedding and the head of a run: which of them are stored packed, and packing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbit.errors import UserError
from subbit.job import Job
from subbit.models.source import ModelSource
from subbit.packing.embedding import EmbeddingSpec, PackedEmbeddings, pack_matrix
from subbit.runtime.embedding import embedding_scale

__all__ = ["PackedMatrix", "pack_matrices", "pack_rest", "plan_embeddings", "quantized_source"]


@dataclass(frozen=True)
class PackedMatrix:
    """The embedding or the head as it is stored."""

    tensors: dict[str, Tensor]  # by short name
    error: float  # relative root mean square


def plan_embeddings(job: Job) -> PackedEmbeddings:
    """What the recipe's ``embeddings`` means for this model; empty for ``keep``.

    To be called before any module of the skeleton is filled, which unties what is tied. Of a tied pair both are packed
    or none.
    """
    plan = PackedEmbeddings()
    if job.recipe.embeddings == "keep":
        return plan
    bits = int(job.recipe.embeddings.removesuffix("bit"))
    embedding, head = job.model.get_input_embeddings(), job.model.get_output_embeddings()
    modules = {name_of(job.model, module): module for module in (embedding, head) if module is not None}
    reasons = {name: why_not(job.model, module, embedding, head) for name, module in modules.items()}
    tied = len(modules) == 2 and are_tied(job, *modules)
    for name, module in modules.items():
        reason = reasons[name] or (tied and next(filter(None, reasons.values()), ""))
        if reason:
            plan.left[name] = reason
        elif tied and module is head:
            plan.tied[name] = next(iter(modules))
        else:
            rows, columns = module.weight.shape
            plan.specs[name] = EmbeddingSpec(rows, columns, bits)
    for name, reason in plan.left.items():
        job.progress.line(f"left dense: {name} ({reason})")
    return plan


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module."""
    return next(name for name, other in model.named_modules() if other is module)


def why_not(model: nn.Module, module: nn.Module, embedding: nn.Module, head: nn.Module | None) -> str:
    """Why the embedding or the head, ``module``, cannot be replaced by a packed one; empty if it can."""
    if head is None:
        return "the model has no module for its head, which may use this matrix"
    if module is embedding and embedding_scale(module) is None:
        return f"a {type(module).__name__}, which is no lookup that subbit knows"
    if module is head and type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a linear"
    users = [user for user in model.modules() if any(p is module.weight for p in user.parameters(recurse=False))]
    paths = [name for name, other in model.named_modules(remove_duplicate=False) if other is module]
    if len(paths) > 1 or any(user is not embedding and user is not head for user in users):
        return "other parts of the model use the same matrix"
    return ""


def are_tied(job: Job, embedding: str, head: str) -> bool:
    """Whether the head and the embedding are one matrix.

    Two different ones in the files are kept apart, as transformers does, even where the config says tied.
    """
    first, second = f"{embedding}.weight", f"{head}.weight"
    if job.model.get_parameter(first) is not job.model.get_parameter(second):
        return False
    return job.source.stored_name(first) == job.source.stored_name(second) or torch.equal(
        job.source.tensor(first), job.source.tensor(second)
    )


def pack_matrices(job: Job, plan: PackedEmbeddings) -> dict[str, PackedMatrix]:
    """What the plan packs, by module name; UserError for a matrix that cannot be packed. Done once in a run."""
    packed = {}
    for name, spec in plan.specs.items():
        try:
            packed[name] = PackedMatrix(*pack_matrix(job.source.tensor(f"{name}.weight"), spec))
        except OverflowError as error:
            raise UserError(f"{name}: {error}; use embeddings: keep") from None
    return packed


def quantized_source(job: Job, plan: PackedEmbeddings, packed: dict[str, PackedMatrix]) -> ModelSource:
    """The source as the calibration must see it: with the embedding that the compressed model will have."""
    return job.source.replacing(
        {f"{name}.weight": decoder(spec, packed[name].tensors) for name, spec in plan.specs.items()}
    )


def decoder(spec: EmbeddingSpec, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Gives (tokens, width) float32 of packed tensors."""
    return lambda: spec.decode_rows(tensors)


def pack_rest(
    job: Job, plan: PackedEmbeddings, packed: dict[str, PackedMatrix], rest: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``rest``, what is in no decoder layer, with packed matrices in the place of those that the plan names."""
    rest = dict(rest)
    for name, spec in plan.specs.items():
        heads = [head for head, other in plan.tied.items() if other == name]
        dense = [rest.pop(f"{user}.weight") for user in (name, *heads) if f"{user}.weight" in rest]
        rest.update({f"{name}.{key}": tensor for key, tensor in packed[name].tensors.items()})
        sizes = f"{sum(tensor.nbytes for tensor in dense):,} → {spec.stored_bytes:,} bytes"
        job.progress.line(
            f"{' = '.join([name, *heads])}: {spec.label}, {sizes}, relative error {packed[name].error:.4f}"
        )
    return rest
