"""KL divergence and agreement against float64 references and closed forms, and the cache of the dense model."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Run, assert_one_line
from families import tiny_model, tiny_tokenizer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import subbit
from subbit import Recipe, UserError
from subbit.evaluation.divergence import Comparison, DenseCache, Divergence, Reference, divergence_of, ensure_cached
from subbit.evaluation.perplexity import perplexity
from subbit.models.source import open_source
from subbit.runtime import native

Tiny = Callable[[str], Path]
SEQ_LEN = 40


@pytest.fixture
def windows() -> Tensor:
    """(5, 40) token ids of the tiny models."""
    return torch.randint(3, 128, (5, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def compare(model: PreTrainedModel, dense: Path, windows: Tensor, folder: Path) -> Divergence:
    """Divergence of a model in memory from a dense one on disk."""
    reference = Reference.of(open_source(dense), "dense")
    cache = DenseCache(folder, reference.digest)
    ensure_cached(reference, cache, windows, lambda done, total: None)
    comparison = Comparison(reference, cache)
    measured = perplexity(
        model, windows.flatten(), dataset="d", split="test", origin="o", seq_len=SEQ_LEN, observe=comparison
    )
    return comparison.result(measured)


def log_probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """[windows, seq_len - 1, vocabulary] float64."""
    with torch.no_grad():
        return model(input_ids=windows).logits[:, :-1].double().log_softmax(dim=-1)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gemma3", "mixtral", "deepseek-v3"])
def test_a_model_does_not_diverge_from_itself(family: str, tiny: Tiny, windows: Tensor, tmp_path: Path) -> None:
    """Tied heads, projections, soft-capping, experts: what is kept of the dense model gives its own logits again."""
    found = compare(tiny_model(family), tiny(family), windows, tmp_path)
    assert found.maximum == pytest.approx(0, abs=1e-5)
    assert found.top1 == 1
    nll = -log_probabilities(tiny_model(family), windows).gather(2, windows[:, 1:, None]).mean()
    assert found.reference_perplexity == pytest.approx(math.exp(nll), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_an_independent_computation(dtype: torch.dtype, tiny: Tiny, windows: Tensor, tmp_path: Path) -> None:
    """Of two unrelated models, token by token in float64 from logits that were never stored: right to 1e-5."""
    model = tiny_model("llama-gqa", seed=1).to(dtype)
    found = compare(model, tiny("llama-gqa"), windows, tmp_path)
    expected, other = log_probabilities(tiny_model("llama-gqa"), windows), log_probabilities(model, windows)
    tokens = [
        sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(expected.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    ]
    means = [statistics.fmean(tokens[i : i + SEQ_LEN - 1]) for i in range(0, len(tokens), SEQ_LEN - 1)]
    assert found.mean == pytest.approx(statistics.fmean(tokens), abs=1e-5)
    assert found.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(5), abs=1e-5)
    assert found.median == pytest.approx(statistics.median(tokens), abs=1e-5)
    assert found.p99 == pytest.approx(statistics.quantiles(tokens, n=100, method="inclusive")[98], abs=1e-5)
    assert found.maximum == pytest.approx(max(tokens), abs=1e-5)
    same = [expected[w].argmax(-1) == other[w].argmax(-1) for w in range(5)]
    shares = [float(one.double().mean()) for one in same]
    assert found.top1 == pytest.approx(statistics.fmean(shares))
    assert found.top1_standard_error == pytest.approx(statistics.stdev(shares) / math.sqrt(5))
    assert (found.tokens, found.windows, found.seq_len, found.stride) == (5 * (SEQ_LEN - 1), 5, SEQ_LEN, SEQ_LEN)
    assert (found.dtype, found.backend) == (str(dtype).removeprefix("torch."), "dense (torch)")


def test_a_model_that_knows_nothing_is_the_entropy_away_from_uniform(
    tiny: Tiny, windows: Tensor, tmp_path: Path
) -> None:
    """KL(P ‖ uniform) = ln V - H(P)."""
    model = tiny_model("llama-mha")
    log_p = log_probabilities(model, windows)
    entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = compare(model, tiny("llama-mha"), windows, tmp_path)
    assert found.mean == pytest.approx(math.log(128) - float(entropy), abs=1e-5)


def test_close_distributions_keep_their_small_divergence() -> None:
    """KL = ln(1 - p + p exp(e)) - p e where one logit is larger by e."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 5
    moved = logits.clone()
    moved[:, 0] += 0.1
    p = logits.double().softmax(dim=-1)[:, 0]
    exact = torch.log(1 - p + p * math.exp(0.1)) - p * 0.1
    found = divergence_of(logits.log_softmax(dim=-1), moved)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=0, atol=1e-6)
    assert float(exact.min()) > 1e-4


def test_one_window_has_no_standard_error(tiny: Tiny, windows: Tensor, tmp_path: Path) -> None:
    found = compare(tiny_model("llama-gqa", seed=1), tiny("llama-gqa"), windows[:1], tmp_path)
    assert found.mean > 0.1
    assert (found.standard_error, found.top1_standard_error) == (None, None)


def test_another_vocabulary_is_no_reference(tiny: Tiny, windows: Tensor, tmp_path: Path) -> None:
    """A model whose head predicts other tokens."""
    model = tiny_model("llama-mha")
    model.lm_head = torch.nn.Linear(64, 120, bias=False)
    with pytest.raises(UserError, match="the reference dense predicts 128 tokens, the model 120"):
        compare(model, tiny("llama-mha"), windows.clamp(max=119), tmp_path)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(tiny: Tiny) -> Reference:
    return Reference.of(open_source(tiny("llama-gqa")), "dense")


def silent(done: int, total: int) -> None:
    """A progress."""


def test_a_window_takes_the_bytes_of_its_hidden_states(reference: Reference, windows: Tensor, tmp_path: Path) -> None:
    """Hidden size 64 here instead of 128 logits; nothing but the header comes on top, and no other file is left."""
    cache = DenseCache(tmp_path / "new" / "folder", reference.digest)
    assert ensure_cached(reference, cache, windows, silent) == 5
    files = sorted(cache.directory.iterdir())
    assert files == sorted(cache.path(window) for window in windows)
    assert all((SEQ_LEN - 1) * 64 * 4 < file.stat().st_size < (SEQ_LEN - 1) * 64 * 4 + 500 for file in files)
    with safe_open(files[0], "pt") as file:
        assert file.get_tensor("hidden").dtype == torch.float32


def test_what_is_there_is_not_run_again(reference: Reference, windows: Tensor, tmp_path: Path) -> None:
    """More windows run those that are new; the same text in longer windows, or another model, finds nothing."""
    cache = DenseCache(tmp_path, reference.digest)
    assert ensure_cached(reference, cache, windows[:3], silent) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert ensure_cached(reference, cache, windows, silent) == 2
    assert ensure_cached(reference, cache, windows, silent) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert ensure_cached(reference, cache, windows.flatten().view(4, 50), silent) == 4
    assert not DenseCache(tmp_path, "another model").path(windows[0]).exists()


def test_an_interrupted_run_goes_on(
    reference: Reference, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of windows that went through the dense model are kept."""
    monkeypatch.setattr("subbit.evaluation.divergence._GROUP_BYTES", 2 * SEQ_LEN * 64 * 4)
    cache = DenseCache(tmp_path, reference.digest)
    reports: list[tuple[int, int]] = []

    def stop_in_the_second_group(done: int, total: int) -> None:
        reports.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_cached(reference, cache, windows, stop_in_the_second_group)
    assert reports == [(1, 9), (2, 9), (3, 9), (4, 9)]  # three layers, three groups
    assert ensure_cached(reference, cache, windows, silent) == 3
    whole = DenseCache(tmp_path / "whole", reference.digest)
    monkeypatch.undo()
    ensure_cached(reference, whole, windows, silent)
    assert all(torch.equal(cache.read(window), whole.read(window)) for window in windows)


def test_a_file_that_is_not_what_its_name_says_is_refused(
    reference: Reference, windows: Tensor, tmp_path: Path
) -> None:
    """Of another window, of another model, a flipped bit, cut short, no safetensors."""
    cache = DenseCache(tmp_path, reference.digest)
    ensure_cached(reference, cache, windows[:2], silent)
    path, good = cache.path(windows[0]), cache.path(windows[0]).read_bytes()
    other = DenseCache(tmp_path / "other", "another model")
    other.directory.mkdir()
    other.write(windows[0], torch.zeros(SEQ_LEN, 64))
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for contents in (other.path(windows[0]).read_bytes(), bytes(flipped), good[:-4], b"", b"nonsense"):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="is damaged or not what its name says: delete it") as error:
            cache.read(windows[0])
        assert "\n" not in str(error.value)
    path.write_bytes(good)
    assert cache.read(windows[0]).shape == (SEQ_LEN - 1, 64)


def test_a_full_disk_is_said_before_the_dense_model_runs(
    reference: Reference, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="use fewer --max-windows"):
        ensure_cached(reference, DenseCache(tmp_path, reference.digest), windows, silent)
    assert not list(tmp_path.iterdir())


# ---- subbit eval -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(tiny: Tiny, recipe_for: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    subbit.compress(tiny("llama-gqa"), recipe_for(calibration={"samples": 2, "seq_len": 16}), out)
    return out


def test_eval_with_a_reference(
    run: Run, compressed: Path, tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache changes no number; without --cache no file is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    command = ["eval", compressed, "--perplexity", text_file, "--seq-len", 64, "--max-windows", 3]
    command += ["--reference", tiny("llama-gqa")]
    ran = run(*command, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    found = result["divergence"][str(text_file)]
    assert found["reference"] == tiny("llama-gqa").name
    assert (found["windows"], found["tokens"]) == (3, 3 * 63)
    assert 0 < found["median"] < found["p99"] <= found["maximum"]
    assert 0 < found["top1"] < 1
    assert result["perplexity"][str(text_file)]["value"] != found["reference_perplexity"]
    assert not list((tmp_path / "tmp").iterdir())

    cached = [*command, "--cache", tmp_path / "cache"]
    first, second = run(*cached, "--json"), run(*cached, "--json")
    assert "3 windows run, 0 found in the cache" in first.err
    assert "0 windows run, 3 found in the cache" in second.err
    assert json.loads(first.out)["divergence"] == json.loads(second.out)["divergence"] == result["divergence"]

    text = run(*cached).out
    assert f"KL(dense ‖ model): mean {found['mean']:.4f} ± {found['standard_error']:.4f}, median" in text
    assert f"same top token: {100 * found['top1']:.2f} ± " in text
    assert f"perplexity {found['reference_perplexity']:.3f} on the same windows" in text
    backend = "native" if native.reason_missing() is None else "torch"
    assert f"64-token windows, no overlap, 3 windows, 189 predicted tokens, float32, {backend} (" in text


def test_a_wrong_reference_is_one_line(run: Run, compressed: Path, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """A compressed one, none, one without weights or with another tokenizer, a cache that is a file."""
    other = Path(shutil.copytree(tiny("llama-gqa"), tmp_path / "other"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["harbour"])
    tokenizer.save_pretrained(other)
    empty = Path(shutil.copytree(tiny("llama-gqa"), tmp_path / "empty"))
    (empty / "model.safetensors").unlink()
    command = ["eval", compressed, "--perplexity", text_file, "--seq-len", 64, "--max-windows", 1]
    for options, complaint in [
        (["--reference", compressed], "is already compressed by subbit; give the original model"),
        (["--reference", tmp_path / "nowhere"], "does not exist"),
        (["--reference", empty], "holds no weights"),
        (["--reference", other], "has another tokenizer than the model"),
        (["--reference", tiny("llama-gqa"), "--cache", text_file], "cannot use"),
        (["--cache", tmp_path], "give that model with --reference"),
    ]:
        assert_one_line(run(*command, *options), complaint)


def test_a_checkpoint_without_its_tokenizer_is_one_line(
    run: Run, compressed: Path, text_file: Path, tmp_path: Path
) -> None:
    """Missing or damaged; transformers alone would make one up, or raise."""
    broken = Path(shutil.copytree(compressed, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{")
    command = ["eval", broken, "--perplexity", text_file, "--seq-len", 64]
    damaged = run(*command)
    for file in broken.glob("tokenizer*"):
        file.unlink()
    missing = run(*command)
    for ran, complaint in ((damaged, "cannot read the tokenizer"), (missing, "no tokenizer_config.json")):
        assert_one_line(ran, complaint)
        assert "copy the tokenizer files of the source model there" in ran.err
