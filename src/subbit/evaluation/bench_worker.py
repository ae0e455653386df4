"""One measurement of ``subbit bench`` in a process of its own, so that its peak memory and its end are its own.

``python -m subbit.evaluation.bench_worker`` does a :class:`subbit.evaluation.bench.Job` and writes a
:class:`subbit.evaluation.bench.Round`, or ``{"error": …}``, as the last line of standard output, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from subbit.errors import UserError
from subbit.evaluation.bench import Job, Round
from subbit.evaluation.speed import random_prompt, token_speed
from subbit.loading import load, load_any
from subbit.models.decoding import decode_step
from subbit.process import environment, peak_bytes, read_job, resident_bytes
from subbit.runtime.embedding import SubbitEmbedding, TiedHead
from subbit.runtime.linear import PackedModule

__all__ = ["bytes_read", "main"]


def measure(job: Job) -> Round:
    """Load, decode once, look at the memory."""
    if job.threads:
        torch.set_num_threads(job.threads)
    before, started = resident_bytes(), time.perf_counter()
    model, _ = load(job.path) if job.dtype is None else load_any(job.path, getattr(torch, job.dtype))
    seconds = time.perf_counter() - started
    prompt = random_prompt(model, job.prompt_tokens)
    speed = token_speed(model, prompt, job.new_tokens)
    resident = resident_bytes()
    return Round(
        prompt_tokens_per_second=speed.prompt_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        load_seconds=seconds,
        peak_bytes=max(peak_bytes(), resident),  # the system's mark of the peak can lag some pages behind
        resident_bytes=resident,
        model_bytes=resident - before,
        bytes_per_token=bytes_read(model, prompt),
        dtype=str(model.dtype).removeprefix("torch."),
        environment=environment("cpu"),
    )


def bytes_read(model: PreTrainedModel, prompt: Tensor) -> int:
    """Bytes in memory of all weights that one pass over one token after ``prompt`` [tokens] needs; no KV cache.

    Those of the modules that run: experts that the token is not sent to do not count, of an embedding one row does.
    """
    ran: dict[nn.Module, None] = {}
    with torch.inference_mode():
        logits, cache = decode_step(model, prompt[None])
        hooks = [
            module.register_forward_hook(lambda module, *_: ran.update({module: None})) for module in model.modules()
        ]
        decode_step(model, logits.argmax(dim=-1, keepdim=True), cache)
    for hook in hooks:
        hook.remove()
    return sum(map(weight_bytes, ran))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's own weights that a pass over one token reads."""
    if isinstance(module, TiedHead):
        return module.embedding.weight_bytes
    if isinstance(module, SubbitEmbedding):
        return module.weight_bytes // module.num_embeddings
    own = module.weight_bytes if isinstance(module, PackedModule) else 0
    own += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return own // module.num_embeddings if isinstance(module, nn.Embedding) else own


def main() -> int:
    """Exit codes: 0 done, 2 a mistake of the user."""
    job = Job(**read_job())
    transformers.utils.logging.disable_progress_bar()
    try:
        print(json.dumps(dataclasses.asdict(measure(job))), flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
