"""Continuations of a few prompts by the compressed model and, beside them, by the dense one; greedy, so repeatable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from subbit.calibration.text import check_context
from subbit.errors import UserError
from subbit.loading import check_dense, load_any
from subbit.progress import Progress

__all__ = ["PROMPTS", "Generation", "generate"]

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
)


@dataclass(frozen=True)
class Generation:
    """What models write after a prompt."""

    prompt: str
    compressed: str
    dense: str | None  # None where no dense model was given
    note: str  # how both were written


def generate(
    directory: Path,
    reference: str | Path | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> list[Generation]:
    """The likeliest continuation of every prompt, in float32; one model is in memory at a time.

    Args:
        reference: the dense model; None: only the compressed one.

    Raises:
        UserError: an empty prompt, no new tokens, or a model that cannot be loaded.
    """
    if not all(prompts) or max_new_tokens < 1:
        raise UserError("give prompts that are not empty, and at least 1 new token")
    if reference is not None:
        check_dense(reference, trust_remote_code)  # before minutes of writing by the compressed one
    ours = write_all(directory, prompts, max_new_tokens, device, trust_remote_code, progress)
    dense: Sequence[str | None] = [None] * len(prompts)
    if reference is not None:
        dense = write_all(reference, prompts, max_new_tokens, device, trust_remote_code, progress)
    note = f"The likeliest token each time, at most {max_new_tokens} of them, float32."
    return [Generation(*texts, note) for texts in zip(prompts, ours, dense, strict=True)]


def write_all(
    model: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> list[str]:
    """What one model writes after each prompt."""
    with progress.stage(f"text by {Path(model).name}") as report:
        loaded, tokenizer = load_any(model, torch.float32, device, trust_remote_code)
        written = []
        for number, prompt in enumerate(prompts):
            inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
            check_context(loaded, inputs["input_ids"].shape[1] + max_new_tokens)
            output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            written.append(str(text).strip("\n").rstrip() or "(nothing)")  # the spaces before code are a part of it
            report(number + 1, len(prompts))
    return written
