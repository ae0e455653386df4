"""One step of decoding with a KV cache, over the versions of transformers that subbit supports."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["decode_step"]


def decode_step(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits (batch, vocabulary) after the last of ``ids`` (batch, tokens) int64, and the cache for the next step."""
    arguments = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # renamed in transformers 5.24
    # Only the last position is needed; not every architecture can leave the others out.
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
    if cache is not None:
        options[name] = cache
    output = model(input_ids=ids, use_cache=True, **options)
    return output.logits[:, -1], getattr(output, name)
