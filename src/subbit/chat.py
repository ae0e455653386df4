"""A conversation with a model in a terminal, or through a pipe: ``subbit chat``."""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from subbit.calibration.text import check_context, tokenize
from subbit.errors import UserError
from subbit.loading import load, open_any
from subbit.models.decoding import decode_step

__all__ = ["Chat", "Sampling", "run_chat"]

HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops a reply"


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. UserError for numbers that make no sense."""

    max_new_tokens: int = 512
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """See the class."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: give 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a number above 0, and 1 at most")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: give a number from 0 to 4294967295")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token for logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        likely, tokens = (logits.float() / self.temperature).softmax(dim=0).sort(descending=True)
        before = likely.cumsum(dim=0) - likely  # the first token is always kept
        kept = likely.where(before < self.top_p, 0.0)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])


class Chat:
    """A model, what was said so far, and the KV cache of as much of it as it has read."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling or Sampling()
        self.turns: list[dict[str, str]] = []  # of the user and the assistant, one after the other
        self._system = [{"role": "system", "content": system}] if system else []
        self._read: list[int] = []  # tokens in the cache
        self._cache: Any = None
        self._generator = torch.Generator(device=model.device).manual_seed(self.sampling.seed)
        self._stop = stop_tokens(model, tokenizer)
        greeting = self._tokens([{"role": "user", "content": "hello"}])
        check_context(model, len(greeting) + self.sampling.max_new_tokens)

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()
        self._forget()

    def _forget(self) -> None:
        self._read, self._cache = [], None

    def prompt(self) -> list[int]:
        """The tokens of the conversation, up to where the next reply begins."""
        return self._tokens(self.turns)

    def _tokens(self, turns: list[dict[str, str]]) -> list[int]:
        """The tokens of some turns after the system message; UserError when the template has no place for one."""
        messages = [*self._system, *turns]
        if not self.tokenizer.chat_template:  # a reply continues what the user wrote
            text = "".join(turn["content"] + ("" if turn["role"] == "user" else "\n") for turn in messages)
            return list(tokenize(self.tokenizer, text).tolist())
        options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
        try:
            return list(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            hint = ": leave out --system" if self._system else ""
            raise UserError(f"the chat template of the model refuses the conversation ({error}){hint}") from None

    def say(self, text: str) -> int:
        """Add a message of the user; how many old turns had to be dropped for the context of the model.

        UserError for a message that is too long by itself; it is then forgotten.
        """
        self.turns.append({"role": "user", "content": text})
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        dropped = 0
        while limit and len(self.prompt()) + self.sampling.max_new_tokens > limit:
            if len(self.turns) == 1:
                tokens = len(self.prompt())
                self.turns.clear()
                raise UserError(
                    f"the message takes {tokens} tokens and a reply up to {self.sampling.max_new_tokens}, beyond the "
                    f"model's context of {limit}: write less, or give a smaller --max-new-tokens"
                )
            del self.turns[:2]  # a message and its reply: templates want them to alternate
            dropped += 2
        return dropped

    def reply(self) -> Generator[int, None, None]:
        """The tokens of the next reply, without the one that ends it. Whoever stops earlier forgets the cache."""
        finished = False
        try:
            logits = self._feed(self._unread(self.prompt()))
            for _ in range(self.sampling.max_new_tokens):
                token = self.sampling.choose(logits[0], self._generator)
                if token in self._stop:
                    break
                yield token
                logits = self._feed([token])
            finished = True
        finally:
            if not finished:
                self._forget()  # a pass may have ended in the middle of the layers

    def _unread(self, ids: list[int]) -> list[int]:
        """What the cache does not have of the prompt; if it has something else, everything."""
        if len(self._read) < len(ids) and ids[: len(self._read)] == self._read:
            return ids[len(self._read) :]
        self._forget()
        return ids

    @torch.inference_mode()
    def _feed(self, ids: list[int]) -> Tensor:
        """Logits (1, vocabulary) after some more tokens."""
        logits, self._cache = decode_step(self.model, torch.tensor([ids], device=self.model.device), self._cache)
        self._read += ids
        return logits


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a reply: the end-of-text tokens that the model's files name."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


class Printer(TextStreamer):
    """Writes whole words as they come, and keeps the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.text = ""
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with what can no longer change."""
        self.text += text
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


def answer(chat: Chat, out: TextIO) -> None:
    """Write the next reply, and remember as much of it as was written before Ctrl-C."""
    printer = Printer(chat.tokenizer, out)
    stopped, reply = False, chat.reply()
    try:
        for token in reply:
            printer.put(torch.tensor([token]))
    except KeyboardInterrupt:
        stopped = True
    finally:
        reply.close()
    printer.end()
    if stopped:
        print("(stopped)", file=out)
    chat.turns.append({"role": "assistant", "content": printer.text})


def converse(chat: Chat, lines: TextIO, out: TextIO, notes: TextIO) -> None:
    """Answer line after line until /exit or the end of the input."""
    terminal = lines.isatty()
    while True:
        try:
            line = input("> ") if terminal else next(lines)
        except KeyboardInterrupt:
            print(f"\n({HELP})", file=notes)
            continue
        except (EOFError, StopIteration):
            return
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
            print("(the conversation is forgotten)", file=notes)
        elif text:
            answer_to(chat, text, out, notes)


def answer_to(chat: Chat, text: str, out: TextIO, notes: TextIO) -> None:
    """One turn; a message that is too long is a note."""
    try:
        dropped = chat.say(text)
    except UserError as error:
        print(f"({error})", file=notes)
        return
    if dropped:
        limit = chat.model.config.get_text_config().max_position_embeddings
        print(f"({dropped} old turns dropped: with them it is more than the context of {limit} tokens)", file=notes)
    answer(chat, out)


def run_chat(
    model: str,
    sampling: Sampling,
    system: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """Load a model in the dtype that it is stored in, and talk with standard input and output.

    Notes go to standard error.

    Raises:
        UserError: no such model, a reply that is longer than its context, input that is no text.
    """
    opened = open_any(model, trust_remote_code)
    if opened.source is None:
        loaded, tokenizer = load(model, "auto", device, trust_remote_code)
    else:
        loaded, tokenizer = opened.load(opened.source.dtype, device)
    chat = Chat(loaded, tokenizer, sampling, system)
    if sys.stdin.isatty():
        template = "" if tokenizer.chat_template else "; the model has no chat template and just continues the text"
        print(f"{HELP}{template}", file=sys.stderr)
        import readline  # noqa: F401 (importing it gives input() its history and editing)
    try:
        converse(chat, sys.stdin, sys.stdout, sys.stderr)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding}: write in the encoding of your system") from None
