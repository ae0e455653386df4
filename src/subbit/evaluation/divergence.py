"""How far a model's predictions are from those of the dense model: KL divergence and top-1 agreement, token by token.

The dense model runs once. What is kept of it are not its logits but what leaves its last decoder layer, in float32:
vocabulary / hidden size times smaller (85 times for SmolLM2-135M, 31 for Llama-3-8B), and nothing is lost, since the
model's own final norm and output head make the logits from it again. Keeping the largest probabilities instead would
take more room and lose something: SmolLM2-135M's largest 4,096 of 49,152 still miss 1 % of the mass.

A file holds one window, and its name is the hash of the dense model's digest and the window's token ids. So a longer
text, another number of windows or an interrupted run use what is there, and another model or text finds nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from subbit.calibration.text import Progress
from subbit.checkpoint.files import write_atomically
from subbit.errors import UserError
from subbit.evaluation.perplexity import Perplexity, TextProtocol, mean_with_error
from subbit.models.layout import ModelLayout, find_layout
from subbit.models.source import ModelSource, model_digest
from subbit.models.streaming import capture_inputs, materialize, outside_on_demand, release, run_head, run_layer

__all__ = ["Comparison", "DenseCache", "Divergence", "Reference", "divergence_of", "ensure_cached"]

_FORMAT = 1
_CHUNK = 128  # positions whose logits are in memory at a time
_GROUP_BYTES = 1 << 30  # hidden states of the windows that go through the dense model together


@dataclass(frozen=True)
class Divergence(TextProtocol):
    """KL(dense ‖ model) in nats a token, and how often both put the same token first.

    p99 is the 99th percentile over tokens, interpolated; standard errors take windows as independent samples and are
    None for a single one. The dense model ran in float32, the model in `dtype`. Against logits that were never stored,
    all values are right to 1e-5: what is rounded differently are float32 sums.
    """

    reference: str
    reference_digest: str
    mean: float
    standard_error: float | None
    median: float
    p99: float
    maximum: float
    top1: float
    top1_standard_error: float | None
    reference_perplexity: float


# ---- the dense model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reference:
    """A dense model to compare with: only its norm and head are ever in memory together."""

    name: str
    source: ModelSource
    skeleton: PreTrainedModel
    layout: ModelLayout
    digest: str
    device: str

    @classmethod
    def of(cls, source: ModelSource, name: str, device: str = "cpu") -> Reference:
        """Of an opened model; `name` is what results call it."""
        skeleton = source.skeleton()
        return cls(name, source, skeleton, find_layout(skeleton), model_digest(source), device)

    def hidden(self, windows: Tensor, progress: Progress) -> Tensor:
        """What leaves the last decoder layer, [windows, seq_len, hidden] float32, with one layer in memory at a time.

        windows: [windows, seq_len] token ids. progress: (decoder layers done, decoder layers in all).
        """
        hidden, calls = capture_inputs(self.skeleton, self.layout, self.source, windows, device=self.device)
        layers = self.layout.layers(self.skeleton)
        for index, layer in enumerate(layers):
            materialize(layer, self.layout.layer_name(index), self.source, device=self.device)
            for window in hidden:
                window.copy_(run_layer(layer, calls[index], window.unsqueeze(0).to(self.device))[0])
            release(layer)
            progress(index + 1, len(layers))
        return hidden

    def head_in_memory(self) -> AbstractContextManager[None]:
        """While this is open, `logits` does not read the head anew at every call."""
        return outside_on_demand(self.skeleton, self.layout, self.source, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[positions, vocabulary] float32 from [positions, hidden]."""
        return run_head(self.skeleton, self.layout, self.source, hidden.unsqueeze(0), device=self.device)[0]


# ---- what is kept of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseCache:
    """A folder of safetensors files, one a window: `hidden` [seq_len - 1, hidden size] float32."""

    directory: Path
    digest: str  # of the dense model

    def path(self, window: Tensor) -> Path:
        """Where the hidden states of a window [seq_len] are, or will be."""
        key = hashlib.sha256(f"subbit dense {_FORMAT} {self.digest} ".encode() + _bytes(window.to(torch.int64)))
        return self.directory / f"{key.hexdigest()}.safetensors"

    def write(self, window: Tensor, hidden: Tensor) -> None:
        """Atomic. hidden: [seq_len, hidden size] float32; the last row predicts nothing and is not kept."""
        kept = hidden[:-1].contiguous()
        facts = {"format": _FORMAT, "model": self.digest, "sha256": hashlib.sha256(_bytes(kept)).hexdigest()}
        contents = save({"hidden": kept}, metadata={"subbit_dense": json.dumps(facts)})
        write_atomically(self.path(window), lambda file: file.write(contents))

    def read(self, window: Tensor) -> Tensor:
        """What `write` was given, but for the last row; UserError for a file that is not what its name says."""
        path = self.path(window)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["subbit_dense"])
                hidden: Tensor = file.get_tensor("hidden")
            whole = facts["model"] == self.digest and facts["sha256"] == hashlib.sha256(_bytes(hidden)).hexdigest()
        except (SafetensorError, OSError, LookupError, TypeError, ValueError):
            whole = False
        if not whole or hidden.shape[0] != window.numel() - 1:
            raise UserError(f"{path} is damaged or not what its name says: delete it and evaluate again")
        return hidden


def ensure_cached(reference: Reference, cache: DenseCache, windows: Tensor, progress: Progress) -> int:
    """Run the dense model on the windows [windows, seq_len] that the cache lacks; returns how many these were.

    progress: (decoder layers done, in all), counted over all windows. An interrupted run keeps whole groups of windows.
    """
    missing = [window for window in windows if not cache.path(window).exists()]
    if not missing:
        return 0
    window_bytes = 4 * int(reference.source.config.get_text_config().hidden_size) * windows.shape[1]
    _make_room(cache.directory, len(missing) * window_bytes)
    size = max(1, _GROUP_BYTES // window_bytes)
    groups = [torch.stack(missing[first : first + size]) for first in range(0, len(missing), size)]
    with torch.inference_mode():
        for number, group in enumerate(groups):
            hidden = reference.hidden(group, _nth(progress, number, len(groups)))
            if not bool(torch.isfinite(hidden).all()):
                raise UserError(f"the dense model {reference.name} gives NaN or infinity in float32: check its files")
            for window, states in zip(group, hidden, strict=True):
                cache.write(window, states)
    return len(missing)


def _make_room(directory: Path, needed: int) -> None:
    """Make the folder; UserError if that fails, or if the disk is too full for so many bytes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(f"cannot use {directory} as a cache ({error.strerror}): give --cache another folder") from None
    if needed > free:
        raise UserError(
            f"the dense model's predictions take {needed / 1e9:.1f} GB, {directory} has {free / 1e9:.1f} GB left: "
            "use fewer --max-windows, or give --cache a folder with more room"
        )


def _nth(progress: Progress, number: int, count: int) -> Progress:
    """A progress of one of `count` equal parts."""
    return lambda done, total: progress(number * total + done, count * total)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


# ---- the comparison --------------------------------------------------------------------------------------------------


class Comparison:
    """Watches a perplexity being measured (`perplexity(…, observe=comparison)`) and compares every prediction."""

    def __init__(self, reference: Reference, cache: DenseCache) -> None:
        self._reference = reference
        self._cache = cache
        self._divergences: list[Tensor] = []  # [seq_len - 1] float64 a window
        self._agreements: list[Tensor] = []  # [seq_len - 1] bool a window
        self._nlls: list[float] = []

    def __call__(self, window: Tensor, logits: Tensor) -> None:
        """window: [seq_len] token ids that are in the cache; logits: [seq_len - 1, vocabulary] of the model."""
        hidden = self._cache.read(window)
        targets = window[1:].to(self._reference.device)
        parts = [
            self._compare(hidden[chunk], logits[chunk], targets[chunk]) for chunk in _chunks(targets.numel(), _CHUNK)
        ]
        divergence, agreement, nll = (torch.cat(column) for column in zip(*parts, strict=True))
        self._divergences.append(divergence)
        self._agreements.append(agreement)
        self._nlls.append(float(nll.mean()))

    def _compare(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, agreement and NLL of the dense model, each [positions] on the CPU."""
        dense = self._reference.logits(hidden)
        if dense.shape != logits.shape:
            raise UserError(
                f"the reference {self._reference.name} predicts {dense.shape[1]} tokens, the model {logits.shape[1]}: "
                "give the dense model that the compressed one was made from"
            )
        logits = logits.to(dense.device)
        expected = torch.log_softmax(dense, dim=-1)
        nll = -expected.gather(1, targets.unsqueeze(1)).squeeze(1)
        agreement = dense.argmax(dim=-1) == logits.argmax(dim=-1)
        return divergence_of(expected, logits).cpu(), agreement.cpu(), nll.cpu().to(torch.float64)

    def result(self, measured: Perplexity) -> Divergence:
        """Over all windows of the perplexity that was watched."""
        divergence = torch.cat(self._divergences)
        mean, error = mean_with_error([float(window.mean()) for window in self._divergences])
        top1, top1_error = mean_with_error([float(window.double().mean()) for window in self._agreements])
        return Divergence(
            **{field.name: getattr(measured, field.name) for field in fields(TextProtocol)},
            reference=self._reference.name,
            reference_digest=self._reference.digest[:16],
            mean=mean,
            standard_error=error,
            median=float(divergence.quantile(0.5)),
            p99=float(divergence.quantile(0.99)),
            maximum=float(divergence.max()),
            top1=top1,
            top1_standard_error=top1_error,
            reference_perplexity=math.exp(statistics.fmean(self._nlls)),
        )


def divergence_of(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(P ‖ Q) [positions] float64, nats, of log-probabilities P and logits Q, both [positions, vocabulary].

    Summed in float64: in float32 the terms of two close distributions cancel to little more than rounding errors.
    """
    found = torch.log_softmax(logits.to(torch.float32), dim=-1)
    return (expected.exp() * (expected - found)).sum(dim=-1, dtype=torch.float64)


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, total, size))
