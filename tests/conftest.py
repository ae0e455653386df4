"""What all tests share: one thread, no network, and small things to compress and to calibrate on."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers is imported: a test that asks the hub for something is wrong, and must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Some tests fork; the tokenizers library would warn about its threads in the child.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from commands import Ran, Run
from families import save_tiny

import subbit
from subbit import Recipe
from subbit.cli import main

# Little of every search, for tests of what becomes of its result; tests of a method give their own options.
SEARCH = {"candidates": 8, "salient_columns": 8}
QUICK: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("stbllm", "billm", "stbllm-as-released"), SEARCH),
    "pbs2p": {**SEARCH, "steps": 1},
    "arb": {**SEARCH, "iterations": 3, "output_iterations": 3},
    "codes": {"sweeps": 1},
}
TEXT = "the river runs past an old mill and into sea she counted boats harbour rain streets bright model small"


def pytest_configure(config: pytest.Config) -> None:
    """One thread: tiny matrices are slower on many, and the order of float additions is the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare what is stored: the native kernels round their tables (tests/test_native.py)."""
    monkeypatch.setenv("SUBBIT_NATIVE", "0")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("inspect", directory, …)``: the command line in this process."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["subbit", *map(str, arguments)])
        capsys.readouterr()  # what was said before
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of evaluation text, $SUBBIT_DATA or ../shared/data beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("SUBBIT_DATA") or default)
    if not root.is_dir():
        pytest.skip(f"no text data at {root}; set SUBBIT_DATA to a folder with wikitext2/test.txt")
    return root


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt of 600 words in random order: thousands of tokens for the tiny tokenizer, the same in every run."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(random.Random(0).choices(TEXT.split(), k=600)))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(family)``: the directory of a tiny model of a family, saved once a session. Tests must not change it."""
    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return saved[family]

    return save


@pytest.fixture(scope="session")
def recipe_for(text_file: Path) -> Callable[..., Recipe]:
    """``recipe_for(method, **fields)``: a recipe that calibrates on four windows of 32 tokens of ``text_file``.

    With the ``options`` of ``QUICK`` where ``fields`` says nothing else.
    """

    def build(method: str = "pbs2p", **fields: Any) -> Recipe:
        calibration = {"source": str(text_file), "samples": 4, "seq_len": 32, "precision": "float32"}
        calibration |= fields.pop("calibration", {})
        options = {**QUICK.get(method, {}), **fields.pop("options", {})}
        return Recipe.create({"method": method, "calibration": calibration, "options": options, **fields})

    return build


@pytest.fixture(scope="session")
def checkpoint_of(
    tiny: Callable[[str], Path], recipe_for: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``checkpoint_of(family, method, **fields)``: what ``recipe_for(method, **fields)`` makes of a tiny model.

    Compressed once a session. Tests must not change it; ``shutil.copytree`` gives one to break.
    """
    done: dict[tuple[str, str], Path] = {}

    def compress(family: str, method: str = "pbs2p", **fields: Any) -> Path:
        recipe = recipe_for(method, **fields)
        key = family, recipe.to_yaml()
        if key not in done:
            out = tmp_path_factory.mktemp("checkpoint") / family
            subbit.compress(tiny(family), recipe, out)
            done[key] = out
        return done[key]

    return compress
