"""lm-evaluation-harness around a loaded model. Importing this takes seconds: `zero_shot` does it when it must."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
import lm_eval.tasks
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import UserError
from subbit.progress import Report

__all__ = ["HarnessModel", "hub_tasks", "local_tasks", "run_task"]

_MOST_SEQUENCES = 64  # more in a batch bring no speed
_SHARE_OF_MEMORY = 0.25
_COPIES_OF_LOGITS = 4  # the model's, as log-probabilities, and scratch of both
# Where lm-eval defines its tasks: reading all of its folders takes half a minute.
_FOLDERS = ("winogrande", "openbookqa", "hellaswag", "super_glue/boolq", "arc", "glue/rte", "lambada")


class HarnessModel(HFLM):
    """A loaded model for lm-eval: batches as large as memory allows, answers checked, progress reported."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> None:
        """batch_size: sequences that run together; None chooses by memory, for every task anew."""
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has neither a beginning- nor an end-of-text token, which lm-eval needs")
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1)
        self._chosen = batch_size
        self.report: Report = lambda done, total: None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, without its bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """requests: ((context, answer), token ids of the context, token ids of the answer)."""
        if max(len(answer) for _, _, answer in requests) > self.max_length:
            raise UserError(f"an answer of this task is longer than the model's context of {self.max_length} tokens")
        longest = min(self.max_length, max(len(context) + len(answer) for _, context, answer in requests))
        self.batch_size_per_gpu = self._chosen or sequences_that_fit(self.model, longest)
        self.set_cache_hook(_Answers(self.report, len(requests)))
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory with {self.batch_size_per_gpu} sequences of up to {longest} tokens: "
                "give a smaller --batch-size"
            ) from None


class _Answers:
    """Stands in for lm-eval's cache of answers, which hears of each one: counts them and refuses NaN."""

    def __init__(self, report: Report, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def add_partial(self, kind: str, request: Any, answer: tuple[float, bool]) -> None:
        """answer: log-likelihood, and whether greedy decoding would give it."""
        if answer[0] != answer[0]:  # a NaN is no larger than anything, so the first choice would silently win
            raise UserError("the model gives NaN logits: check the checkpoint, or evaluate in float32")
        self._done += 1
        self._report(self._done, self._total)


def sequences_that_fit(model: PreTrainedModel, tokens: int) -> int:
    """How many sequences of so many tokens fit: their logits, the bulk of it, in a quarter of the free memory."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        import psutil  # accelerate needs it, and lm-eval accelerate

        free = psutil.virtual_memory().available
    sequence = _COPIES_OF_LOGITS * 4 * tokens * int(model.config.get_text_config().vocab_size)
    return max(1, min(_MOST_SEQUENCES, int(_SHARE_OF_MEMORY * free) // sequence))


def local_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's task objects of our own definitions; UserError for a malformed file."""
    import subbit.evaluation.tasks as package

    with quiet():
        manager = TaskManager(include_path=str(Path(package.__file__).parent), include_defaults=False)
        return {name: next(iter(manager.load([f"subbit_{name}"])["tasks"].values())) for name in names}


def hub_tasks(names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """lm-eval's own tasks, zero-shot, which fetch their data from the hub; and why some could not be had."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    root = Path(lm_eval.tasks.__file__).parent
    with quiet():
        manager = TaskManager(include_path=[str(root / folder) for folder in _FOLDERS], include_defaults=False)
        for name in names:
            try:
                [task] = manager.load([name])["tasks"].values()
            except Exception as error:  # the network, the hub, a data set that moved: the user's choices are the same
                line = next(iter(str(error).splitlines()), "")[:160]
                failed[name] = f"lm-eval cannot fetch it ({type(error).__name__}: {line})"
                continue
            task.set_config(key="num_fewshot", value=0)
            found[name] = task
    return found, failed


def run_task(model: HarnessModel, task: Any, limit: int | None) -> tuple[dict[str, float], int, int]:
    """Metrics by name, items evaluated and items in all; `task.instances` are the requests afterwards."""
    with quiet():
        found = evaluate(model, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, log_samples=False)
    counts = found["n-samples"][task.task_name]
    metrics = {key.removesuffix(",none"): value for key, value in found["results"][task.task_name].items()}
    return metrics, counts["effective"], counts["original"]


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and bars inside: they are about choices made here, or say at length what an error then says."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # The only switch of the bar over the requests being built.
        with patch.object(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
