"""Load, inspect and evaluate what compress() wrote; dense models too where that makes sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from subbit.checkpoint.reader import Checkpoint, is_compressed, open_checkpoint
from subbit.errors import CheckpointError, UserError
from subbit.evaluation.perplexity import Perplexity
from subbit.integrations.transformers import register
from subbit.models.source import ModelSource, open_source
from subbit.packing.accounting import BitCount, LinearCount
from subbit.packing.spec import LinearSpec
from subbit.progress import Progress
from subbit.runtime.dispatch import choose
from subbit.runtime.linear import unpack_linears

__all__ = ["evaluate", "inspect", "load"]


def load(
    directory: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a compressed checkpoint: the model, in eval mode, and its tokenizer.

    Args:
        dtype: of the activations and of what is not compressed; "auto" is the dtype of the source model.

    Raises:
        CheckpointError: a missing, truncated or altered file, a packed tensor that is not there, a newer format.
    """
    register()
    open_checkpoint(directory)  # its errors are clearer than those of transformers
    tokenizer = read_tokenizer(directory, trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device).eval(), tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A compressed checkpoint or a dense model of which only headers have been read."""

    path: str | Path
    source: ModelSource | None  # None: compressed
    trust_remote_code: bool

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """UserError when it is missing or damaged."""
        return self.source.tokenizer() if self.source else read_tokenizer(self.path, self.trust_remote_code)

    def load(
        self, dtype: torch.dtype, device: str = "cpu", unpack: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in eval mode, and its tokenizer.

        Args:
            unpack: decode packed linears now instead of at every use: faster without kernels, but as large as the
                dense model.
        """
        if self.source is None:
            model, tokenizer = load(self.path, dtype, device, self.trust_remote_code)
            if unpack:
                unpack_linears(model, dtype)
            return model, tokenizer
        tokenizer = self.source.tokenizer()
        return self.source.load_model(dtype).to(device), tokenizer


def open_any(model: str | Path, trust_remote_code: bool = False) -> OpenedModel:
    """Find out what a model is; UserError for one that is missing, unfinished, damaged or no language model."""
    if is_compressed(Path(model)) or (Path(model) / ".subbit").is_dir():
        open_checkpoint(model)
        return OpenedModel(model, None, trust_remote_code)
    return OpenedModel(model, open_source(model, trust_remote_code), trust_remote_code)


def check_dense(model: str | Path, trust_remote_code: bool = False) -> None:
    """UserError unless this is a dense model that can be read; no weights are."""
    if is_compressed(Path(model)):
        raise UserError(f"{model} is a compressed checkpoint; give the dense model")
    open_source(model, trust_remote_code)


def load_any(
    model: str | Path, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A compressed checkpoint or a dense model, for evaluation and generation."""
    return open_any(model, trust_remote_code).load(dtype, device)


def read_tokenizer(directory: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a compressed checkpoint; CheckpointError when it is missing or damaged."""
    hint = "copy the tokenizer files of the source model there"
    if not (Path(directory) / "tokenizer_config.json").exists():  # transformers would make one up
        raise CheckpointError(f"{directory} has no tokenizer_config.json; {hint}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise anything here, down to bare Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise CheckpointError(f"cannot read the tokenizer in {directory} ({reason}); {hint}") from error


def evaluate(
    model: str | Path,
    perplexity: Sequence[str] = ("wikitext2",),
    *,
    split: str = "test",
    seq_len: int = 2048,
    max_windows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Perplexity]:
    """Perplexity of a compressed or dense model on each of some data sets or local text files.

    Args:
        seq_len: tokens of a window; windows do not overlap, as in GPTQ's evaluation.
        max_windows: only so many windows from the start of the text.
    """
    from subbit.evaluation.suite import evaluate_all  # it imports this module

    settings: dict[str, Any] = {"split": split, "seq_len": seq_len, "max_windows": max_windows, "dtype": dtype}
    settings |= {"device": device, "trust_remote_code": trust_remote_code, "progress": progress}
    return dict(evaluate_all(model, perplexity, **settings).perplexity)


def inspect(directory: str | Path) -> dict[str, Any]:
    """What a compressed checkpoint holds and how many bits that is, counted from the headers of its files.

    Returns:
        JSON-able. ``bits``: nominal (as the papers count), stored (bits of the file per linear weight, everything that
        the linears need), model (bits of all weight files per parameter of the dense model). ``linear_weights``,
        ``linear_bytes``, ``embedding_bytes`` (packed ones), ``dense_bytes`` (norms, biases, embeddings that are not
        packed), ``header_bytes``; these four add up to ``file_bytes``. ``embeddings``: what the packed embedding and
        head take, what a head is ``tied_to``, why one was ``left_dense``; empty unless the recipe asks for it.
        ``layers``: the decoder layers, each with its ``linears``. ``left_dense``: linears not compressed, and why; they
        count in all bits. ``backends``: what multiplies with linears of every N:M on the CPU, and why.
    """
    return describe_checkpoint(open_checkpoint(directory))


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What :func:`inspect` returns."""
    linears = count_linears(checkpoint)
    tensor_bytes = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    embeddings = count_embeddings(checkpoint)
    embedding_bytes = sum(count.bytes for count in embeddings.values())
    packed_weights = sum(count.weights for count in [*linears.values(), *embeddings.values()])
    parameters = packed_weights + count_others(checkpoint, linears)
    total = BitCount.of(list(linears.values()), parameters, checkpoint.file_bytes)
    quantization = checkpoint.config["quantization_config"]
    return {
        "directory": str(checkpoint.directory),
        "method": quantization["method"],
        "sparsity": quantization["sparsity"],
        "calibration": checkpoint.manifest.get("calibration"),
        "bits": {"nominal": total.nominal, "stored": total.stored, "model": total.model},
        "linear_weights": total.linear_weights,
        "linear_bytes": total.linear_bytes,
        "embedding_bytes": embedding_bytes,
        "dense_bytes": tensor_bytes - total.linear_bytes - embedding_bytes,
        "header_bytes": total.file_bytes - tensor_bytes,
        "file_bytes": total.file_bytes,
        "parameters": total.parameters,
        "embeddings": describe_embeddings(checkpoint, embeddings),
        "layers": describe_layers(checkpoint, linears),
        "left_dense": quantization["left_dense"],
        "backends": {spec.label: str(choose(spec)) for spec in checkpoint.specs.values()},
    }


def count_linears(checkpoint: Checkpoint) -> dict[str, LinearCount]:
    """Weights and bytes of every linear of the decoder layers, compressed or left dense."""
    counts = {}
    for name, spec in checkpoint.specs.items():
        stored = checkpoint.packed(name)
        nominal = spec.nominal(salient_share(checkpoint, name))
        size = sum(tensor.bytes for tensor in stored.values())
        counts[name] = LinearCount(spec.out_features * spec.in_features, size, nominal)
    for name in checkpoint.config["quantization_config"]["left_dense"]:
        tensor = checkpoint.tensors.get(f"{name}.weight") or checkpoint.tensors[name]
        counts[name] = LinearCount(tensor.count, tensor.bytes, 8 * tensor.bytes / tensor.count)
    return counts


def count_embeddings(checkpoint: Checkpoint) -> dict[str, LinearCount]:
    """Weights and bytes of the packed embedding and head; a tied head has none of its own."""
    counts = {}
    for name, spec in checkpoint.embeddings.specs.items():
        size = sum(checkpoint.tensors[f"{name}.{key}"].bytes for key in spec.tensors())
        counts[name] = LinearCount(spec.out_features * spec.in_features, size, spec.nominal())
    return counts


def describe_embeddings(checkpoint: Checkpoint, counts: dict[str, LinearCount]) -> dict[str, dict[str, Any]]:
    """One entry for the embedding and one for the head, if they were to be packed."""
    embeddings = checkpoint.embeddings
    return {
        **{
            name: {"label": spec.label, "stored": count.stored, "weights": count.weights, "bytes": count.bytes}
            for (name, spec), count in zip(embeddings.specs.items(), counts.values(), strict=True)
        },
        **{name: {"tied_to": other} for name, other in embeddings.tied.items()},
        **{name: {"left_dense": reason} for name, reason in embeddings.left.items()},
    }


def salient_share(checkpoint: Checkpoint, name: str) -> float:
    """Share of the columns of a linear that are salient, from its bitmap in the file."""
    spec = checkpoint.specs[name]
    if "salient" not in spec.tensors():
        return 0.0
    return int(read_bitmap(checkpoint, f"{name}.salient").sum()) / spec.in_features


def read_bitmap(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """(bits,) of a packed bitmap; the padding is zero."""
    with safe_open(checkpoint.directory / checkpoint.tensors[name].file, "pt") as file:
        packed: torch.Tensor = file.get_tensor(name)
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1


def count_others(checkpoint: Checkpoint, linears: dict[str, LinearCount]) -> int:
    """Elements of all tensors that are no part of a linear or packed embedding: norms, biases, dense embeddings."""
    specs: dict[str, LinearSpec] = {**checkpoint.specs, **checkpoint.embeddings.specs}
    inside = {f"{name}.{key}" for name, spec in specs.items() for key in spec.tensors()}
    inside |= {stored for name in linears for stored in (name, f"{name}.weight")}
    return sum(tensor.count for name, tensor in checkpoint.tensors.items() if name not in inside)


def describe_layers(checkpoint: Checkpoint, linears: dict[str, LinearCount]) -> list[dict[str, Any]]:
    """One entry a decoder layer."""
    errors = {
        name: linear["error"]
        for layer in checkpoint.manifest.get("layers", [])
        for name, linear in layer["linears"].items()
        if "error" in linear  # those that older versions of subbit distilled have none
    }
    grouped: dict[str, list[str]] = {}
    for name in linears:
        grouped.setdefault(layer_of(name), []).append(name)
    layers = []
    for layer, names in sorted(
        grouped.items(), key=lambda item: [int(p) if p.isdigit() else 0 for p in item[0].split(".")]
    ):
        total = BitCount.of([linears[name] for name in names], 0, 0)
        known = [errors[name] for name in names if name in errors]
        layers.append(
            {
                "name": layer,
                "bits": {"nominal": total.nominal, "stored": total.stored},
                "error": sum(known) / len(known) if known else None,
                "linear_weights": total.linear_weights,
                "linear_bytes": total.linear_bytes,
                "linears": [describe_linear(checkpoint, name, linears[name], errors.get(name)) for name in names],
            }
        )
    return layers


def layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``: up to the first number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def describe_linear(checkpoint: Checkpoint, name: str, count: LinearCount, error: float | None) -> dict[str, Any]:
    """One entry a linear."""
    spec = checkpoint.specs.get(name)
    return {
        "name": name,
        "sparsity": spec.label if spec else "dense",
        "bits": {"nominal": count.nominal, "stored": count.stored},
        "error": error,
        "weights": count.weights,
        "bytes": count.bytes,
    }
