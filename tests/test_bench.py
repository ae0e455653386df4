"""`subbit bench`: a process for every measurement, medians, one line for every mistake, and what it counts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import Run
from families import tiny_model
from scripts import benchmark

import subbit
from subbit import Recipe, UserError
from subbit.checkpoint.reader import open_checkpoint
from subbit.evaluation import bench as module
from subbit.evaluation.bench import Contender, Job, Round, bench, dense_model, run_rounds, summarize
from subbit.evaluation.bench_worker import bytes_read
from subbit.progress import SilentProgress

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def packed(tiny: Tiny, recipe_for: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:8 `codes` checkpoint with an untied head."""
    out = tmp_path_factory.mktemp("bench") / "out"
    subbit.compress(tiny("llama-mha"), recipe_for("codes", sparsity="2:8", embeddings="8bit"), out)
    return out


def a_round(**changes: Any) -> Round:
    """Some numbers."""
    numbers = dict.fromkeys(("peak_bytes", "resident_bytes", "model_bytes", "bytes_per_token"), 1000)
    return dataclasses.replace(Round(10.0, 5.0, 1.0, **numbers, dtype="float32", environment={}), **changes)


def test_one_run(packed: Path, tiny: Tiny) -> None:
    """With processes and all."""
    result = bench(
        packed, tiny("llama-mha"), prompt_tokens=5, new_tokens=3, rounds=1, threads=1, dense_dtypes=["bfloat16"]
    )
    dense, small = result.models
    assert (dense.name, small.name) == ("dense bfloat16", "packed codes 2:8")
    assert (dense.dtype, small.dtype) == ("bfloat16", "float32")
    for model in result.models:
        assert model.error is None
        assert (
            min(model.prompt_tokens_per_second or 0, model.decode_tokens_per_second or 0, model.load_seconds or 0) > 0
        )
        assert (model.peak_bytes or 0) >= (model.resident_bytes or 0) > (model.model_bytes or 0)
    assert (small.bytes_per_token or 0) < (dense.bytes_per_token or 0)
    assert small.file_bytes == subbit.inspect(packed)["file_bytes"]
    assert result.environment["machine"]["threads"] == 1


def test_the_command(packed: Path, tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models; JSON or a table; exit code 1 when one failed."""
    jobs: list[Job] = []

    def work(job: Job) -> Round | str:
        jobs.append(job)
        return "the process was killed" if job.dtype == "float32" else a_round()

    monkeypatch.setattr(module, "run_worker", work)
    options = ["--prompt-tokens", 5, "--new-tokens", 3, "--rounds", 2, "--threads", 1]
    for extra in ([], ["--json"]):
        ran = run("bench", packed, "--dense", tiny("llama-mha"), *options, *extra)
        assert (ran.code, ran.err) == (1, "dense float32 failed: the process was killed\n")
    result = json.loads(ran.out)
    assert [model["name"] for model in result["models"]] == ["dense float32", "dense bfloat16", "packed codes 2:8"]
    assert [job.dtype for job in jobs[:5]] == ["float32", "bfloat16", None, "bfloat16", None]
    assert (jobs[0].prompt_tokens, jobs[0].new_tokens, jobs[0].threads) == (5, 3, 1)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is not run again, the others are."""
    ran: list[str] = []

    def run(job: Job) -> Round | str:
        ran.append(job.path)
        return "killed" if job.path == "b" and len(ran) > 3 else a_round(decode_tokens_per_second=float(len(ran)))

    monkeypatch.setattr(module, "run_worker", run)
    contenders = [Contender(name, name, "float32", 1) for name in "abc"]
    found = run_rounds(contenders, Job("", None, 1, 1, None), 3, SilentProgress())
    assert "".join(ran) == "abcabcac"
    assert summarize(contenders[0], found[contenders[0]]).decode_tokens_per_second == 4  # the median of 1, 4, 7
    failed = summarize(contenders[1], found[contenders[1]])
    assert failed.error == "killed"
    assert failed.decode_tokens_per_second is None


def test_how_a_process_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the system for its memory, by itself, or with a mistake of the user."""
    script = tmp_path / "python"
    script.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    job = Job("x", None, 1, 1, None)
    script.write_text("#!/bin/sh\nread line\nkill -9 $$\n")
    assert module.run_worker(job) == "the process was killed by SIGKILL (out of memory?)"
    script.write_text("#!/bin/sh\nread line\nexit 3\n")
    assert module.run_worker(job) == "the process ended with exit code 3"
    script.write_text('#!/bin/sh\nread line\necho \'{"error": "a mistake"}\'\nexit 2\n')
    with pytest.raises(UserError, match="a mistake"):
        module.run_worker(job)


def test_without_a_dense_model(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_worker", lambda job: a_round(decode_tokens_per_second=7.0))
    result = bench(packed)
    assert [model.name for model in result.models] == ["packed codes 2:8"]
    assert "--dense" in result.notes[0]
    table = module.bench_table(result)
    assert table.row_count == len(module.ROWS) + 1


def test_the_dense_model_that_the_checkpoint_knows(packed: Path, tiny: Tiny) -> None:
    checkpoint = open_checkpoint(packed)
    source = str(tiny("llama-mha"))
    known = dataclasses.replace(checkpoint, config={**checkpoint.config, "_name_or_path": source})
    assert dense_model(known, None) == source
    gone = dataclasses.replace(checkpoint, config={**checkpoint.config, "_name_or_path": "some/model"})
    assert dense_model(gone, None) is None
    itself = dataclasses.replace(checkpoint, config={**checkpoint.config, "_name_or_path": str(packed)})
    assert dense_model(itself, None) is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt_tokens": 0}, "0 prompt tokens"),
        ({"new_tokens": -1}, "-1 new tokens"),
        ({"rounds": 0}, "0 rounds"),
        ({"threads": 0}, "0 threads"),
        ({"dense": "nowhere-at-all"}, "nowhere-at-all"),
    ],
)
def test_mistakes(options: dict[str, Any], complaint: str, packed: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        bench(packed, **options)


def test_other_mistakes(packed: Path, tiny: Tiny) -> None:
    with pytest.raises(UserError, match="compressed checkpoint"):
        bench(packed, packed)
    with pytest.raises(UserError, match="not compressed by subbit"):
        bench(tiny("llama-mha"))


def test_bytes_read() -> None:
    """Every matrix once, one row of the embedding, two of four experts."""
    model = tiny_model("llama-mha")
    embedding = model.get_input_embeddings().weight
    everything = sum(parameter.nbytes for parameter in model.parameters())
    prompt = torch.tensor([3, 4, 5])
    assert bytes_read(model, prompt) == everything - embedding.nbytes + embedding[0].nbytes
    tied = tiny_model("llama-gqa")
    matrix = tied.get_input_embeddings().weight
    assert bytes_read(tied, prompt) == sum(parameter.nbytes for parameter in tied.parameters()) + matrix[0].nbytes


def test_bytes_read_of_packed_modules(packed: Path) -> None:
    """Linears in the order of the kernels, the head as it is stored, a row of the embedding."""
    model, _ = subbit.load(packed)
    linears = sum(one.weight_bytes for name, one in model.named_modules() if name.endswith("_proj"))
    head, embedding = model.lm_head.weight_bytes, model.get_input_embeddings().weight_bytes
    norms = sum(parameter.nbytes for parameter in model.parameters())
    assert bytes_read(model, torch.tensor([3, 4])) == linears + head + norms + embedding // 128


# ---- benchmarks/decode.py --------------------------------------------------------------------------------------------


def decode_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a model of a toy's shape."""
    script = benchmark("decode")
    sizes = {"HIDDEN": 128, "INTERMEDIATE": 192, "VOCABULARY": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "SHAPES", {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 192)})
    return script


def test_random_models_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codewords are ones that an encoder could have written, of all values."""
    script = decode_benchmark(monkeypatch)
    spec, tensors = script.codes_spec(64, 640), script.random_codes(64, 640, torch.Generator().manual_seed(0))
    spec.check(tensors)
    assert {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()} == spec.tensors()
    assert len(spec.unpack(tensors).signs.view(-1, 8).unique(dim=0)) == 112
    rows, shape = script.Shape(1, True, 8).embedding_spec(), script.Shape(1, True, 8)
    rows.check(script.random_rows(rows, torch.Generator().manual_seed(0)))
    assert set(shape.config()["quantization_config"]["embeddings"]) == {"model.embed_tokens", "lm_head"}


def test_extrapolation(monkeypatch: pytest.MonkeyPatch) -> None:
    script = decode_benchmark(monkeypatch)

    def of(layers: int) -> dict[str, Any]:
        models = {}
        for name, seconds in {"dense bfloat16": 0.1, "packed codes 2:8": 0.01}.items():
            found = dict.fromkeys(("load_seconds", "model_bytes", "resident_bytes", "peak_bytes", "bytes_per_token"), 1)
            rate = 1 / (seconds * layers + 0.01)
            models[name] = {**found, "file_bytes": 100 * layers, "decode_tokens_per_second": rate}
        return {"models": models}

    result = script.extrapolate(of(2), of(4), (2, 4))
    assert result["models"]["dense bfloat16"]["decode_tokens_per_second"] == pytest.approx(1 / 3.21)
    assert result["models"]["packed codes 2:8"]["file_bytes"] == pytest.approx(3200)
    assert result["speedup_vs_bfloat16"] == pytest.approx(3.21 / 0.33)
