"""Perplexity over non-overlapping windows, the protocol of GPTQ, BiLLM and STBLLM."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.calibration.text import Progress, check_context, eval_mode, load_text, tokenize
from subbit.errors import UserError
from subbit.models.logits import rows_at_once
from subbit.runtime.dispatch import choose
from subbit.runtime.linear import SubbitLinear

__all__ = [
    "Observer",
    "Perplexity",
    "TextProtocol",
    "backend_of",
    "evaluate_perplexity",
    "mean_with_error",
    "perplexity",
    "split_windows",
]

Observer = Callable[[Tensor, Tensor], None]
"""Called with a window [seq_len] int64 and the logits [seq_len - 1, vocabulary] of its predictions."""


@dataclass(frozen=True)
class TextProtocol:
    """How something was measured on the windows of a text.

    tokens counts predicted tokens; stride is the distance of two windows' starts; backend says what multiplies with the
    linears.
    """

    dataset: str
    split: str
    origin: str
    tokens: int
    windows: int
    seq_len: int
    stride: int
    dtype: str
    backend: str

    @property
    def protocol(self) -> str:
        """How the number was measured, in one line."""
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        return f"{self.seq_len}-token windows, no overlap, {windows}, {self.tokens:,} predicted tokens, {self.dtype}"


@dataclass(frozen=True)
class Perplexity(TextProtocol):
    """A perplexity with everything needed to read and to repeat it.

    standard_error is of `value` (delta method, windows as independent samples), None for a single window.
    nll is in nats a token; seconds is wall time of the forward passes.
    """

    value: float
    standard_error: float | None
    nll: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens a second of wall time."""
        return self.tokens / self.seconds


def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    dataset: str,
    split: str,
    origin: str,
    seq_len: int = 2048,
    max_windows: int | None = None,
    observe: Observer | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean NLL over non-overlapping windows, each forward pass one window.

    token_ids: [tokens] integer; a window of seq_len tokens predicts its last seq_len - 1; a remainder shorter than
    a window is left out. max_windows: take the first so many. observe: sees all logits, a window at a time.
    progress: (windows done, windows in all).
    Raises UserError for a text or a context too short, ids beyond the vocabulary, or NaN logits.
    """
    windows = split_windows(model, token_ids, seq_len, max_windows)
    seconds = 0.0
    nlls: list[float] = []
    with eval_mode(model), torch.inference_mode():
        for number, window in enumerate(windows, start=1):
            started = time.perf_counter()
            logits = model(input_ids=window.to(model.device).unsqueeze(0), use_cache=False).logits[0, :-1]
            nll = _window_nll(logits, window)
            seconds += time.perf_counter() - started
            if not math.isfinite(nll):
                raise UserError(
                    f"window {number} of {len(windows)} of {dataset} {split}: the model gives NaN or infinite logits: "
                    "check the checkpoint, or evaluate in float32"
                )
            nlls.append(nll)
            if observe is not None:
                observe(window, logits)
            if progress is not None:
                progress(number, len(windows))
    value, standard_error = _summary(nlls)
    return Perplexity(
        dataset=dataset,
        split=split,
        origin=origin,
        tokens=len(nlls) * (seq_len - 1),
        windows=len(nlls),
        seq_len=seq_len,
        stride=seq_len,
        dtype=str(model.dtype).removeprefix("torch."),
        backend=backend_of(model),
        value=value,
        standard_error=standard_error,
        nll=statistics.fmean(nlls),
        seconds=seconds,
    )


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    *,
    split: str = "test",
    seq_len: int = 2048,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """`perplexity` of a named data set or a local file (see `load_text`). Raises UserError as both do."""
    text = load_text(dataset, split)
    return perplexity(
        model,
        tokenize(tokenizer, text.text),
        dataset=dataset,
        split=split,
        origin=text.origin,
        seq_len=seq_len,
        max_windows=max_windows,
        progress=progress,
    )


def backend_of(model: PreTrainedModel) -> str:
    """What multiplies with a model's linears: "dense (torch)", "native (avx2)", "torch (no native kernel for …)"."""
    specs = (module.spec for module in model.modules() if isinstance(module, SubbitLinear))
    used = Counter(str(choose(spec, model.device.type, model.dtype)) for spec in specs)
    return " + ".join(name for name, _ in used.most_common()) or "dense (torch)"


def split_windows(model: PreTrainedModel, token_ids: Tensor, seq_len: int, max_windows: int | None) -> Tensor:
    """[windows, seq_len] int64 after every check that needs no forward pass; the model may be on the meta device."""
    if seq_len < 2:
        raise UserError(f"sequence length {seq_len}: a window predicts its second token onwards, give 2 or more")
    check_context(model, seq_len)
    if max_windows is not None and max_windows < 1:
        raise UserError(f"at most {max_windows} windows: give 1 or more")
    tokens = token_ids.numel()
    if tokens < seq_len:
        raise UserError(
            f"evaluation text too short: it has {tokens} tokens, one window needs {seq_len}: "
            "use a longer text or a smaller sequence length"
        )
    vocabulary = int(model.config.get_text_config().vocab_size)
    if int(token_ids.max()) >= vocabulary:
        raise UserError(
            f"token id {int(token_ids.max())} is beyond the model's vocabulary of {vocabulary}: "
            "use the tokenizer that belongs to the model"
        )
    count = min(tokens // seq_len, max_windows or tokens)
    return token_ids[: count * seq_len].to(torch.int64).view(count, seq_len)


def _window_nll(logits: Tensor, window: Tensor) -> float:
    """Mean NLL in nats of the seq_len - 1 predictions in a window [seq_len], from their logits [seq_len - 1, vocab]."""
    targets = window[1:].to(logits.device)
    rows = rows_at_once(logits)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [cross_entropy(part.to(torch.float32), wanted, reduction="none") for part, wanted in parts]
    return float(torch.cat(losses).cpu().to(torch.float64).sum()) / targets.numel()  # a GPU is waited for once


def _summary(nlls: list[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error from the window means."""
    mean, error = mean_with_error(nlls)
    value = float(torch.tensor(mean, dtype=torch.float64).exp())  # inf where math.exp would raise
    return value, value * error if error is not None and math.isfinite(value) else None


def mean_with_error(values: list[float]) -> tuple[float, float | None]:
    """Mean of window means and its standard error, the windows as independent samples; no error for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
