"""Perplexity over non-overlapping windows, the protocol of GPTQ, BiLLM and STBLLM."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.calibration.text import Progress, check_context, eval_mode, load_text, tokenize
from subbit.errors import UserError

__all__ = ["Perplexity", "evaluate_perplexity", "perplexity"]

# Positions a log-softmax: float32 scratch is this times the vocabulary, not the whole window times it.
_CHUNK = 128


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with everything needed to read and to repeat it.

    standard_error is of `value` (delta method, windows as independent samples), None for a single window.
    nll is in nats a token; tokens counts predicted tokens; seconds is wall time of the forward passes.
    """

    dataset: str
    split: str
    origin: str
    value: float
    standard_error: float | None
    nll: float
    tokens: int
    windows: int
    seq_len: int
    dtype: str
    seconds: float

    @property
    def protocol(self) -> str:
        """How the number was measured, in one line."""
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        return f"{self.seq_len}-token windows, no overlap, {windows}, {self.tokens:,} predicted tokens, {self.dtype}"

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
    progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean NLL over non-overlapping windows, each forward pass one window.

    token_ids: [tokens] integer; a window of seq_len tokens predicts its last seq_len - 1; a remainder shorter than
    a window is left out. max_windows: take the first so many. progress: (windows done, windows in all).
    Raises UserError for a text or a context too short, ids beyond the vocabulary, or NaN logits.
    """
    windows = _windows(model, token_ids, seq_len, max_windows)
    started = time.perf_counter()
    nlls: list[float] = []
    with eval_mode(model), torch.inference_mode():
        for number, window in enumerate(windows, start=1):
            nll = _window_nll(model, window.to(model.device))
            if not math.isfinite(nll):
                raise UserError(
                    f"window {number} of {len(windows)} of {dataset} {split}: the model gives NaN or infinite logits: "
                    "check the checkpoint, or evaluate in float32"
                )
            nlls.append(nll)
            if progress is not None:
                progress(number, len(windows))
    seconds = time.perf_counter() - started
    value, standard_error = _summary(nlls)
    return Perplexity(
        dataset=dataset,
        split=split,
        origin=origin,
        value=value,
        standard_error=standard_error,
        nll=statistics.fmean(nlls),
        tokens=len(nlls) * (seq_len - 1),
        windows=len(nlls),
        seq_len=seq_len,
        dtype=str(model.dtype).removeprefix("torch."),
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


def _windows(model: PreTrainedModel, token_ids: Tensor, seq_len: int, max_windows: int | None) -> Tensor:
    """[windows, seq_len] int64 after every check that needs no forward pass."""
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


def _window_nll(model: PreTrainedModel, window: Tensor) -> float:
    """Mean NLL in nats of the seq_len - 1 predictions in a window [seq_len]."""
    logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
    targets = window[1:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, targets.numel(), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        losses = cross_entropy(logits[chunk].to(torch.float32), targets[chunk], reduction="none")
        total += losses.cpu().to(torch.float64).sum()
    return float(total) / targets.numel()


def _summary(nlls: list[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error from the window means."""
    value = float(torch.tensor(statistics.fmean(nlls), dtype=torch.float64).exp())  # inf where math.exp would raise
    if len(nlls) == 1 or not math.isfinite(value):
        return value, None
    return value, value * statistics.stdev(nlls) / math.sqrt(len(nlls))
