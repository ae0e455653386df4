"""Sweeps: what is run, what is remembered, what survives a kill; and the table and the figures of what came of it.

Run with `pytest tests/test_sweep.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Run, assert_one_line
from scripts import benchmark

import subbit
from subbit import Recipe, UserError
from subbit.binary.nm import Sparsity
from subbit.calibration.text import distinct_windows, sample_windows
from subbit.comparison import sweep as sweep_module
from subbit.comparison import worker
from subbit.comparison.entries import (
    Entry,
    Protocol,
    dataset_key,
    entry_key,
    grid,
    read_entries,
    recipe_key,
    with_seeds,
)
from subbit.comparison.published import PUBLISHED_FILE
from subbit.comparison.results import read_results, record
from subbit.comparison.rows import read_sections
from subbit.comparison.tables import change, markdown, short
from subbit.comparison.tasks import Task, facts_file, read_facts, save_facts
from subbit.effort import EFFORTS
from subbit.evaluation.record import Measurement, record_evaluation
from subbit.loading import load_any
from subbit.models.source import model_digest, open_source
from subbit.process import how_it_ended
from subbit.runtime.linear import unpack_linears

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., Recipe]
ROOT = Path(__file__).parent.parent


class Lines:
    """A progress that remembers its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, name: str) -> Any:
        raise AssertionError("the parent measures nothing itself")


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys_of_the_dense_model_are_these() -> None:
    """Keys in files that people have must mean the same tomorrow; recipes may gain fields, the dense model has none."""
    assert recipe_key(None, "model") == "b30d367e29a5afc6"
    assert entry_key(None, "model", Protocol()) == "06f414c93adaaabd"


def test_a_key_knows_what_changes_the_numbers_and_nothing_else(recipe_for: RecipeFor, text_file: Path) -> None:
    """Recipe, seed, model and protocol count; names, the order of data sets and folders do not."""
    recipe = recipe_for("stbllm")
    protocol = Protocol(("wikitext2", "c4"))
    key = entry_key(recipe, "model", protocol)
    moved = text_file.with_name("moved.txt")
    moved.write_text(text_file.read_text())
    same = recipe_for("stbllm", calibration={"source": str(moved)})
    several = recipe_for("stbllm", calibration={"source": f"wikitext2, {moved}"})
    mixed = entry_key(several, "model", protocol)
    assert key == entry_key(Recipe.create(recipe.to_dict()), "model", Protocol(("c4", "wikitext2")))
    assert key == entry_key(same, "model", protocol)
    others = {
        key,
        entry_key(None, "model", protocol),
        entry_key(recipe, "other", protocol),
        entry_key(recipe_for("stbllm", calibration={"seed": 1}), "model", protocol),
        entry_key(recipe_for("stbllm", sparsity="5:8"), "model", protocol),
        entry_key(recipe, "model", Protocol(("wikitext2",))),
        entry_key(recipe, "model", Protocol(("wikitext2", "c4"), max_windows=2)),
        entry_key(recipe, "model", Protocol(("wikitext2", "c4"), seq_len=512)),
    }
    moved.write_text("another text")
    others.add(entry_key(same, "model", protocol))
    assert len(others) == 9
    assert mixed == entry_key(recipe_for("stbllm", calibration={"source": f"wikitext2,{text_file}"}), "model", protocol)
    moved.write_text(text_file.read_text() + "more")
    assert mixed != entry_key(several, "model", protocol)


# ---- lists of entries ------------------------------------------------------------------------------------------------


def test_a_grid_gives_each_method_what_it_can_vary() -> None:
    """N:M for methods that prune, budgets for codes, bits of a code for rtn and gptq, the dense model once."""
    entries = grid(["dense", "billm", "gptq", "codes"], ["4:8", "none"], [0.8], [2, 3], {"calibration": {"samples": 7}})
    names = ["dense", "billm 4:8", "billm unpruned", "gptq 2 bits", "gptq 3 bits", "codes 0.8 bits"]
    assert [entry.name for entry in entries] == names
    assert entries[0].recipe is None
    assert all(entry.recipe.calibration.samples == 7 for entry in entries if entry.recipe)
    assert [entry.name for entry in grid(["stbllm", "arb"])] == ["stbllm 4:8", "arb unpruned"]


def test_effort_is_for_codes_and_leaves_what_is_given() -> None:
    """Other methods of the grid are not touched, and a given value goes before that of the effort."""
    codes, stbllm = grid(["codes", "stbllm"], bits=[1.0], common={"calibration": {"samples": 9}}, effort="standard")
    assert codes.recipe is not None
    assert stbllm.recipe is not None
    assert codes.recipe.reconstruction.steps == EFFORTS["standard"]["reconstruction"]["steps"] > 0
    assert codes.recipe.calibration.samples == 9
    assert stbllm.recipe.reconstruction.steps == 0


def test_seeds_multiply_all_but_the_dense_model() -> None:
    """Each entry with each seed."""
    titles = [entry.title for entry in with_seeds(grid(["dense", "pbs2p"]), [0, 3])]
    assert titles == ["sweep: dense", "sweep: pbs2p 4:8", "sweep: pbs2p 4:8, seed 3"]
    with pytest.raises(UserError, match="at least one method and one seed"):
        with_seeds([], [0])


def test_a_file_of_entries(tmp_path: Path) -> None:
    """Defaults, names, an ablation, an effort, the dense model; 4:8 is a sparsity and no number in base 60."""
    file = tmp_path / "entries.yaml"
    file.write_text(
        "defaults: {calibration: {samples: 4}}\n"
        "entries:\n"
        "- {method: dense}\n"
        "- {method: stbllm, sparsity: 4:8}\n"
        "- {method: stbllm, name: no salient columns, group: ablations, baseline: 'stbllm 4:8',\n"
        "   options: {salient_columns: 0}, calibration: {seq_len: 16}}\n"
        "- {bits: 0.8, method: codes, effort: fast}\n"
    )
    entries = read_entries(file, {"calibration": {"samples": 99, "source": "c4"}})
    assert [entry.name for entry in entries] == ["dense", "stbllm 4:8", "no salient columns", "codes 0.8 bits"]
    changed = entries[2]
    assert (changed.group, changed.baseline) == ("ablations", "stbllm 4:8")
    assert changed.recipe is not None
    calibration = changed.recipe.calibration
    assert (calibration.samples, calibration.seq_len, calibration.source) == (4, 16, "c4")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "must be a mapping"),
        ("entries: []", "must have a list 'entries'"),
        ("entries: [{method: rtn}]\nother: 1", "must have a list 'entries'"),
        ("entries: [rtn]", "entry 1: give the fields of a recipe"),
        ("entries: [{method: rtn}, {method: luck}]", "entry 2: recipe: method: there is no method 'luck'"),
        ("entries: [{method: rtn, effort: fast}]", "entry 1: effort is for method codes"),
    ],
)
def test_a_wrong_file_of_entries(text: str, complaint: str, tmp_path: Path) -> None:
    """The line says which entry."""
    file = tmp_path / "entries.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_entries(file)


@pytest.mark.parametrize(
    ("protocol", "complaint"),
    [
        (Protocol(()), "at least one data set"),
        (Protocol(("wikitext3",)), "unknown data set 'wikitext3'"),
        (Protocol(("missing.txt",)), "unknown data set 'missing.txt'"),
        (Protocol(("c4", "c4")), "two of the data sets are called c4"),
        (Protocol(split="all"), "unknown split 'all'"),
        (Protocol(dtype="int8"), "dtype 'int8'"),
        (Protocol(seq_len=1), "at least 2 tokens"),
        (Protocol(max_windows=0), "at least 1 window"),
    ],
)
def test_a_wrong_protocol_stops_the_sweep_before_it_starts(protocol: Protocol, complaint: str, tmp_path: Path) -> None:
    """Not after hours of compressing."""
    with pytest.raises(UserError, match=complaint):
        subbit.sweep("model", grid(["rtn"]), tmp_path / "results.json", protocol)
    assert not list(tmp_path.iterdir())


# ---- what is run, with workers that only pretend ---------------------------------------------------------------------


class Pretended:
    """Stands in for the process of a step: writes facts as a worker does, fails where it is told to."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fails: dict[str, str] = {}  # method → error

    def __call__(self, sweep: Any, task: Task) -> str | None:
        method = task.recipe["method"] if task.recipe else "dense"
        self.steps.append(f"{task.kind} {method}")
        if task.kind == "model":
            save_facts(task, digest="d", **size(16, 16), linear_weights=1, parameters=1)
            return None
        if method in self.fails:
            return self.fails[method]
        if task.kind == "compress":
            Path(task.checkpoint).mkdir()
            save_facts(task, **size(0.6, 3), output_error=0.1, compress={"seconds": 60.0, "peak_bytes": 10**9})
        else:
            protocol = Protocol(**{**(task.protocol or {}), "datasets": tuple((task.protocol or {})["datasets"])})
            found = {dataset_key(name, protocol): measured(50.0) for name in protocol.datasets}
            save_facts(task, perplexity=found)
        return None


def size(nominal: float, stored: float) -> dict[str, Any]:
    """Bits and bytes as a worker finds them."""
    return {"bits": {"nominal": nominal, "stored": stored, "model": stored + 1}, "bytes": {"file": 2_000_000}}


def measured(value: float) -> dict[str, Any]:
    """A perplexity as a worker finds it."""
    facts = {"value": value, "standard_error": value / 10, "nll": math.log(value), "windows": 20, "seq_len": 2048}
    how = {"dataset": "wikitext2", "split": "test", "dtype": "float32"}
    return {**facts, **how, "seconds": 2.0, "peak_bytes": 10**9}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """No processes."""
    pretended = Pretended()
    monkeypatch.setattr(sweep_module, "run_task", pretended)
    return pretended


def test_a_longer_list_costs_what_is_new(pretend: Pretended, tmp_path: Path) -> None:
    """Finished entries are not run again, results come in the order asked for, and nothing is left beside them."""
    out = tmp_path / "results.json"
    subbit.sweep("model", grid(["dense", "rtn"]), out)
    pretend.steps.clear()
    results = subbit.sweep("model", grid(["gptq", "rtn", "dense"]), out)
    assert pretend.steps == ["model dense", "compress gptq", "evaluate gptq"]
    assert [(result["recipe"] or {}).get("method") for result in results] == ["gptq", "rtn", None]
    assert all(result["status"] == "done" for result in results)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_entry_that_fails_stops_no_other(pretend: Pretended, tmp_path: Path) -> None:
    """It is recorded with its line, left out the next time, and run again only when that is asked for."""
    out, lines = tmp_path / "results.json", Lines()
    pretend.fails = {"rtn": "this cannot be done"}
    results = subbit.sweep("model", grid(["rtn", "gptq"]), out, progress=lines)
    assert [(result["status"], result["error"]) for result in results] == [
        ("failed", "this cannot be done"),
        ("done", None),
    ]
    assert any(line.startswith("[1/2] failed: this cannot be done") for line in lines.lines)
    pretend.fails.clear()
    pretend.steps.clear()
    lines.lines.clear()
    subbit.sweep("model", grid(["rtn", "gptq"]), out, progress=lines)
    assert pretend.steps == ["model dense"]
    assert lines.lines == ["2 entries: 0 to run, 1 failed and are left out (--retry runs them again)"]
    assert subbit.sweep("model", grid(["rtn", "gptq"]), out, retry=True)[0]["status"] == "done"
    assert pretend.steps[1:] == ["model dense", "compress rtn", "evaluate rtn"]
    assert len(read_results(out)) == 2


def test_one_recipe_in_two_groups_is_run_once_and_shown_twice(pretend: Pretended, tmp_path: Path) -> None:
    """In one list as in two."""
    recipe = Recipe.create({"method": "stbllm"})
    first = [Entry(recipe, "STBLLM", "4:8", "headline"), Entry(recipe, "base", group="ablations")]
    subbit.sweep("model", first, tmp_path / "results.json")
    subbit.sweep("model", [Entry(recipe, "late", group="more")], tmp_path / "results.json")
    assert pretend.steps == ["model dense", "compress stbllm", "evaluate stbllm", "model dense"]
    (result,) = read_results(tmp_path / "results.json")
    assert [place["group"] for place in result["places"]] == ["headline", "ablations", "more"]


def test_kept_checkpoints(pretend: Pretended, tmp_path: Path) -> None:
    """They stay under a name that says something, with their facts beside them, hidden."""
    subbit.sweep("model", grid(["pbs2p"]), tmp_path / "results.json", keep=True, work=tmp_path / "work")
    (checkpoint,) = (path for path in (tmp_path / "work").glob("*") if not path.name.startswith("."))
    assert checkpoint.name.startswith("pbs2p-4-8-")
    assert read_facts(facts_file(checkpoint))["bits"]["stored"] == 3


def test_what_is_no_results_file_is_not_overwritten(pretend: Pretended, tmp_path: Path) -> None:
    """Also not one of another version."""
    out = tmp_path / "results.json"
    entry = '{"key": "a", "status": "done", "places": [], "model": {}, "protocol": 3}'
    broken = ("[{}]", "[3]", f"[{entry}]")
    texts = (
        "no JSON",
        "[]",
        '{"results": []}',
        *(f'{{"subbit_sweep": 1, "results": {results}}}' for results in broken),
    )
    for text in texts:
        out.write_text(text)
        with pytest.raises(UserError, match=r"results\.json is no results file"):
            subbit.sweep("model", grid(["rtn"]), out)
        assert out.read_text() == text
    out.write_text('{"subbit_sweep": 2, "results": []}')
    with pytest.raises(UserError, match="another version"):
        subbit.sweep("model", grid(["rtn"]), out)
    assert not pretend.steps


def test_how_a_worker_ended_in_words() -> None:
    """Where it could not say it itself."""
    assert how_it_ended("compressing", -signal.SIGKILL) == "compressing was killed by SIGKILL (out of memory?)"
    assert how_it_ended("evaluating", 3) == "evaluating ended with exit code 3"


# ---- the real thing, on a tiny model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """A sweep of a recipe that does not fit the model and one that does; killed in the second, then taken up again."""

    folder: Path  # results.json, and the kept checkpoint in results.work
    log_at_kill: str
    failed_at_kill: dict[str, Any]
    failed: dict[str, Any]
    done: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The kept one."""
        (checkpoint,) = (self.folder / "results.work").glob("stbllm-*")
        return checkpoint


class ForkedWorker:
    """Stands in for the ``Popen`` of a worker: a copy of this process, which has imported everything already."""

    def __init__(self, command: list[str], **options: Any) -> None:
        assert command[-1] == worker.__name__
        self._code: int | None = None
        read, write = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(write)
            os.dup2(read, 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdin = os.fdopen(0)
            try:
                os._exit(worker.main())
            finally:
                os._exit(1)
        os.close(read)
        self.stdin = os.fdopen(write, "w")
        self.stdout = io.StringIO()  # nothing is printed

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        return self._code


@pytest.fixture(scope="module")
def swept(tiny: Tiny, recipe_for: RecipeFor, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """In a copy of this process until SIGKILL, then in this process."""
    folder = tmp_path_factory.mktemp("swept")
    out, work = folder / "results.json", folder / "results.work"
    misfit = recipe_for("stbllm", overrides={"nothing": {"dense": True}})
    entries = [Entry(misfit, "misfit"), Entry(recipe_for("stbllm"), "stbllm", "4:8")]
    protocol = Protocol((str(text_file),), seq_len=32, max_windows=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subbit.process.subprocess", SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE))
        first = os.fork()
        if first == 0:
            try:
                subbit.sweep(tiny("llama-gqa"), entries, out, protocol)
            finally:
                os._exit(1)
        try:
            wait_for(lambda: any(under_way(path) for path in work.glob("stbllm-*")))
        finally:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
        (log,) = work.glob("stbllm-*/subbit_log.jsonl")
        log_at_kill, (failed_at_kill,) = settled(log.read_text), read_results(out)
        failed, done = subbit.sweep(tiny("llama-gqa"), entries, out, protocol, keep=True)
    return Swept(folder, log_at_kill, failed_at_kill, failed, done)


def test_a_worker_is_a_process_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """The command that a sweep starts for a step, which the other tests here leave out."""
    sweep: Any = None
    task = Task("model", str(tiny("opt")), str(tmp_path / "facts.json"))
    assert sweep_module.run_task(sweep, task) is None
    facts = read_facts(tmp_path / "facts.json")
    assert facts["digest"] == model_digest(open_source(tiny("opt")))
    assert facts["bits"]["stored"] == 32


def test_an_entry_that_does_not_fit_the_model_is_recorded(swept: Swept) -> None:
    """With the one line of its worker, and not run again after the kill."""
    assert swept.failed["status"] == "failed"
    assert "matches no linear" in swept.failed["error"]
    assert "\n" not in swept.failed["error"]
    assert swept.failed == swept.failed_at_kill


def test_a_result_has_all_that_a_table_needs(swept: Swept, text_file: Path) -> None:
    """Bits, bytes, perplexity with its protocol, errors, times, memory, versions; no folder of this machine."""
    done = swept.done
    assert done["status"] == "done"
    assert done["bits"]["nominal"] < done["bits"]["stored"] < 16
    assert done["bytes"]["file"] == sum(value for name, value in done["bytes"].items() if name != "file")
    perplexity = done["perplexity"][text_file.name]
    assert perplexity["standard_error"] > 0
    assert "32-token windows, no overlap, 3 windows" in perplexity["protocol"]
    assert len(done["layer_errors"]) == 3
    assert 0 < done["output_error"] < 1
    assert done["seconds"]["compress"] > 0
    assert 50e6 < done["peak_bytes"]["compress"] < 4e9
    assert set(done["versions"]) == {"subbit", "torch", "transformers", "python"}
    assert done["machine"]["threads"] >= 1
    assert done["model"]["name"] == Path(done["model"]["name"]).name
    assert str(text_file.parent) not in json.dumps({**done, "recipe": None})


def test_a_killed_sweep_goes_on_with_the_layer_it_was_at(swept: Swept) -> None:
    """SIGKILL of the sweep takes the worker along; the second run starts no checkpoint anew."""
    log = (swept.checkpoint / "subbit_log.jsonl").read_text()
    assert log.startswith(swept.log_at_kill)
    events = [json.loads(line) for line in log.splitlines()]
    assert [event["event"] for event in events].count("start") == 1
    layers = [event["index"] for event in events if event["event"] == "layer"]
    assert sorted(set(layers)) == [0, 1, 2]
    assert len(layers) <= 4


def test_a_sweep_finds_what_compress_and_evaluate_find(
    swept: Swept, checkpoint_of: Callable[..., Path], text_file: Path
) -> None:
    """The same perplexity, bits and error as without a sweep and without a kill."""
    out = checkpoint_of("llama-gqa", "stbllm")
    expected = subbit.evaluate(out, [str(text_file)], seq_len=32, max_windows=3)[str(text_file)]
    found = swept.done["perplexity"][text_file.name]
    assert (found["value"], found["standard_error"]) == (expected.value, expected.standard_error)
    facts = subbit.inspect(out)
    assert swept.done["bits"] == facts["bits"]
    assert swept.done["layer_errors"] == [layer["error"] for layer in facts["layers"]]


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def under_way(checkpoint: Path) -> bool:
    """Whether a layer is done; not while the state cannot be read."""
    try:
        state = json.loads((checkpoint / ".subbit" / "state.json").read_text())
    except (OSError, ValueError):
        return (checkpoint / "config.json").exists()  # a fast machine: all of them
    return bool(state["layers"])


def settled(read: Callable[[], str]) -> str:
    """What a file holds when nobody writes it any more: the worker of a killed sweep ends with it."""
    time.sleep(0.5)
    before = read()
    time.sleep(1.5)
    assert read() == before
    return before


def test_unpacked_linears_compute_the_same(checkpoint_of: Callable[..., Path]) -> None:
    """Up to rounding, with the head and the embedding left packed."""
    model, _ = load_any(checkpoint_of("qwen2", "stbllm", embeddings="8bit"), torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        packed = model(ids).logits
        unpack_linears(model, torch.float32)
        assert not any(type(module).__name__ == "SubbitLinear" for module in model.modules())
        torch.testing.assert_close(model(ids).logits, packed, rtol=1e-4, atol=1e-4)


# ---- the table and the figures ---------------------------------------------------------------------------------------


def result_of(
    name: tuple[str, str],
    values: dict[str, Any] | None,
    perplexity: dict[str, float],
    bits: tuple[float, float] = (0.6, 2.8),
    group: str = "sweep",
    baseline: str | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """One entry of a results file."""
    recipe = Recipe.create(values).to_dict() if values else None
    place = {"group": group, "series": name[0], "label": name[1], "baseline": baseline}
    return {
        "key": f"{name} {values}",
        "status": "failed" if error else "done",
        "error": error,
        "places": [place],
        "model": {"name": "Llama", "digest": "d"},
        "recipe": recipe,
        "seed": recipe["calibration"]["seed"] if recipe else None,
        "protocol": {"split": "test", "seq_len": 2048, "max_windows": 20, "dtype": "float32", "datasets": []},
        "perplexity": {dataset: measured(value) for dataset, value in perplexity.items()},
        **(size(*bits) if not error else {"bits": None, "bytes": None}),
        "output_error": 0.05 if recipe and not error else None,
        "seconds": {"compress": 90.0 if recipe else None, "evaluate": 2.0},
        "peak_bytes": {"compress": 1_500_000_000 if recipe else None, "evaluate": 1},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Dense, a method at two N:M with two seeds, a collapsed one, ablations, a failure."""
    out = tmp_path / "results.json"
    stbllm, changed = {"method": "stbllm"}, {"method": "stbllm", "options": {"salient_columns": 0}}
    worse = {"method": "stbllm", "options": {"compensation": "off"}}
    for result in (
        result_of(("dense", ""), None, {"wikitext2": 20.0, "c4": 30.0}, (16, 16)),
        result_of(("stbllm", "4:8"), stbllm, {"wikitext2": 100.0, "c4": 150.0}),
        result_of(("stbllm", "4:8"), {**stbllm, "calibration": {"seed": 1}}, {"wikitext2": 121.0, "c4": 150.0}),
        result_of(("stbllm", "6:8"), {**stbllm, "sparsity": "6:8"}, {"wikitext2": 80.0}, (0.9, 3.1)),
        result_of(("rtn", "1 bit"), {"method": "rtn", "options": {"bits": 1}}, {"wikitext2": 2.5e6}, (1, 1.25)),
        result_of(("no salient columns", ""), changed, {"wikitext2": 132.0}, group="ablations", baseline="stbllm 4:8"),
        result_of(("no compensation", ""), worse, {"wikitext2": 550.0}, group="ablations", baseline="stbllm 4:8"),
        result_of(("codes", "0.1 bits"), {"method": "codes"}, {}, error="0.1 stored bits cannot be reached"),
    ):
        record(out, result)
    return out


def test_the_table(results: Path) -> None:
    """Seeds merged, ablations related to their baseline, failures with their reason, the protocol in words."""
    text = subbit.compare([results])
    assert "Perplexity: test text, at most 20 windows of 2048 tokens without overlap, float32." in text
    assert "| dense | 16 | 16 | 17 | 2.0 | – | 20.00 ± 2.00 | 30.00 ± 3.00 | – | – |" in text
    row = "| stbllm 4:8 | 0.600 | 2.800 | 3.800 | 2.0 | 0.0500 | 110.0 ± 11.0 (100.0 … 121.0, 2 seeds) |"
    assert row in text
    assert "| rtn 1 bit | 1.000 | 1.250 | 2.250 | 2.0 | 0.0500 | 2,500,000 ± 250,000 | – | 1.5 | 1.50 |" in text
    assert "| no salient columns | 0.600 | 2.800 | 3.800 | 2.0 | 0.0500 | 132.0 ± 13.2 | +20 % | 1.5 | 1.50 |" in text
    assert "| 550.0 ± 55.0 | 5.0 × |" in text
    assert "- codes 0.1 bits: 0.1 stored bits cannot be reached" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ") and "wikitext2" in line}
    assert widths == {11}


def test_seeds_are_merged_across_versions(results: Path) -> None:
    """A run that was recorded when recipes had fewer fields is a seed like any other."""
    old = json.loads(results.read_text())
    for result in old["results"]:
        if result["seed"] == 0:
            del result["recipe"]["allocation"]["spread"]
    results.write_text(json.dumps(old))
    assert "110.0 ± 11.0 (100.0 … 121.0, 2 seeds)" in subbit.compare([results])


def test_results_that_cannot_be_compared_stay_apart(results: Path, tmp_path: Path) -> None:
    """Another model or protocol is another section, also from another file; equal results are not doubled."""
    other = tmp_path / "other.json"
    longer = result_of(("stbllm", "4:8"), {"method": "stbllm"}, {"wikitext2": 90.0})
    record(other, {**longer, "key": "x", "protocol": {**longer["protocol"], "max_windows": None}})
    record(other, {**longer, "key": "y", "model": {"name": "Qwen", "digest": "e"}})
    sections = read_sections([results, other, results])
    assert [(section.model, len(section.rows)) for section in sections] == [("Llama", 7), ("Llama", 1), ("Qwen", 1)]
    assert "all windows of the text" in markdown(sections)


def test_numbers_as_people_write_them() -> None:
    """Three digits or so."""
    assert [short(value) for value in (9.876, 345.67, 12345.6, 2.5e8, math.inf)] == [
        "9.88",
        "345.7",
        "12,346",
        "2.5e+08",
        "∞",
    ]
    assert [change(value) for value in (1.034, 0.876, 2.5)] == ["+3.4 %", "−12 %", "2.5 ×"]


def test_the_figures(results: Path, tmp_path: Path) -> None:
    """A curve for every data set, with the published one beside it, and the ablations; equal results, equal files."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "report"
    text = subbit.compare([results], out, published=PUBLISHED_FILE)
    assert (out / "comparison.md").read_text() == text
    curves = [f"perplexity-{dataset}.{kind}" for dataset in ("c4", "wikitext2") for kind in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"ablations-wikitext2.{kind}" for kind in ("png", "svg")),
        "comparison.md",
        *curves,
    ]
    curve = (out / "perplexity-wikitext2.svg").read_text()
    for words in ("What a bit buys", "stbllm 6:8", "dense, 16 bits: 20.00", "1 bit ↑ 2,500,000", "PBS²P 6:8"):
        assert words in curve
    assert "20 windows of 2048 tokens without overlap" in curve
    ablations = (out / "ablations-wikitext2.svg").read_text()
    assert "132.0  (+20 %)" in ablations
    assert (out / "perplexity-wikitext2.png").read_bytes().startswith(b"\x89PNG")
    subbit.compare([results], tmp_path / "again", published=PUBLISHED_FILE)
    assert (tmp_path / "again" / "perplexity-wikitext2.svg").read_text() == curve


def test_checkpoints_beside_each_other(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Bits, bytes and error; a figure of the error, since nothing was evaluated; with facts the perplexity as well."""
    for sparsity in ("4:8", "6:8"):
        shutil.copytree(checkpoint_of("opt", "stbllm", sparsity=sparsity), tmp_path / f"at-{sparsity[0]}")
    sources = [tmp_path / "at-4", tmp_path / "at-6"]
    has_figures = importlib.util.find_spec("matplotlib") is not None
    text = subbit.compare(sources, tmp_path / "report", figures=has_figures)
    facts = subbit.inspect(sources[0])
    assert f"| at-4 | {facts['bits']['nominal']:.3f} | {facts['bits']['stored']:.3f} |" in text
    assert "| at-6 |" in text
    assert (tmp_path / "report" / "output-error.svg").exists() == has_figures
    save_facts(Task("evaluate", "", str(facts_file(sources[0]))), perplexity={"k": measured(123.0)})
    text = subbit.compare(sources)
    assert "perplexity, wikitext2 test (20 × 2048 tokens, float32)" in text
    assert "| 123.0 ± 12.3 |" in text


def recorded(dataset: str = "wikitext2", value: float = 50.0, **protocol: Any) -> list[Measurement]:
    """Perplexity and divergence on one text, as ``subbit eval --reference`` leaves them."""
    how = {"dataset": dataset, "split": "test", "origin": f"{dataset} test", "windows": 20, "seq_len": 2048}
    how |= {"stride": 2048, "dtype": "float32", "backend": "torch", **protocol}
    divergence = {"mean": 0.5, "standard_error": 0.02, "top1": 0.625, "top1_standard_error": 0.01}
    return [
        Measurement("perplexity", how, {"value": value, "standard_error": 5.0, "nll": math.log(value)}),
        Measurement("divergence", {**how, "reference": "SmolLM2", "reference_digest": "01"}, divergence),
    ]


def accuracy(items: int, share: float, **protocol: Any) -> Measurement:
    """Of ARC-Easy."""
    how = {"task": "arc_easy", "items": items, "items_in_all": 2376, "dtype": "float32", "harness": "lm-eval 0.4"}
    values = {"accuracy": share, "standard_error": 0.01, "accuracy_norm": None, "chance": 0.25}
    return Measurement("zero_shot", {**how, **protocol}, values)


@pytest.fixture
def two(checkpoint_of: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints to record measurements of."""
    first = Path(shutil.copytree(checkpoint_of("opt", "stbllm", sparsity="4:8"), tmp_path / "one"))
    return first, Path(shutil.copytree(first, tmp_path / "two"))


def cells_of(text: str, title: str) -> list[str]:
    """The line of a table that begins with a title."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_what_was_measured_stands_beside_the_sizes(two: tuple[Path, Path]) -> None:
    """Perplexity in the table of sizes; divergence and accuracies below it, with error and what guessing gives."""
    record_evaluation(two[0], [*recorded(), accuracy(2376, 0.5)])
    record_evaluation(two[1], [*recorded(value=80.0, backend="native"), accuracy(2376, 0.25)])
    text = subbit.compare(two)
    assert text.count("perplexity, ") == 1
    assert cells_of(text, "one")[5] == "50.00 ± 5.00"
    assert cells_of(text, "two")[5] == "80.00 ± 5.00"
    place = "wikitext2 test (20 × 2048 tokens, float32) against SmolLM2"
    assert cells_of(text, f"KL divergence, nats a token, {place}") == ["0.500 ± 0.020"] * 2
    assert cells_of(text, f"same top token, %, {place}") == ["62.5 ± 1.0"] * 2
    assert cells_of(text, "accuracy, %, arc_easy (2376 items), guessing 25.0") == ["50.0 ± 1.0", "25.0 ± 1.0"]
    assert "length-normalized" not in text
    assert "compare down a column only" not in text


@pytest.mark.parametrize(
    ("protocol", "title"),
    [
        ({"windows": 8}, "wikitext2 test (8 × 2048 tokens, float32)"),
        ({"dtype": "bfloat16"}, "wikitext2 test (20 × 2048 tokens, bfloat16)"),
        ({"origin": "the hub"}, "wikitext2 test (20 × 2048 tokens, float32); origin: the hub"),
    ],
)
def test_ways_of_measuring_are_not_mixed(two: tuple[Path, Path], protocol: dict[str, Any], title: str) -> None:
    """Another number of windows, another dtype, another copy of the text: columns and lines of their own."""
    record_evaluation(two[0], [*recorded(), accuracy(2376, 0.5)])
    record_evaluation(two[1], [*recorded(value=80.0, **protocol), accuracy(100, 0.25)])
    text = subbit.compare(two)
    assert f"perplexity, {title} |" in text
    assert cells_of(text, "one")[5:7] == ["50.00 ± 5.00", "–"]
    assert cells_of(text, "two")[5:7] == ["–", "80.00 ± 5.00"]
    assert cells_of(text, "accuracy, %, arc_easy (first 100 of 2376 items), guessing 25.0") == ["–", "25.0 ± 1.0"]
    assert "compare down a column only" in text


def test_two_checkpoints_of_one_name_are_two(two: tuple[Path, Path], tmp_path: Path) -> None:
    """They go by their paths, in the table and in the figure, which says how they were measured; repetitions go."""
    pytest.importorskip("matplotlib")
    places = [tmp_path / folder / "model" for folder in ("a", "b")]
    for source, place, value in zip(two, places, (50.0, 80.0), strict=True):
        shutil.copytree(source, place)
        record_evaluation(place, recorded(value=value))
    text = subbit.compare([*places, places[0]], tmp_path / "report")
    assert text.count("| 50.00 ± 5.00 |") == text.count("| 80.00 ± 5.00 |") == 1
    (curve,) = (tmp_path / "report").glob("*.svg")
    shown = " ".join(re.findall(r">([^<>]+)</text>", curve.read_text()))
    assert all(str(place) in text and str(place) in shown for place in places)
    assert "wikitext2 test (20 × 2048 tokens, float32), windows without overlap; bars" in shown


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [(None, "does not exist"), ("[", "cannot be read as JSON"), ("{}", "is not of the form of")],
)
def test_a_wrong_file_of_published_numbers(
    contents: str | None, complaint: str, two: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    """One line."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "published.json"
    if contents is not None:
        file.write_text(contents)
    assert_one_line(run("compare", *two, "--out", tmp_path / "report", "--published", file), complaint)


def test_the_newer_of_two_measurements_counts(two: tuple[Path, Path]) -> None:
    """What `subbit eval` says replaces what the sweep said in the same protocol; None is an infinite perplexity."""
    (perplexity, _) = recorded()
    record_evaluation(two[0], [dataclasses.replace(perplexity, values={"value": None, "standard_error": None})])
    swept = {**perplexity.protocol, **perplexity.values, "value": 123.0, "peak_bytes": 1, "protocol": "in words"}
    save_facts(Task("evaluate", "", str(facts_file(two[0]))), perplexity={"k": swept})
    assert cells_of(subbit.compare(two), "one")[5] == "∞"


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sweep", "MODEL", "-o", "OUT", "--methods", "luck"], "there is no method 'luck'"),
        (["sweep", "MODEL", "-o", "OUT", "--methods", ""], "at least one method and one seed"),
        (["sweep", "MODEL", "-o", "OUT", "--sparsity", "9:8"], "N must be between 1 and 7"),
        (["sweep", "MODEL", "-o", "OUT", "--seeds", "a"], "--seeds 'a' is not a comma-separated list of numbers"),
        (["sweep", "MODEL", "-o", "OUT", "--seeds", ""], "at least one method and one seed"),
        (
            ["sweep", "MODEL", "-o", "OUT", "--methods", "gptq", "--code-bits", "9"],
            "bits: Input should be 1, 2, 3 or 4",
        ),
        (["sweep", "MODEL", "-o", "OUT", "--dataset", "wikitext3"], "unknown data set 'wikitext3'"),
        (["sweep", "MODEL", "-o", "OUT", "--entries", "no.yaml"], "cannot read the recipe no.yaml"),
        (["sweep", "MODEL", "-o", "OUT", "--effort", "all", "--methods", "codes"], "there is no effort 'all'"),
        (["sweep", "MODEL", "-o", "OUT", "--set", "colour=red"], "colour: there is no such field"),
        (["compare", "missing.json"], "missing.json does not exist"),
        (["compare", "MODEL"], "was not compressed by subbit"),
        (["compare", "EMPTY"], "there are no results in"),
        (["compare", "TEXT"], "is no results file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    arguments: list[str], complaint: str, run: Run, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    """Exit code 2, and no file."""
    empty = tmp_path / "empty.json"
    empty.write_text('{"subbit_sweep": 1, "results": []}')
    known = {"MODEL": tiny("opt"), "OUT": tmp_path / "out.json", "EMPTY": empty, "TEXT": text_file}
    assert_one_line(run(*(known.get(argument, argument) for argument in arguments)), complaint)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.json"]


def test_a_model_that_cannot_be_read_is_one_line(
    run: Run, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a worker that finds out; nothing is left behind."""
    monkeypatch.setattr(sweep_module, "run_task", lambda sweep, task: f"{task.model} does not exist")
    command = ["sweep", tmp_path / "none", "-o", tmp_path / "out.json", "--dataset", text_file]
    assert_one_line(run(*command), "does not exist")
    assert not list(tmp_path.iterdir())


def test_listing_runs_nothing(run: Run, tmp_path: Path) -> None:
    """One line an entry."""
    ran = run("sweep", "x", "-o", tmp_path / "out.json", "--methods", "dense,pbs2p", "--seeds", "0,1", "--list")
    assert ran.out.splitlines() == ["sweep: dense", "sweep: pbs2p 4:8", "sweep: pbs2p 4:8, seed 1"]
    assert not list(tmp_path.iterdir())


def test_sweep_and_compare_on_the_command_line(pretend: Pretended, run: Run, text_file: Path, tmp_path: Path) -> None:
    """The summary, exit code 1 if something failed, then the table."""
    out = tmp_path / "out.json"
    pretend.fails = {"rtn": "no"}
    ran = run("sweep", "x", "-o", out, "--methods", "dense,rtn,pbs2p", "--dataset", text_file)
    assert ran.code == 1
    assert ran.out.startswith(f"2 results in {out}, 1 failed\n")
    ran = run("compare", out)
    assert ran.code == 0
    assert "| pbs2p 4:8 | 0.600 | 3.000 |" in ran.out
    assert "- rtn 4 bits: no" in ran.out


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def test_the_papers_sweep_is_well_formed() -> None:
    """Every recipe of every group is valid, no name stands twice in a group, and each ablation changes something."""
    papers = benchmark("papers")
    args = argparse.Namespace(group=None, calibration="wikitext2", samples=128, seq_len=512, effort="fast", seeds=[0])
    entries: list[Entry] = papers.build_entries(args)
    names = [(entry.group, entry.name) for entry in entries]
    assert len(set(names)) == len(names)
    assert set(papers.GROUPS) == {entry.group for entry in entries}
    recipes = {(entry.group, entry.name): entry.recipe for entry in entries}
    for entry in entries:
        if entry.baseline:
            assert recipes[entry.group, entry.baseline] not in (None, entry.recipe), entry.name
    ablations = [entry for entry in entries if entry.baseline]
    assert len({recipe_key(entry.recipe, "m") for entry in ablations}) == len(ablations)


@pytest.mark.parametrize("name", ["papers", "ablations"])
def test_recorded_results_are_those_of_the_recipes_of_today(name: str) -> None:
    """With another key, all of them would be run again."""
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["results"]
    assert len(results) > 30
    for result in results:
        measured = {**result["protocol"], "datasets": tuple(result["protocol"]["datasets"])}
        recipe = result["recipe"] and Recipe.create(result["recipe"])
        assert entry_key(recipe, result["model"]["digest"], Protocol(**measured)) == result["key"]


def test_method_speed_measures_and_finds_the_growth() -> None:
    """Rows of every method with an error that shows that it worked."""
    speed = benchmark("method_speed")
    device = torch.device("cpu")
    rows = [row for size in (64, 128) for row in speed.measure(size, ["gptq", "codes"], 1, device)]
    grown = speed.with_growth(rows)
    assert [(row["method"], row["size"]) for row in grown] == [
        (name, size) for size in (64, 128) for name in ("inverse factor", "gptq", "codes")
    ]
    assert all(0 < row["output_error"] < 1 for row in grown if row["method"] != "inverse factor")
    assert [row["growth"] is None for row in grown] == [True] * 3 + [False] * 3
    assert all(row["peak_bytes"] >= row["bytes_before"] > 0 for row in grown)
    assert speed.bars_met(grown) == {}
    slow = [{"method": name, "size": 4096, "seconds": 31.0} for name in ("inverse factor", "stbllm", "billm")]
    assert {name: bar["met"] for name, bar in speed.bars_met(slow).items()} == {"stbllm": True, "billm": False}


def test_real_linears_keep_their_statistics(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """In a file that says what they are of; clipped and unclipped Grams are of the same tokens."""
    real, kept = benchmark("real_linears"), tmp_path / "grams.safetensors"

    def linears(*more: str) -> Any:
        parser = argparse.ArgumentParser()
        real.add_arguments(parser)
        names = ["--linears", "0.k_proj", "2.down_proj", "--statistics", str(kept)]
        counts = ["--samples", "2", "--seq-len", "32", "--calibration", str(text_file)]
        with torch.inference_mode():
            return real.real_linears(parser.parse_args([str(tiny("llama-gqa")), *counts, *names, *more]), [0.0, 1.0])

    first, again = linears(), linears()
    assert [(one.name, tuple(one.weight.shape)) for one in first] == [
        ("0.k_proj", (32, 64)),
        ("2.down_proj", (64, 128)),
    ]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.grams[1.0], other.grams[1.0])
        assert float(one.grams[1.0].trace()) < float(one.grams[0.0].trace())
    with pytest.raises(SystemExit, match="other arguments"):
        linears("--samples", "3")


def test_errors_against_the_literal_code(tmp_path: Path) -> None:
    """At the same setting they agree, and a run goes on where it was."""
    literal, claims = benchmark("literal_error"), benchmark("order_claims")
    linear = claims.synthetic_linear("inputs", 0)
    weight, gram = linear.weight[:8, :128], linear.grams[0.0][:128, :128]
    for name in ("billm", "stbllm 4:8", "arb x"):
        found = literal.compare(weight, gram, literal.CASES[name])
        assert 0 < found["ours"] < 1
        assert found["as_written"] == pytest.approx(found["literal"], rel=1e-3)
    args = argparse.Namespace(json=tmp_path / "literal.json", rows=8, cases=["billm"], statistics=None)
    results = {"billm": {"0.k_proj": {"literal": 0.2, "as_written": 0.22, "ours": 0.1}}, "arb x": {}}
    literal.write(args, results)
    assert literal.read(args) == results
    assert json.loads(args.json.read_text())["summary"]["billm"]["as_written_at_worst"] == pytest.approx(0.1)
    with pytest.raises(SystemExit, match="other arguments"):
        literal.read(argparse.Namespace(**{**vars(args), "rows": 9}))


def test_the_orders_that_are_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim in each of its settings; steps change nothing unless scores are taken again."""
    claims = benchmark("order_claims")
    monkeypatch.setattr(claims, "ROWS", 16)
    monkeypatch.setattr(claims, "COLUMNS", 128)
    linears = [claims.synthetic_linear("plain", seed) for seed in range(2)]
    rows = [row for linear in linears for row in claims.claims_of(linear, 0.0, Sparsity(4, 8))]
    table = claims.summary(rows)
    assert len(table) == sum(len(claim.settings) for claim in claims.CLAIMS)
    assert all(row["linears"] == 2 and 0 < row["better"] < 1 for row in table)
    [steps] = [row for row in table if row["claim"].endswith("at once") and row["setting"] == "written"]
    assert (steps["equal"], steps["holds"]) == (2, 0)


def test_the_published_numbers_fit_together() -> None:
    """Every point has every model, and stored bits belong to a point."""
    published = json.loads(PUBLISHED_FILE.read_text())
    names = {f"{point['method']} {point['label']}" for point in published["points"]}
    assert set(published["stored_bits"]) - {"source"} <= names
    assert all(set(point["perplexity"]) == set(published["dense"]) for point in published["points"])


def test_held_out_windows_share_no_token_with_calibration(tmp_path: Path) -> None:
    """The windows that a run of the recipe draws from the second of two texts are found again, and avoided."""
    held_out = benchmark("held_out_text")
    values = {
        "method": "codes",
        "calibration": {"source": f"first.txt,{tmp_path}/second.txt", "samples": 9, "seq_len": 16, "seed": 3},
        "distillation": {"steps": 1, "samples": 7, "seq_len": 8, "held_out": 2},
    }
    tokens = 1000
    ids = torch.arange(tokens)
    drawn = [sample_windows(ids, 4, 16, 3), distinct_windows(ids, 3, 8, 4, 1)]
    used = {int(position) for windows in drawn for position in windows.flatten()}
    seen = held_out.touched(Recipe.create(values), "elsewhere/second.txt", tokens)
    assert set(seen.nonzero().flatten().tolist()) == used
    windows = held_out.untouched_windows(seen, 20, 3)
    assert windows.shape == (3, 20)
    assert used.isdisjoint(windows.flatten().tolist())
    assert int(windows.diff(dim=1).unique()) == 1
    with pytest.raises(SystemExit, match="were never seen"):
        held_out.untouched_windows(seen, 20, 50)
