"""One run of the pipeline: the model being compressed, the recipe, and running single decoder layers of it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.calibration.gram import GramCollector
from subbit.calibration.text import calibration_windows
from subbit.errors import UserError
from subbit.models.layout import ModelLayout, layer_linears
from subbit.models.source import ModelSource
from subbit.models.streaming import LayerCall, capture_inputs, materialize, release, run_layer
from subbit.progress import Progress
from subbit.recipe import Recipe
from subbit.tuning.precision import mixed_precision, resolve_precision

__all__ = ["DenseLayer", "Job"]


TOKENS = 2048  # that run through a layer at a time: enough for every core, little memory
GPU_TOKENS = 16384


@dataclass(frozen=True)
class DenseLayer:
    """A decoder layer of the dense model, in memory, after it ran."""

    linears: dict[str, nn.Linear]  # by full name
    grams: GramCollector
    before: Tensor  # (samples, seq_len, hidden) float32, what entered it
    after: Tensor  # what left it


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

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a decoder layer by full name, in order."""
        prefix = self.layout.layer_name(index)
        return {f"{prefix}.{name}": linear for name, linear in layer_linears(self.layer(index)).items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model has to be run beside the compressed one."""
        distillation = self.recipe.distillation
        return bool(self.recipe.reconstruction.steps or (distillation.steps and not distillation.samples))

    def capture_calls(self, windows: Tensor) -> list[LayerCall]:
        """What every decoder layer is given besides hidden states, from the first of windows (samples, seq_len)."""
        # two, for calls that differ between them to be noticed
        return capture_inputs(self.model, self.layout, self.source, windows[:2], device=self.device)[1]

    def draw_windows(
        self, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int, held_out: int | None = None
    ) -> tuple[Tensor, str]:
        """Windows (samples, seq_len) int64 of the calibration's source, and a line that says where they are from.

        ``held_out``: as :func:`~subbit.calibration.text.calibration_windows` has it.
        """
        calibration = self.recipe.calibration
        with self.progress.stage(f"calibration text ({calibration.source})") as report:
            return calibration_windows(
                calibration.source,
                tokenizer,
                samples,
                seq_len,
                seed,
                load_model=self.source.load_model,
                progress=report,
                held_out=held_out,
            )

    def stored(self, tensor: Tensor) -> Tensor:
        """A tensor that is not compressed, as the checkpoint holds it: on the CPU, in its dtype (GGUF: float16)."""
        return tensor.detach().to("cpu", torch.float16 if self.source.gguf_file else self.source.dtype)

    def collect_grams(self, linears: dict[str, nn.Linear]) -> GramCollector:
        """Collects the statistics of some linears of a layer while it runs."""
        calibration = self.recipe.calibration
        return GramCollector(linears, calibration.clip_norm, calibration.min_expert_tokens)

    def settled(self, hidden: Tensor) -> Tensor:
        """Hidden states (samples, seq_len, hidden) where they stay: on a GPU that has eight times the memory free."""
        if self.device.type != "cuda" or 8 * hidden.nbytes > torch.cuda.mem_get_info(self.device)[0]:
            return hidden
        return hidden.to(self.device)

    def run(self, index: int, call: LayerCall, hidden: Tensor, in_place: bool = False) -> Tensor:
        """Output of a materialized layer, (samples, seq_len, hidden) float32, on the device of ``hidden``.

        Some samples at a time; one where token norms are clipped: that is done window by window. ``in_place``: into
        ``hidden``.
        """
        dtype = resolve_precision(self.recipe.calibration.precision, self.device)
        tokens = TOKENS if self.device.type == "cpu" else GPU_TOKENS
        batch = 1 if self.recipe.calibration.clip_norm else max(1, tokens // hidden.shape[1])
        output = hidden if in_place else torch.empty_like(hidden)
        with mixed_precision(dtype, self.device):
            for part, place in zip(hidden.split(batch), output.split(batch), strict=True):
                place.copy_(run_layer(self.layer(index), call, part.to(self.device)))
        return output

    def dense_layers(self, stage: str) -> Iterator[int]:
        """The decoder layers by number, each in memory until the next one; ``stage`` is what the progress is called."""
        with self.progress.stage(stage) as report:
            for index in range(self.layout.num_layers):
                layer = self.materialize(index)
                yield index
                release(layer)
                report(index + 1, self.layout.num_layers)

    def dense_pass(
        self, stage: str, hidden: Tensor, calls: list[LayerCall], names: Container[str] | None = None
    ) -> Iterator[DenseLayer]:
        """Run the dense model layer by layer with the statistics of its linears; a layer is there until the next one.

        Args:
            stage: what the progress is called.
            hidden: (samples, seq_len, hidden) float32, what enters the first decoder layer; not changed.
            names: of the linears to look at; None: all.
        """
        for index in self.dense_layers(stage):
            linears = {name: one for name, one in self.linears(index).items() if names is None or name in names}
            with self.collect_grams(linears) as grams:
                output = self.run(index, calls[index], hidden)
            yield DenseLayer(linears, grams, hidden, output)
            hidden = output

    def dense_output(self, stage: str, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """What leaves the last decoder layer of the dense model, in the memory of ``hidden``: there is no room for two.

        Args:
            stage: what the progress is called.
            hidden: (samples, seq_len, hidden) float32, what enters the first decoder layer; overwritten.
        """
        for index in self.dense_layers(stage):
            self.run(index, calls[index], hidden, in_place=True)
        return hidden

    def read_others(self, prefix: str, done: set[str]) -> dict[str, Tensor]:
        """Stored tensors under ``prefix`` except ``done``, in the dtype of the checkpoint (float16 for GGUF)."""
        tensors = {
            name: self.source.tensor(name) for name in self.source.names if name.startswith(prefix) and name not in done
        }
        if self.source.gguf_file is not None:
            tensors = {
                name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            finite = not tensor.is_floating_point() or all(bool(end.isfinite()) for end in tensor.aminmax())
            if tensor.numel() and not finite:
                raise UserError(
                    f"tensor {name} in {self.source.directory} holds NaN or infinity; download the model again"
                )
        return tensors
