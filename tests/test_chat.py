"""`subbit chat`: what the model is asked, what is streamed, and how a conversation ends, goes on or shrinks."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run, assert_one_line
from families import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from subbit.chat import Chat, Sampling, answer, converse
from subbit.errors import UserError

Tiny = Callable[[str], Path]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Random, with a context of 256 tokens; its likeliest tokens do not end the text."""
    return tiny_model("llama-mha")


def new_chat(model: PreTrainedModel, template: str | None = None, system: str | None = None, **sampling: Any) -> Chat:
    """Eight tokens a reply, the likeliest ones, unless `sampling` says otherwise."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Chat(model, tokenizer, Sampling(**{"max_new_tokens": 8, "temperature": 0.0, **sampling}), system)


def talk(chat: Chat, text: str) -> tuple[str, str]:
    """Output and notes of piped input."""
    out, notes = io.StringIO(), io.StringIO()
    converse(chat, io.StringIO(text), out, notes)
    return out.getvalue(), notes.getvalue()


def greedy(chat: Chat, prompt: list[int], tokens: int) -> str:
    """What transformers' own generate() writes."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    output = chat.model.generate(ids, **options)
    return str(chat.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_replies_are_those_of_generate(model: PreTrainedModel, template: str | None) -> None:
    """Two turns; the second one sees the first, through the cache."""
    chat, fresh = new_chat(model, template), new_chat(model, template)
    out, _ = talk(chat, "the river\nand the sea\n")
    for turn, text in enumerate(("the river", "and the sea")):
        fresh.say(text)
        reply = greedy(fresh, fresh.prompt(), 8)
        assert chat.turns[2 * turn + 1] == {"role": "assistant", "content": reply}
        fresh.turns.append({"role": "assistant", "content": reply})
        assert reply in out


def test_the_template_gets_roles_and_the_system_message(model: PreTrainedModel) -> None:
    chat = new_chat(model, TEMPLATE, system="be brief")
    chat.say("hi")
    text = chat.tokenizer.decode(chat.prompt(), skip_special_tokens=True)
    assert text == "<system>be brief\n<user>hi\n<assistant>"


def test_a_template_without_a_system_role(model: PreTrainedModel) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    new_chat(model, template)
    with pytest.raises(UserError, match=r"no system role.*leave out --system"):
        new_chat(model, template, system="be brief")


def test_only_what_is_new_is_read(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, fed = new_chat(model), []
    feed = chat._feed
    monkeypatch.setattr(chat, "_feed", lambda ids: (fed.append(len(ids)), feed(ids))[1])  # type: ignore[func-returns-value]
    chat.say("the river")
    answer(chat, io.StringIO())
    first, fed[:] = list(fed), []
    chat.say("and")
    whole = len(chat.prompt())
    answer(chat, io.StringIO())
    assert sum(first) < whole
    assert fed[0] in (whole - sum(first), whole)  # all of it where the text reads as other tokens than were written
    assert fed[1:] == [1] * 8


def test_commands(model: PreTrainedModel) -> None:
    chat = new_chat(model)
    out, notes = talk(chat, "\nthe river\n/reset\nthe sea\n/exit\nthe mill\n")
    assert out.count("\n") >= 2
    assert "forgotten" in notes
    assert [turn["content"] for turn in chat.turns if turn["role"] == "user"] == ["the sea"]


def test_old_turns_are_dropped(model: PreTrainedModel) -> None:
    """The context is 256 tokens: a long conversation loses its oldest turns, in pairs, and says so."""
    chat = new_chat(model, TEMPLATE, system="be brief", max_new_tokens=16)
    _, notes = talk(chat, "the river runs past the old mill and into the sea and on and on\n" * 8)
    assert "old turns dropped" in notes
    assert "context of 256 tokens" in notes
    assert len(chat.turns) % 2 == 0
    assert chat.turns[0]["role"] == "user"
    assert len(chat.prompt()) <= 256
    assert chat.tokenizer.decode(chat.prompt(), skip_special_tokens=True).startswith("<system>be brief")


def test_a_message_that_is_too_long(model: PreTrainedModel) -> None:
    chat = new_chat(model)
    out, notes = talk(chat, "zq " * 200 + "\nthe river\n")
    assert "write less" in notes
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert out
    with pytest.raises(UserError, match="context of 256"):
        new_chat(model, max_new_tokens=256)


def test_ctrl_c_stops_the_reply_only(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays in the conversation, the next reply is right although a pass was cut off."""
    chat, calls, feed = new_chat(model), 0, Chat._feed

    def interrupted(self: Chat, ids: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = feed(self, ids)
        if calls == 4:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Chat, "_feed", interrupted)
    out, _ = talk(chat, "the river\nthe sea\n")
    assert out.count("(stopped)") == 1
    assert len(chat.turns) == 4
    fresh = new_chat(model)
    fresh.turns = chat.turns[:3]
    assert chat.turns[3]["content"] == greedy(fresh, fresh.prompt(), 8)


def test_sampling() -> None:
    logits = torch.tensor([1.0, 4.0, 3.0, -2.0])
    generator = torch.Generator().manual_seed(0)
    assert Sampling(temperature=0).choose(logits, generator) == 1
    assert {Sampling(top_p=1e-9).choose(logits, generator) for _ in range(20)} == {1}
    drawn = [Sampling(temperature=1, top_p=0.9).choose(logits, generator) for _ in range(300)]
    assert set(drawn) == {1, 2}  # 0.71 and 0.26: the first two reach 0.9
    assert 150 < drawn.count(1) < 270
    assert {Sampling(temperature=100, top_p=1).choose(logits, generator) for _ in range(200)} == {0, 1, 2, 3}


def test_seeds(model: PreTrainedModel) -> None:
    one, same, other = (new_chat(model, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    replies = [talk(chat, "the river\n")[0] for chat in (one, same, other)]
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top-p"),
        (["--seed", "-1"], "seed"),
        (["--max-new-tokens", "300"], "context of 256"),
    ],
)
def test_mistakes_are_one_line(options: list[str], complaint: str, tiny: Tiny, run: Run) -> None:
    assert_one_line(run("chat", tiny("llama-mha"), *options), complaint)


def test_the_command_with_a_pipe(tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river\n/exit\n"))
    ran = run("chat", tiny("llama-mha"), "--max-new-tokens", 4, "--temperature", 0, "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.strip()
