"""Text for calibration and evaluation: named data sets, local files, and what the model itself writes.

Named data sets are prepared exactly as GPTQ, BiLLM and STBLLM prepare them, so perplexities can be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import UserError
from subbit.models.decoding import decode_step

__all__ = [
    "DATASETS",
    "SELF",
    "SPLITS",
    "Progress",
    "Text",
    "calibration_windows",
    "check_context",
    "data_root",
    "distinct_windows",
    "eval_mode",
    "held_out_by_source",
    "is_text_file",
    "load_text",
    "read_utf8",
    "sample_windows",
    "self_windows",
    "split_sources",
    "tokenize",
    "turns",
]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

DATASETS = ("wikitext2", "ptb", "c4")
SPLITS = ("train", "validation", "test")
SELF = "self"

_LOCAL_SPLIT = {"train": "train", "validation": "valid", "test": "test"}
# A shard of C4 holds some 350,000 documents; these give millions of tokens, more than any calibration reads.
_C4_DOCUMENTS = 8_000
_C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class Text:
    """A text and where it comes from, in words for reports (`origin` never holds an absolute path)."""

    text: str
    origin: str


def data_root() -> Path:
    """The folder of local data sets: $SUBBIT_DATA, or ../shared/data; it may not exist."""
    return Path(os.environ.get("SUBBIT_DATA") or Path("..") / "shared" / "data")


def load_text(source: str, split: str) -> Text:
    """The text of a named data set or of a local file.

    source: one of DATASETS, or a path to a .txt or .jsonl file (key "text"), which has no splits.
    split: one of SPLITS. Where only the validation split lies in `data_root()`, "train" gives it and `origin`
    says so; a test split is never handed out as another one.
    Raises UserError for an unknown source or split, an unreadable file, or a data set that cannot be fetched.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if source in DATASETS:
        local = _local_c4(split) if source == "c4" else _local_lines(source, split)
        return local or _from_hub(source, split)
    if is_text_file(source):
        return _local_file(Path(source))
    hint = " ('self' is for calibration only)" if source == SELF else ""
    raise UserError(
        f"unknown text source {source!r}{hint}: choose one of {', '.join(DATASETS)}, or a path to a .txt or .jsonl file"
    )


def is_text_file(source: str) -> bool:
    """Whether a source of text is a file, by its name, and no named data set."""
    return Path(source).suffix in (".txt", ".jsonl")


def _local_file(path: Path) -> Text:
    if path.suffix == ".jsonl":
        documents = _read_jsonl(path)
        return Text("\n\n".join(documents), f"local file {path.name} ({len(documents)} documents)")
    return Text(_read(path), f"local file {path.name}")


def _local_lines(dataset: str, split: str) -> Text | None:
    """WikiText-2 or PTB from `data_root()`; None if no file there can stand for the split."""
    join = _join_wikitext if dataset == "wikitext2" else _join_ptb
    for candidate in (split, "validation") if split == "train" else (split,):
        path = data_root() / dataset / f"{_LOCAL_SPLIT[candidate]}.txt"
        if path.is_file():
            note = "" if candidate == split else f" (stands in for {split}, which is not in the data folder)"
            return Text(join(_lines(_read(path))), f"{dataset} {candidate}, {dataset}/{path.name}{note}")
    return None


def _local_c4(split: str) -> Text | None:
    """Every c4/*.jsonl of `data_root()` as one sample whose split is not known; None if there is none."""
    paths = sorted((data_root() / "c4").glob("*.jsonl"))
    if not paths:
        return None
    documents = [document for path in paths for document in _read_jsonl(path)]
    names = ", ".join(f"c4/{path.name}" for path in paths)
    origin = f"c4 sample, {names} ({len(documents)} documents; their split is not known, used as {split})"
    return Text("\n\n".join(documents), origin)


def _lines(text: str) -> list[str]:
    # Not str.splitlines: it also splits at characters that occur inside the lines of WikiText.
    return text.removesuffix("\n").split("\n")


def _join_wikitext(lines: Iterable[str]) -> str:
    """The rows of wikitext-2-raw-v1 (a line with its newline, or "" for a blank one), joined as GPTQ does."""
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def _join_ptb(lines: Iterable[str]) -> str:
    return " ".join(line.strip() for line in lines)


def read_utf8(path: Path, name: str, if_missing: str, if_spoilt: str) -> str:
    """A whole file. UserError, which calls it `name`, where it is missing, spoilt (not UTF-8) or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: {if_missing}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): {if_spoilt}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name a readable file") from None


def _read(path: Path) -> str:
    text = read_utf8(path, f"text file {path}", "check the path", "convert it to UTF-8")
    if not text.strip():
        raise UserError(f"text file {path} is empty: give one with text in it")
    return text


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_lines(_read(path)), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not valid JSON; each line must be one JSON object") from None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise UserError(f'{path}, line {number}: no "text" string; each line must be an object like {{"text": …}}')
        documents.append(document["text"])
    if not "".join(documents).strip():
        raise UserError(f'{path}: every "text" is empty: give a file with text in it')
    return documents


def _from_hub(dataset: str, split: str) -> Text:
    """The data set through the `datasets` package; every failure becomes one UserError with the ways out."""
    try:
        text = _download(dataset, split)
    except Exception as error:  # the package, the network, the hub: the user's choices are the same
        reason = next(iter(str(error).splitlines()), "")[:160]
        own = ", or calibrate on the model's own text (`--calibration self`)" if split == "train" else ""
        raise UserError(
            f"{dataset} {split} is not in the data folder ({data_root()}) and cannot be fetched "
            f"({type(error).__name__}: {reason}): set SUBBIT_DATA to a folder that has it, or install the fetcher with "
            f'`pip install "subbit[data]"` and go online, or use a local .txt/.jsonl file{own}'
        ) from error
    if not text.text.strip():
        raise UserError(f"{text.origin} came back empty: use a local .txt or .jsonl file")
    return text


def _download(dataset: str, split: str) -> Text:
    from datasets import load_dataset

    if dataset == "wikitext2":
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return Text("\n\n".join(rows["text"]), f"wikitext2 {split}, Salesforce/wikitext on the Hugging Face hub")
    if dataset == "ptb":
        # The data set is a script, which `datasets` no longer runs; the hub keeps a converted copy on this branch.
        repository, branch = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
        rows = load_dataset(repository, split=split, revision=branch)
        return Text(_join_ptb(rows["sentence"]), f"ptb {split}, {repository} on the Hugging Face hub")
    shard = "train" if split == "train" else "validation"  # C4 has no test split
    stream = load_dataset("allenai/c4", data_files={shard: _C4_SHARDS[shard]}, split=shard, streaming=True)
    documents = [row["text"] for row in islice(stream, _C4_DOCUMENTS)]
    origin = f"c4 {shard}, first {len(documents)} documents of allenai/c4 {_C4_SHARDS[shard]}"
    return Text("\n\n".join(documents), origin)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [tokens] int64 of the whole text, with the special tokens the tokenizer adds by itself."""
    # verbose=False: the text is meant to be longer than the model's context, no warning is due.
    ids: list[int] = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def sample_windows(token_ids: Tensor, samples: int, seq_len: int, seed: int) -> Tensor:
    """Random windows of a text as GPTQ draws them (they may overlap).

    token_ids: [tokens] integer. Returns [samples, seq_len] int64, the same for the same seed.
    Raises UserError if the text is shorter than one window.
    """
    _check_counts(samples, seq_len, at_least=1)
    tokens = token_ids.numel()
    if tokens < seq_len:
        raise UserError(
            f"calibration text too short: it has {tokens} tokens, one window needs {seq_len}: "
            "use a longer text or a smaller sequence length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens - seq_len + 1, (samples, 1), generator=generator)
    return token_ids.cpu().to(torch.int64)[starts + torch.arange(seq_len)]


def distinct_windows(token_ids: Tensor, samples: int, seq_len: int, seed: int, held_out: int) -> Tensor:
    """Windows of a text in random order, none of which overlap before all of the text was given; then it is cut again.

    token_ids: [tokens] integer. Returns [samples, seq_len] int64, the same for the same seed. The last `held_out` of
    them are the end of the text, and no other touches it.
    Raises UserError if the text is shorter than the windows held out and one more.
    """
    _check_counts(samples, seq_len, at_least=1)
    ids = token_ids.cpu().to(torch.int64)
    end = len(ids) - held_out * seq_len
    if end < seq_len:
        raise UserError(
            f"calibration text too short: it has {len(ids)} tokens, {held_out + 1} windows need "
            f"{(held_out + 1) * seq_len}: use a longer text, a smaller sequence length, or hold out fewer windows"
        )
    generator = torch.Generator().manual_seed(seed)
    given, missing = [], samples - held_out
    while missing > 0:
        start = int(torch.randint(min(seq_len, end - seq_len + 1), (), generator=generator))
        windows = ids[start : end - (end - start) % seq_len].view(-1, seq_len)
        given.append(windows[torch.randperm(len(windows), generator=generator)][:missing])
        missing -= len(given[-1])
    return torch.cat([*given, ids[end:].view(-1, seq_len)])


def self_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Text that the model itself writes: [samples, seq_len] int64 on the CPU, the same for the same seed.

    A window is BOS (if the tokenizer has one), a random ordinary token, then temperature-1 samples. Special tokens
    and ids that the tokenizer does not know (padding of the embedding) are never sampled. The random numbers are
    drawn up front, a row for a window, so batch_size changes memory and speed only (apart from rounding in the
    model). progress: called with (tokens done, tokens in all). The global random state is not touched.
    Raises UserError for impossible counts, a seq_len beyond the model's context, or NaN logits.
    """
    bos = tokenizer.bos_token_id
    prompt = 1 if bos is None else 2
    _check_counts(samples, seq_len, at_least=prompt)
    check_context(model, seq_len)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give 1 or more")
    allowed = _ordinary_tokens(tokenizer, model)
    ordinary = allowed.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    windows = torch.full((samples, seq_len), 0 if bos is None else int(bos), dtype=torch.int64)
    windows[:, prompt - 1] = ordinary[torch.randint(ordinary.numel(), (samples,), generator=generator)]
    draws = torch.rand(samples, seq_len - prompt, dtype=torch.float64, generator=generator)
    with eval_mode(model), torch.inference_mode():
        for first in range(0, samples, batch_size):
            batch = slice(first, first + batch_size)
            for filled in _continue(model, windows[batch], prompt, draws[batch], allowed):
                if progress is not None:
                    progress(first * seq_len + filled, samples * seq_len)
    return windows


def _continue(model: PreTrainedModel, windows: Tensor, prompt: int, draws: Tensor, allowed: Tensor) -> Iterator[int]:
    """Fill windows [batch, seq_len] in place from column `prompt` on; yields the tokens filled after each step.

    draws: [batch, seq_len - prompt] float64 in [0, 1); allowed: [vocabulary] bool.
    """
    cache = None
    step = windows[:, :prompt]
    for position in range(prompt, windows.shape[1]):
        logits, cache = decode_step(model, step.to(model.device), cache)
        windows[:, position] = _pick(logits, draws[:, position - prompt], allowed)
        step = windows[:, position : position + 1]
        yield windows.shape[0] * (position + 1)
    if prompt == windows.shape[1]:
        yield windows.numel()


def _pick(logits: Tensor, draws: Tensor, allowed: Tensor) -> Tensor:
    """One token [batch] a row of logits [batch, vocabulary], by inverting the cumulative distribution at `draws`."""
    # On the CPU: a cumulative sum on a GPU need not be reproducible.
    scores = logits.cpu().to(torch.float32).masked_fill(~allowed, -torch.inf)
    cumulative = torch.softmax(scores, dim=-1).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1]
    if not bool(torch.isfinite(total).all()):
        raise UserError("the model gives NaN logits while it writes calibration text: use float32, or a text source")
    # Below the total even after rounding, so the search never runs past the last token with a probability.
    target = draws.clamp(max=1 - 1e-12) * total
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """[vocabulary of the model] bool: tokens that the tokenizer knows and that are not special."""
    allowed = torch.zeros(int(model.config.get_text_config().vocab_size), dtype=torch.bool)
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    known = [i for i in set(tokenizer.get_vocab().values()) - special if i < allowed.numel()]
    if not known:
        raise UserError("the tokenizer has no ordinary token that the model knows: use the model's own tokenizer")
    allowed[known] = True
    return allowed


def split_sources(source: str) -> list[str]:
    """The sources in a list with commas between; most often one."""
    return [part.strip() for part in source.split(",")]


def calibration_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    load_model: Callable[[], PreTrainedModel],
    progress: Progress | None = None,
    held_out: int | None = None,
) -> tuple[Tensor, str]:
    """Calibration windows [samples, seq_len] int64 and their origin in words.

    source: "self" (the model's own text; the only case that calls load_model) or a source of `load_text`,
    of which the train split is taken; or several of them with commas between, which take turns in giving a window.
    progress: (tokens done, tokens in all), called for "self" only.
    held_out: of a text, None: `sample_windows`; a number: `distinct_windows`, with so many windows held out.
    Raises UserError as `load_text`, `sample_windows`, `distinct_windows` and `self_windows` do.
    """
    parts = split_sources(source)
    if len(parts) > 1:
        if samples < len(parts):
            raise UserError(
                f"{samples} calibration samples cannot come from {len(parts)} sources: ask for more of them"
            )
        origins = []
        windows = torch.empty(samples, seq_len, dtype=torch.int64)
        last = held_out_by_source(samples, held_out or 0, len(parts))
        for part, own, own_last in zip(parts, turns(windows, len(parts)), last, strict=True):
            given = None if held_out is None else own_last
            drawn, origin = calibration_windows(part, tokenizer, len(own), seq_len, seed, load_model, progress, given)
            own.copy_(drawn)
            origins.append(origin)
        return windows, "; ".join(origins)
    [source] = parts
    if source == SELF:
        windows = self_windows(load_model(), tokenizer, samples, seq_len, seed, progress=progress)
        return windows, f"text sampled from the model itself (temperature 1, seed {seed})"
    if source not in DATASETS and not is_text_file(source):
        choices = ", ".join((*DATASETS, SELF))
        raise UserError(
            f"unknown calibration source {source!r}: choose {choices}, a path to a .txt or .jsonl file, or several of "
            "these with commas between"
        )
    text = load_text(source, "train")
    ids = tokenize(tokenizer, text.text)
    if held_out is None:
        return sample_windows(ids, samples, seq_len, seed), text.origin
    return distinct_windows(ids, samples, seq_len, seed, held_out), text.origin


def turns(windows: Tensor, sources: int) -> list[Tensor]:
    """Of ``windows`` [samples, …], for each of the sources a view of those that it gives: they take turns."""
    return [windows[turn::sources] for turn in range(sources)]


def held_out_by_source(samples: int, held_out: int, sources: int) -> list[int]:
    """How many of the last `held_out` of `samples` windows each of the sources gives."""
    return [int(own.sum()) for own in turns(torch.arange(samples) >= samples - held_out, sources)]


def check_context(model: PreTrainedModel, tokens: int) -> None:
    """Raises UserError if a sequence of so many tokens is beyond what the model's configuration allows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"a sequence of {tokens} tokens is beyond the model's context of {limit}: use {limit} tokens or fewer"
        )


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside the block; the model's mode afterwards is the one before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_counts(samples: int, seq_len: int, at_least: int) -> None:
    if samples < 1:
        raise UserError(f"{samples} calibration samples: give 1 or more")
    if seq_len < at_least:
        raise UserError(f"sequence length {seq_len}: give {at_least} or more")
