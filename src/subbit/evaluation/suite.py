"""Everything that can be measured of one model: perplexity, divergence from the dense model, zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subbit.calibration.text import load_text, tokenize
from subbit.errors import UserError
from subbit.evaluation.divergence import Comparison, DenseCache, Divergence, Reference, ensure_cached
from subbit.evaluation.perplexity import Perplexity, perplexity, split_windows
from subbit.evaluation.zero_shot import ZeroShot, prepare_tasks, zero_shot
from subbit.loading import open_any
from subbit.models.source import open_source
from subbit.progress import Progress, SilentProgress

__all__ = ["Evaluation", "evaluate_all"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model: perplexity and divergence by data set, accuracy by task."""

    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    divergence: Mapping[str, Divergence] = field(default_factory=dict)
    zero_shot: Mapping[str, ZeroShot] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)  # tasks that could not be had, and why


def evaluate_all(
    model: str | Path,
    texts: Sequence[str] = (),
    *,
    split: str = "test",
    seq_len: int = 2048,
    max_windows: int | None = None,
    reference: str | Path | None = None,
    cache: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    unpack: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a compressed or dense model, which is loaded once.

    Args:
        texts: data sets or local text files, for perplexity and divergence; windows do not overlap.
        max_windows: only so many windows from the start of each text.
        reference: the dense model, to measure the divergence from it on these texts as well.
        cache: a folder that keeps what the dense model said for the next model; without one it is forgotten.
        tasks: zero-shot tasks of ``subbit.evaluation.zero_shot.TASKS``, or ``all``.
        limit: only so many items from the start of each task.
        batch_size: sequences of a task that run together; None chooses by memory.
        unpack: decode a compressed model once, instead of at every use: faster where no kernel runs its linears, as
            much memory as the dense model, the same numbers up to rounding.

    Raises:
        UserError: see its message; what can be seen to be wrong without running a model is, before one runs.
    """
    progress = progress or SilentProgress()
    if any(count is not None and count < 1 for count in (limit, batch_size)):
        raise UserError("give a limit and a batch size of 1 or more")
    opened = open_any(model, trust_remote_code)
    tokenizer = opened.tokenizer()
    prepared = prepare_tasks(tasks, progress)
    for name, reason in prepared.skipped.items():
        progress.line(f"{name} is skipped: {reason}")
    read = {name: load_text(name, split) for name in texts}
    ids = {name: tokenize(tokenizer, text.text) for name, text in read.items()}
    windows: dict[str, Any] = {"seq_len": seq_len, "max_windows": max_windows}
    perplexities: dict[str, Perplexity] = {}
    with ExitStack() as stack:
        comparisons: dict[str, Comparison] = {}
        if reference is not None and read:
            dense = open_reference(reference, device, trust_remote_code)
            check_tokenizer(dense, tokenizer)
            folder = cache or stack.enter_context(TemporaryDirectory(prefix="subbit-"))
            comparisons = compare_with(dense, DenseCache(Path(folder), dense.digest), ids, progress, **windows)
            stack.enter_context(dense.head_in_memory())
        loaded, _ = opened.load(dtype, device, unpack)
        del opened  # of a GGUF file it holds the whole model
        for name, text in read.items():
            with progress.stage(f"perplexity on {name}") as report:
                perplexities[name] = perplexity(
                    loaded,
                    ids[name],
                    dataset=name,
                    split=split,
                    origin=text.origin,
                    observe=comparisons.get(name),
                    progress=report,
                    **windows,
                )
        divergences = {name: comparison.result(perplexities[name]) for name, comparison in comparisons.items()}
    accuracies = zero_shot(loaded, tokenizer, prepared, limit=limit, batch_size=batch_size, progress=progress)
    return Evaluation(perplexities, divergences, accuracies, prepared.skipped)


def open_reference(model: str | Path, device: str, trust_remote_code: bool) -> Reference:
    """A dense model to compare with, under the name of its directory or on the hub."""
    source = open_source(model, trust_remote_code)
    path = Path(model)
    return Reference.of(source, path.resolve().name if path.exists() else str(model), device)


def check_tokenizer(dense: Reference, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless the dense model's tokenizer has the same tokens: predictions are compared one by one."""
    if dense.source.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the reference {dense.name} has another tokenizer than the model: "
            "give the dense model that the compressed one was made from"
        )


def compare_with(
    dense: Reference,
    cache: DenseCache,
    ids: Mapping[str, Tensor],
    progress: Progress,
    *,
    seq_len: int,
    max_windows: int | None,
) -> dict[str, Comparison]:
    """One comparison for every text, given as token ids; runs the dense model on the windows that the cache lacks."""
    for name, tokens in ids.items():
        windows = split_windows(dense.skeleton, tokens, seq_len, max_windows)
        with progress.stage(f"dense model on {name}") as report:
            ran = ensure_cached(dense, cache, windows, report)
        progress.line(f"dense model on {name}: {ran} windows run, {len(windows) - ran} found in the cache")
    return {name: Comparison(dense, cache) for name in ids}
