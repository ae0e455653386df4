"""How fast a model reads a prompt and writes tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.calibration.text import check_context, eval_mode, tokenize
from subbit.errors import UserError
from subbit.models.decoding import decode_step

__all__ = ["Speed", "decode_speed", "random_prompt", "token_speed"]


@dataclass(frozen=True)
class Speed:
    """Rates of one greedy generation at batch size 1: the prompt in one pass, then one token a pass."""

    prompt_tokens: int
    new_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


def decode_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 32
) -> Speed:
    """Time greedy decoding with a KV cache, after one untimed pass that warms kernels and caches.

    new_tokens: single-token passes that are timed; an end-of-text token does not stop them, so runs compare.
    Raises UserError for an empty prompt, new_tokens below 1, or more tokens than the model's context.
    """
    return token_speed(model, tokenize(tokenizer, prompt), new_tokens)


def random_prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """[tokens] int64, any tokens, the same in every run: what they say does not change the speed."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))


def token_speed(model: PreTrainedModel, ids: Tensor, new_tokens: int = 32) -> Speed:
    """As :func:`decode_speed`, of a prompt ids [tokens] int64."""
    _check(model, ids.numel(), new_tokens)
    ids = ids.unsqueeze(0).to(model.device)
    with eval_mode(model), torch.inference_mode():
        _run(model, ids, 1)
        prefill, decode = _run(model, ids, new_tokens)
    return Speed(ids.numel(), new_tokens, ids.numel() / prefill, new_tokens / decode)


def _check(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    if prompt_tokens == 0:
        raise UserError("the prompt has no tokens: give some text to time")
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens: give 1 or more")
    check_context(model, prompt_tokens + new_tokens)


def _run(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the pass over the prompt ids [1, tokens], and of new_tokens single-token passes after it."""
    started = _now(model)
    logits, cache = decode_step(model, ids)
    prefilled = _now(model)
    for _ in range(new_tokens):
        logits, cache = decode_step(model, logits.argmax(dim=-1, keepdim=True), cache)
    return prefilled - started, _now(model) - prefilled


def _now(model: PreTrainedModel) -> float:
    """Seconds on the clock once the work queued on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
