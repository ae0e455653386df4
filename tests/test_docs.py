"""What the documentation says is so: links lead somewhere, quoted messages exist, commands and Python run.

Run with `pytest tests/test_docs.py`. The commands of README.md and docs/tutorial.md run one after the other in a folder
of their own, on a tiny random model that has the names that the pages use; only the amount of work is made small.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_zero_shot
import typer
from conftest import QUICK

import subbit
from subbit import Recipe
from subbit.cli import app, main
from subbit.comparison import sweep as sweep_module
from subbit.comparison import worker
from subbit.comparison.tasks import Task
from subbit.evaluation import bench as bench_module
from subbit.evaluation import bench_worker

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IN_ORDER = ["README.md", "docs/tutorial.md"]  # their commands follow each other, as a reader would type them
MODELS = ["MODEL", "path-or-hub-id", "SmolLM2-135M-Instruct"]  # what the pages call a dense model
NOT_RUN = {
    "push OUT ORGANIZATION/NAME": "uploads to the hub",
    "push smol-codes somebody/smol-codes": "uploads to the hub",
    "compress HuggingFaceTB/SmolLM2-135M-Instruct -o smol-hub": "downloads from the hub",
    "compress model.gguf -o smol-gguf": "needs a GGUF file",
}
FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """As in IN_ORDER."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in some languages; "" is a fence without one."""
    for _, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def commands(page: Path) -> list[list[str]]:
    """The arguments of every line of a page that begins with ``subbit``; a backslash joins two lines."""
    lines = [line for text in blocks(page, "", "bash") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("subbit ")]


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What can stand behind a # in a link to a page, as GitHub and the site make them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    documented = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {*documented} | {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is to a file of the repository, every anchor to a heading."""
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_the_whole_api_is_listed() -> None:
    """docs/api.md has an entry for every public name, so that mkdocstrings shows it."""
    listed = set(re.findall(r"^::: subbit\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert listed == set(subbit.__all__) - {"__version__"}


# ---- messages --------------------------------------------------------------------------------------------------------


def templates() -> list[str]:
    """Every text of the source, with … where a value is put in."""
    found = []
    for file in (ROOT / "src" / "subbit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_exist() -> None:
    """Every entry of docs/troubleshooting.md begins with a message, which is in the source word for word."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*(?:``? ?)(.+?)(?: ?``?)\*\*$", text, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"^\*\*", text, re.MULTILINE))
    assert len(quoted) >= 50
    known = templates()
    assert [message for message in quoted if not any(message in template for template in known)] == []


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_can_be_parsed(page: Path) -> None:
    """Every subcommand and every option exists, and takes a value of that kind."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in commands(page):
        known[name].make_context(name, arguments)


def test_what_is_not_run_is_shown() -> None:
    """The list of exceptions has no stale entry."""
    shown = {shlex.join(command) for page in IN_ORDER for command in commands(ROOT / page)}
    assert set(NOT_RUN) <= shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    """What a page says of make is in the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {one or other for one, other in named} <= targets


def small(recipe: Recipe) -> Recipe:
    """The same with little text and little search: two windows of 16 tokens, one step of each tuning.

    A budget gets half a bit more: scales weigh more in a narrow model, and 0.9 bits cannot be reached.
    """
    values: dict[str, Any] = recipe.to_dict()
    values["bits"] = values["bits"] and values["bits"] + 0.5
    values["calibration"] |= {"samples": 2, "seq_len": 16}
    values["options"] |= QUICK.get(recipe.method, {})
    for tuning in ("reconstruction", "distillation"):
        values[tuning] |= {"steps": min(1, values[tuning]["steps"]), "batch": 1}
    values["distillation"] |= {"held_out": 0}
    return Recipe.create(values)


def in_this_process(run: sweep_module.Sweep, task: Task) -> None:
    """A step of a sweep without a process of its own."""
    worker.KINDS[task.kind](task)


@pytest.fixture
def desk(tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and texts that the pages name; compressing and measuring are made small."""
    for name in MODELS:
        shutil.copytree(tiny("llama-mha"), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    data = tmp_path / "data"
    test_zero_shot.write_files(data)
    (data / "wikitext2").mkdir()
    for file in (data / "wikitext2" / "test.txt", data / "wikitext2" / "valid.txt", tmp_path / "my-text.txt"):
        file.write_text(3 * text_file.read_text())
    monkeypatch.setenv("SUBBIT_DATA", str(data))
    monkeypatch.chdir(tmp_path)
    compress, evaluate = subbit.compress, subbit.evaluate_all

    def compress_small(model: str, recipe: Recipe, out: Path, **more: Any) -> object:
        return compress(model, small(recipe), out, **more)

    def evaluate_small(*args: Any, **more: Any) -> subbit.Evaluation:
        return evaluate(*args, **{**more, "seq_len": 32, "max_windows": 2})

    for module in (subbit, worker):
        monkeypatch.setattr(module, "compress", compress_small)
    monkeypatch.setattr(subbit, "evaluate_all", evaluate_small)
    monkeypatch.setattr(sweep_module, "run_task", in_this_process)
    monkeypatch.setattr(bench_module, "run_worker", bench_worker.measure)
    return tmp_path


def type_in(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run ``subbit`` with some arguments; its exit code. What a person would say to ``chat`` is on standard input."""
    monkeypatch.setattr(sys, "argv", ["subbit", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river\n/exit\n"))
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("page", IN_ORDER)
def test_commands_run(
    page: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in one folder, in their order, then the Python of the page."""
    for command in commands(ROOT / page):
        if shlex.join(command) not in NOT_RUN:
            assert type_in(command, monkeypatch) == 0, (command, capsys.readouterr().err)
    for text in blocks(ROOT / page, "python"):
        exec(compile(text, page, "exec"), {"__name__": "__main__"})
