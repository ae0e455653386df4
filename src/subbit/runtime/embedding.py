"""The modules that stand where the input embedding and the head stood, when these are stored packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbit.packing.embedding import EmbeddingSpec
from subbit.runtime import native
from subbit.runtime.dispatch import choose
from subbit.runtime.linear import PackedModule, SubbitLinear
from subbit.runtime.reference import packed_linear

__all__ = ["EmbeddingScale", "SubbitEmbedding", "SubbitHead", "TiedHead", "embedding_scale"]


@dataclass(frozen=True)
class EmbeddingScale:
    """What an embedding multiplies its rows with: 1, or the scale of Gemma's and BART's families."""

    value: float = 1.0
    rounded: bool = False  # to the dtype of the model first, as Gemma does

    def apply(self, rows: Tensor) -> Tensor:
        """``rows`` scaled, in their dtype, rounded as the replaced module rounds."""
        if self.value == 1:
            return rows
        value = float(torch.tensor(self.value, dtype=rows.dtype)) if self.rounded else self.value
        return rows * value


def embedding_scale(module: nn.Module) -> EmbeddingScale | None:
    """The scale of an embedding that does nothing but look up rows and scale them; None for any other module."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if type(module) is nn.Embedding:
        return EmbeddingScale()
    if not type(module).__name__.endswith("ScaledWordEmbedding"):  # transformers has one in every family that scales
        return None
    scalar = getattr(module, "scalar_embed_scale", None)
    value = getattr(module, "embed_scale", None) if scalar is None else scalar
    return EmbeddingScale(float(value), scalar is not None) if isinstance(value, (int, float)) else None


def remember_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Give a module a buffer without a number: casts of the model change its dtype as they change that of weights."""
    module.register_buffer("dtype_of_model", torch.empty(0, dtype=dtype), persistent=False)


def model_dtype(module: nn.Module) -> torch.dtype:
    """What the weights of the model around the module are now."""
    return module.get_buffer("dtype_of_model").dtype


def dense_weight(module: PackedModule) -> Tensor:
    """(tokens, width) in the dtype of the model, the whole matrix, decoded anew.

    For the few models whose forward looks at ``weight`` itself, be it only its dtype (Mamba's head): slow, but right.
    """
    return module.spec.decode_rows(module.packed()).to(model_dtype(module))


def head_output(inputs: Tensor, module: PackedModule, bias: Tensor | None) -> Tensor:
    """``inputs`` (..., width) times the packed matrix of a module, (..., tokens) in the dtype of ``inputs``.

    A few vectors, which is what decoding asks for, with the native kernel, which reads the matrix as it is stored; many
    with a dense product, a tile of decoded rows at a time.
    """
    spec = module.spec
    assert isinstance(spec, EmbeddingSpec)
    few = native.is_plain(inputs) and inputs.numel() <= native.ROWS_UP_TO * spec.in_features
    if few and choose(spec, dtype=inputs.dtype).name == "native":
        return native.rows_linear(inputs, spec, module.packed(), bias)
    return packed_linear(inputs, spec, module.packed(), bias)


class SubbitEmbedding(PackedModule):
    """An embedding that decodes the rows of the tokens it is asked for and no others."""

    spec: EmbeddingSpec

    def __init__(
        self,
        spec: EmbeddingSpec,
        scale: EmbeddingScale | None = None,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(spec)
        self.num_embeddings = spec.out_features
        self.embedding_dim = spec.in_features
        self.padding_idx = padding_idx  # some models read it; for inference it means nothing
        self.scale = scale or EmbeddingScale()
        remember_dtype(self, dtype)

    @property
    def weight(self) -> Tensor:
        """See :func:`dense_weight`."""
        return dense_weight(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) token ids → (..., width) in the dtype of the model."""
        tokens = input_ids.flatten()
        rows = self.spec.decode_rows({name: tensor.index_select(0, tokens) for name, tensor in self.packed().items()})
        return self.scale.apply(rows.to(model_dtype(self))).view(*input_ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec.label}"


class SubbitHead(SubbitLinear):
    """A head with a packed matrix of its own."""

    def __init__(
        self,
        spec: EmbeddingSpec,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, bias)
        remember_dtype(self, dtype)

    @property
    def weight(self) -> Tensor:
        """See :func:`dense_weight`."""
        return dense_weight(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., width) → (..., tokens), dtype of ``inputs``."""
        return head_output(inputs, self, self._parameters["bias"])


class TiedHead(nn.Module):
    """A head that multiplies with the packed matrix of the input embedding: it has no copy, and stores nothing."""

    def __init__(self, embedding: SubbitEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        # In a tuple, so that torch does not take it for a part of this module and list its tensors twice.
        self._embedding = (embedding,)
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> SubbitEmbedding:
        """Whose matrix it is."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """See :func:`dense_weight`."""
        return dense_weight(self.embedding)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., width) → (..., tokens), dtype of ``inputs``."""
        return head_output(inputs, self.embedding, self._parameters["bias"])

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.embedding.spec.label}, tied"
