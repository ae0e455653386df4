"""Calibration text: named data sets, local files, windows, and the model's own samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subbit.calibration.text import (
    Text,
    calibration_windows,
    data_root,
    distinct_windows,
    load_text,
    sample_windows,
    self_windows,
    tokenize,
)
from subbit.errors import UserError

# The tests' default does not depend on the folder they are started from.
DATA = Path(os.environ.get("SUBBIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
PADDED_VOCABULARY = 288  # larger than the tokenizer's, as in many published models


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, between <s> (added by the tokenizer itself), </s> and a special token that has no role."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.add_special_tokens(["<s>", "</s>", "<|tool|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", model_max_length=16)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """An empty data folder in SUBBIT_DATA, no way to the hub; the result writes a file there."""
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)

    def write(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- named data sets


def test_data_root_is_the_environment_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBBIT_DATA", "/somewhere")
    assert data_root() == Path("/somewhere")
    monkeypatch.delenv("SUBBIT_DATA")
    assert data_root() == Path("../shared/data")


@pytest.mark.skipif(not (DATA / "wikitext2/test.txt").is_file(), reason="no wikitext2/test.txt: set SUBBIT_DATA")
def test_wikitext2_test_is_byte_for_byte_the_text_of_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBBIT_DATA", str(DATA))
    raw = load_text("wikitext2", "test").text.encode()
    assert len(raw) == 1_296_370
    assert hashlib.sha256(raw).hexdigest() == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


def test_wikitext2_rows_are_joined_as_gptq_does(data: Callable[[str, str], Path]) -> None:
    data("wikitext2/test.txt", " \n = Title = \n \n One\u2028line . \n")
    assert load_text("wikitext2", "test") == Text(
        "\n\n = Title = \n\n\n\n\n One\u2028line . \n", "wikitext2 test, wikitext2/test.txt"
    )


def test_ptb_lines_are_joined_by_spaces(data: Callable[[str, str], Path]) -> None:
    data("ptb/valid.txt", " no it was n't black monday \n but while \n")
    assert load_text("ptb", "validation").text == "no it was n't black monday but while"


def test_train_falls_back_to_validation_and_says_so(data: Callable[[str, str], Path]) -> None:
    data("wikitext2/valid.txt", "validation text\n")
    data("wikitext2/test.txt", "test text\n")
    text = load_text("wikitext2", "train")
    assert text.text == "validation text\n"
    assert "wikitext2 validation" in text.origin
    assert "stands in for train" in text.origin
    data("wikitext2/train.txt", "train text\n")
    assert load_text("wikitext2", "train") == Text("train text\n", "wikitext2 train, wikitext2/train.txt")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_test_split_never_stands_in_for_another(data: Callable[[str, str], Path], split: str) -> None:
    data("wikitext2/test.txt", "test text\n")
    with pytest.raises(UserError):
        load_text("wikitext2", split)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_c4_sample_serves_every_split_and_says_so(data: Callable[[str, str], Path], split: str) -> None:
    data("c4/sample.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    text = load_text("c4", split)
    assert text.text == "one\n\ntwo"
    assert "split is not known" in text.origin
    assert split in text.origin


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "c4"])
def test_no_data_and_no_package_names_every_way_out(data: Callable[[str, str], Path], dataset: str) -> None:
    with pytest.raises(UserError) as error:
        load_text(dataset, "train")
    message = one_line(error)
    for way_out in ("SUBBIT_DATA", 'pip install "subbit[data]"', "--calibration self", ".txt"):
        assert way_out in message


def test_no_network_is_one_line_too(data: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("cannot reach the hub\nand a second line")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError) as error:
        load_text("wikitext2", "test")
    assert "ConnectionError: cannot reach the hub)" in one_line(error)
    assert "--calibration" not in one_line(error)  # this text is to be evaluated on


def test_the_hub_gives_the_same_text_as_local_files(
    data: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(repository: str, *_: str, **options: object) -> object:
        if "wikitext" in repository:
            return {"text": ["", " = Title = \n", ""]}
        if "ptb" in repository:
            return {"sentence": ["no it was", "n't"]}
        assert options["streaming"] is True
        return ({"text": str(i)} for i in range(3))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_text("wikitext2", "train").text == "\n\n = Title = \n\n\n"
    assert load_text("ptb", "test").text == "no it was n't"
    c4 = load_text("c4", "test")
    assert c4.text == "0\n\n1\n\n2"
    assert c4.origin.startswith("c4 validation")


# --- local files and the user's mistakes


def test_local_files(data: Callable[[str, str], Path]) -> None:
    text = load_text(str(data("notes.txt", "some text")), "train")
    assert text == Text("some text", "local file notes.txt")
    lines = json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + '\n\n{"text": "c", "id": 1}\n'
    assert load_text(str(data("notes.jsonl", lines)), "test").text == "a\u2028b\n\nc"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ('{"text": "a"}\n\n{"txt": "b"}\n', 'line 3: no "text"'),
        ('{"text": 3}\n', 'line 1: no "text"'),
        ('["a"]\n', 'line 1: no "text"'),
        ('{"text": ""}\n', "empty"),
        ("", "empty"),
    ],
)
def test_a_bad_jsonl_is_named_with_its_line(data: Callable[[str, str], Path], content: str, complaint: str) -> None:
    path = data("bad.jsonl", content)
    with pytest.raises(UserError) as error:
        load_text(str(path), "train")
    assert complaint in one_line(error)
    assert "bad.jsonl" in one_line(error)


def test_bad_files(data: Callable[[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_text(str(tmp_path / "missing.txt"), "train")
    with pytest.raises(UserError, match="empty"):
        load_text(str(data("blank.txt", " \n\n")), "train")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 \(byte 3\)"):
        load_text(str(tmp_path / "latin.txt"), "train")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_text(str(tmp_path / "folder.txt"), "train")


@pytest.mark.parametrize("source", ["wikitext3", "self", "notes.pdf", ""])
def test_an_unknown_source_lists_the_choices(source: str) -> None:
    with pytest.raises(UserError) as error:
        load_text(source, "train")
    for choice in ("wikitext2", "ptb", "c4", ".jsonl"):
        assert choice in one_line(error)


def test_an_unknown_split_lists_the_choices() -> None:
    with pytest.raises(UserError, match="train, validation, test"):
        load_text("wikitext2", "dev")


# --- tokens and windows


def test_tokenize_long_text_without_a_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        ids = tokenize(tokenizer, "a text far longer than sixteen tokens")
    assert ids.dtype == torch.int64
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "a text far longer than sixteen tokens"
    assert not caplog.records
    assert not capfd.readouterr().err


def test_sample_windows_are_seeded_pieces_of_the_text() -> None:
    text = torch.arange(100, dtype=torch.int32)
    state = torch.get_rng_state()
    windows = sample_windows(text, 50, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))
    assert len(set(windows[:, 0].tolist())) > 20
    assert torch.equal(windows, sample_windows(text, 50, 10, seed=3))
    assert not torch.equal(windows, sample_windows(text, 50, 10, seed=4))


def test_a_text_of_one_window_is_enough_and_less_is_a_mistake() -> None:
    assert sample_windows(torch.arange(10), 2, 10, seed=0).tolist() == [list(range(10))] * 2
    with pytest.raises(UserError, match=r"9 tokens, one window needs 10"):
        sample_windows(torch.arange(9), 2, 10, seed=0)
    with pytest.raises(UserError, match="0 calibration samples"):
        sample_windows(torch.arange(9), 0, 5, seed=0)
    with pytest.raises(UserError, match="sequence length 0"):
        sample_windows(torch.arange(9), 1, 0, seed=0)


def test_distinct_windows_give_all_of_a_text_before_any_of_it_again() -> None:
    """103 tokens less 2 windows held out are 8 windows and a rest; 20 windows take two passes and some of a third."""
    windows = distinct_windows(torch.arange(103, dtype=torch.int32), 22, 10, seed=3, held_out=2)
    assert windows.shape == (22, 10)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))
    assert windows[-2:, 0].tolist() == [83, 93]
    assert int(windows[:-2].max()) < 83
    first = windows[:7].flatten().tolist()
    assert len(set(first)) == len(first)
    assert int(windows[:-2].flatten().bincount(minlength=83)[10:73].min()) >= 2
    assert windows[:7, 0].tolist() != sorted(windows[:7, 0].tolist())
    assert torch.equal(windows, distinct_windows(torch.arange(103), 22, 10, seed=3, held_out=2))
    assert not torch.equal(windows, distinct_windows(torch.arange(103), 22, 10, seed=4, held_out=2))
    with pytest.raises(UserError, match="29 tokens, 3 windows need 30"):
        distinct_windows(torch.arange(29), 5, 10, seed=0, held_out=2)


def test_the_windows_held_out_of_several_texts_come_last(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """They take turns there as well: of five windows held out, the second text has given two, the first three."""
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, text in enumerate(texts):
        text.write_text(" ".join(f"word{number}{i}" for i in range(200)), encoding="utf-8")
    source = ",".join(map(str, texts))
    windows, _ = calibration_windows(source, tokenizer, 17, 16, 0, lambda: pytest.fail("no model"), held_out=5)
    for turn, (text, held_out) in enumerate(zip(texts, (3, 2), strict=True)):
        ids = tokenize(tokenizer, text.read_text(encoding="utf-8"))
        mine = windows[turn::2]
        assert torch.equal(mine, distinct_windows(ids, len(mine), 16, 0, held_out))


# --- the model's own text


def test_self_windows_is_deterministic_and_leaves_no_trace(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()  # dropout would show
    state = torch.get_rng_state()
    windows = self_windows(model, tokenizer, 5, 24, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert windows.shape == (5, 24)
    assert windows.dtype == torch.int64
    assert len({tuple(row) for row in windows.tolist()}) == 5
    torch.rand(3)
    assert torch.equal(windows, self_windows(model, tokenizer, 5, 24, seed=1))
    assert torch.equal(windows, self_windows(model, tokenizer, 5, 24, seed=1, batch_size=2))
    assert not torch.equal(windows, self_windows(model, tokenizer, 5, 24, seed=2))


def test_self_windows_never_sample_special_or_unknown_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    loved = LlamaForCausalLM(model.config)
    loved.load_state_dict(model.state_dict())
    loved.lm_head = torch.nn.Linear(32, PADDED_VOCABULARY)  # a bias that begs for what must not be sampled
    forbidden = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|tool|>")}
    forbidden |= set(range(len(tokenizer), PADDED_VOCABULARY))
    with torch.no_grad():
        loved.lm_head.bias.zero_()[sorted(forbidden)] = 50.0
    windows = self_windows(loved, tokenizer, 20, 32, seed=0)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert forbidden.isdisjoint(windows[:, 1:].flatten().tolist())


def test_self_windows_follow_the_distribution_of_the_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    two = LlamaForCausalLM(model.config)
    two.lm_head = torch.nn.Linear(32, PADDED_VOCABULARY)
    with torch.no_grad():
        two.lm_head.weight.zero_()
        two.lm_head.bias.fill_(-40.0)
        two.lm_head.bias[100], two.lm_head.bias[101] = 0.0, torch.tensor(3.0).log()
    sampled = self_windows(two, tokenizer, 64, 64, seed=0)[:, 2:]
    assert set(sampled.flatten().tolist()) == {100, 101}
    assert (sampled == 101).double().mean() == pytest.approx(0.75, abs=0.03)


def test_self_windows_use_the_cache_as_full_passes_would(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sharp = LlamaForCausalLM(model.config).eval()
    sharp.load_state_dict(model.state_dict())
    with torch.no_grad():
        sharp.lm_head.weight.mul_(1e4)  # so sharp that sampling is the argmax
    windows = self_windows(sharp, tokenizer, 2, 20, seed=0)
    with torch.no_grad():
        logits = sharp(windows).logits
    logits[..., [*tokenizer.all_special_ids, *range(len(tokenizer) - 1, PADDED_VOCABULARY)]] = -torch.inf
    assert torch.equal(logits[:, 1:-1].argmax(-1), windows[:, 2:])


def test_self_windows_without_bos_start_with_a_random_token(model: LlamaForCausalLM) -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    plain = PreTrainedTokenizerFast(tokenizer_object=inner)
    windows = self_windows(model, plain, 30, 4, seed=0)
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    assert windows.max() <= 2


def test_self_windows_report_progress(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    calls: list[tuple[int, int]] = []
    self_windows(model, tokenizer, 3, 8, 0, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (24, 24)
    assert calls == sorted(calls)


def test_self_windows_refuse_the_impossible(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="context of 64"):
        self_windows(model, tokenizer, 1, 65, seed=0)
    with pytest.raises(UserError, match="sequence length 1"):
        self_windows(model, tokenizer, 1, 1, seed=0)
    with pytest.raises(UserError, match="batch size 0"):
        self_windows(model, tokenizer, 1, 8, seed=0, batch_size=0)
    broken = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(UserError, match="NaN"):
        self_windows(broken, tokenizer, 1, 8, seed=0)


def test_calibration_windows_dispatch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Callable[[str, str], Path]
) -> None:
    def no_model() -> LlamaForCausalLM:
        raise AssertionError("a text source must not load the model")

    data("wikitext2/valid.txt", "a line of text to calibrate on\n")
    windows, origin = calibration_windows("wikitext2", tokenizer, 4, 16, 0, no_model)
    assert windows.shape == (4, 16)
    assert "validation" in origin
    windows, origin = calibration_windows("self", tokenizer, 4, 16, 0, lambda: model)
    assert torch.equal(windows, self_windows(model, tokenizer, 4, 16, 0))
    assert "model itself" in origin
    with pytest.raises(UserError, match="wikitext2, ptb, c4, self"):
        calibration_windows("selfie", tokenizer, 4, 16, 0, no_model)


def test_several_sources_take_turns(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Callable[[str, str], Path]
) -> None:
    """Each gives the windows that it would have given alone; a mistake in any of them is a mistake."""
    data("wikitext2/valid.txt", "a line of text to calibrate on\n")
    other = data("other.txt", "quite different words in here, and many more of them\n" * 9)
    windows, origin = calibration_windows(f"wikitext2, {other},self", tokenizer, 8, 16, 0, lambda: model)
    for turn, (source, count) in enumerate((("wikitext2", 3), (str(other), 3), ("self", 2))):
        alone, alone_origin = calibration_windows(source, tokenizer, count, 16, 0, lambda: model)
        assert torch.equal(windows[turn::3], alone)
        assert alone_origin in origin
    with pytest.raises(UserError, match="unknown calibration source 'wiki'"):
        calibration_windows("wikitext2,wiki", tokenizer, 8, 16, 0, lambda: model)
    with pytest.raises(UserError, match="1 calibration samples cannot come from 2 sources"):
        calibration_windows("wikitext2,self", tokenizer, 1, 16, 0, lambda: model)
