"""Plain ``from_pretrained`` and ``save_pretrained`` for compressed checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from subbit.checkpoint.files import FORMAT_VERSION
from subbit.checkpoint.reader import Checkpoint, check_format_version, open_checkpoint, read_specs
from subbit.errors import CheckpointError
from subbit.models.experts import split_experts
from subbit.packing.embedding import EmbeddingSpec, PackedEmbeddings
from subbit.packing.spec import LinearSpec
from subbit.runtime.embedding import SubbitEmbedding, SubbitHead, TiedHead, embedding_scale
from subbit.runtime.linear import PackedModule, SubbitLinear

__all__ = ["SubbitConfig", "SubbitQuantizer", "register"]


class SubbitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint, as docs/format.md describes it."""

    def __init__(
        self,
        linears: dict[str, dict[str, Any]] | None = None,
        left_dense: dict[str, str] | None = None,
        embeddings: dict[str, dict[str, Any]] | None = None,
        method: str = "",
        sparsity: str = "",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.quant_method = "subbit"
        self.format_version = format_version
        self.method = method
        self.sparsity = sparsity
        self.linears = linears or {}
        self.left_dense = left_dense or {}
        self.embeddings = embeddings or {}


class SubbitQuantizer(HfQuantizer):
    """Puts a packed module where a compressed linear or embedding stood; the weights then load like any others."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """CheckpointError for a format version that this subbit cannot read."""
        check_format_version({"format_version": self.quantization_config.format_version}, "this checkpoint")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        checkpoint = open_checkpoint(directory_of(checkpoint_files)) if checkpoint_files else None
        self._files: dict[str, Path] = {}  # by tensor
        if checkpoint:
            checkpoint.check_contents()
            self._files = {name: checkpoint.directory / tensor.file for name, tensor in checkpoint.tensors.items()}
        linears = [*self.quantization_config.linears, *self.quantization_config.left_dense]
        split_experts(model, linears)
        for name, spec in read_specs(self.quantization_config.linears, "this checkpoint").items():
            replace_linear(model, name, spec)
        replace_embeddings(model, PackedEmbeddings.from_dict(self.quantization_config.embeddings, "this checkpoint"))
        if checkpoint:
            check_complete(model, checkpoint)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                self._settle(name, module, model.dtype)
        release_files(model, self._files)
        return model

    def _settle(self, name: str, module: PackedModule, dtype: torch.dtype) -> None:
        """Make one loaded module ready; CheckpointError that names it and its file when it is damaged or incomplete."""
        if any(tensor.is_meta for tensor in module.packed().values()):
            raise CheckpointError(f"the packed tensors of {name} were not loaded; the checkpoint is incomplete")
        try:
            module.settle(dtype)
        except CheckpointError as error:
            where = self._files.get(f"{name}.codes", "this checkpoint")
            raise CheckpointError(f"{where}: {name}: {error}; get it again or compress again") from None

    def is_serializable(self) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def release_files(model: nn.Module, files: dict[str, Path]) -> None:
    """Copy tensors that would hold a weight file in memory of which they are less than half.

    Loaded tensors lie in a mapped file. When its codewords were moved into the order of the kernels, norms and scales
    are all that still refers to it.

    Args:
        files: where every tensor of the checkpoint is.
    """
    loaded = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor for name, tensor in loaded if name in files and tensor.device.type == "cpu"}
    used: Counter[Path] = Counter()
    for name, tensor in tensors.items():
        used[files[name]] += tensor.nbytes
    sizes = {file: file.stat().st_size for file in used}
    for name, tensor in tensors.items():
        if 2 * used[files[name]] >= sizes[files[name]]:
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.clone()
        else:  # a view, which would remember the tensor in the file
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._buffers[key] = tensor.clone()


def directory_of(files: list[str]) -> Path:
    """Where the checkpoint with these weight files lies; an index may name one outside, which the reader refuses."""
    folders = [Path(file).parent for file in files]
    return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])


def check_complete(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """CheckpointError unless every parameter of the model is stored; one of several tied ones is enough.

    transformers would fill a missing one with random numbers and only warn.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    there = {tied.get(name, name) for name in checkpoint.tensors}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if tied.get(name, name) not in there:
            raise CheckpointError(f"{checkpoint.directory}: the tensor {name} is missing")
        stored = checkpoint.tensors.get(name)
        if stored is not None and stored.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is {list(stored.shape)}, not {list(parameter.shape)}"
            )


def replace_linear(model: nn.Module, name: str, spec: LinearSpec) -> None:
    """Put an empty SubbitLinear in the place of a linear; CheckpointError when there is none of that shape."""
    old = find_module(model, name, spec)
    with torch.device("meta"):
        model.set_submodule(name, SubbitLinear(spec, getattr(old, "bias", None)))


def find_module(model: nn.Module, name: str, spec: LinearSpec) -> nn.Module:
    """The linear or embedding to replace; CheckpointError when there is none of that shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no linear {name}; load it with AutoModelForCausalLM") from None
    names = ("num_embeddings", "embedding_dim") if isinstance(module, nn.Embedding) else ("out_features", "in_features")
    shape = tuple(getattr(module, size, None) for size in names)
    if shape != (spec.out_features, spec.in_features):
        raise CheckpointError(
            f"{name} is {shape} in the model, but {spec.out_features}, {spec.in_features} in the file"
        )
    return module


def replace_embeddings(model: PreTrainedModel, packed: PackedEmbeddings) -> None:
    """Put empty packed modules in the places of the input embedding and the head; a tied head shares the embedding's.

    Raises:
        CheckpointError: the model has no such modules.
    """
    for name, spec in packed.specs.items():
        with torch.device("meta"):
            model.set_submodule(name, packed_module(name, find_module(model, name, spec), spec))
    for name, other in packed.tied.items():
        old, embedding = find_module(model, name, packed.specs[other]), model.get_submodule(other)
        if not isinstance(embedding, SubbitEmbedding):
            raise CheckpointError(f"{name} is tied to {other}, which is no embedding in this model")
        model.set_submodule(name, TiedHead(embedding, getattr(old, "bias", None)))
    forget_ties(model, [*packed.specs, *packed.tied])


def packed_module(name: str, old: nn.Module, spec: EmbeddingSpec) -> PackedModule:
    """What takes the place of an embedding or of a head."""
    dtype = getattr(old, "weight").dtype  # noqa: B009 (untyped)
    if not isinstance(old, nn.Embedding):
        return SubbitHead(spec, getattr(old, "bias", None), dtype)
    scale = embedding_scale(old)
    if scale is None:
        raise CheckpointError(f"{name} is a {type(old).__name__}, whose lookup this version of subbit does not know")
    return SubbitEmbedding(spec, scale, dtype, old.padding_idx)


def forget_ties(model: PreTrainedModel, names: list[str]) -> None:
    """Tell transformers of no tied weights in these modules: it would look for parameters that they do not have.

    In ``all_tied_weights_keys``, which loading uses, and in the keys of the class, which ``tie_weights()`` reads anew.
    """
    gone = [f"{name}.weight" for name in names]
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in gone or source in gone:
            del model.all_tied_weights_keys[target]
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys:
            prefix = f"{path}." if path else ""
            inside = [name.removeprefix(prefix) for name in gone if name.startswith(prefix)]
            part._tied_weights_keys = {
                target: source
                for target, source in part._tied_weights_keys.items()
                if not any(re.match(pattern, name) for pattern in (target, source) for name in inside)
            }


def register() -> None:
    """Make ``from_pretrained`` know subbit; ``import subbit`` calls it, more than once does no harm."""
    if "subbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("subbit")(SubbitConfig)
        register_quantizer("subbit")(SubbitQuantizer)
