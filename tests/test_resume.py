"""A run that is killed at any moment goes on where it was, and the files in the end are those of an undisturbed run.

Most runs here are forks of the test process that kill themselves with SIGKILL just before, or in the middle of, a
chosen change to the output directory: deterministic, and much faster than starting Python anew.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Lines
from families import VOCABULARY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import subbit
from subbit import CheckpointError, Recipe, UserError
from subbit.checkpoint import files
from subbit.checkpoint.lock import LOCK_FILE
from subbit.checkpoint.reader import open_checkpoint

Recipes = Callable[..., Recipe]
LAYERS = 3
LOG = "subbit_log.jsonl"


def smallest_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A llama that compresses in a fraction of a second."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = LlamaConfig(**{**shape, **changes}, vocab_size=VOCABULARY, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    save_model(smallest_model(), directory)
    return directory


@pytest.fixture(scope="module")
def recipe(recipe_for: Recipes) -> Recipe:
    return recipe_for("pbs2p", calibration={"samples": 2, "seq_len": 8}, options={"candidates": 4})


@pytest.fixture(scope="module")
def undisturbed(source: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subbit.compress(source, recipe, out)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory but the log, whose lines carry times, and the lock, which names a process."""
    paths = [path for path in directory.rglob("*") if not path.is_dir() and path.name not in (LOG, LOCK_FILE)]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def layers_done_twice(directory: Path) -> int:
    """From the log: how many decoder layers have linears that were compressed more than once; never more than twice."""
    entries = [json.loads(line) for line in (directory / LOG).read_text().splitlines()]
    counts = Counter(entry["name"] for entry in entries if entry["event"] == "linear")
    assert len(counts) == 7 * LAYERS
    assert max(counts.values()) <= 2
    return len({name.split(".")[2] for name, count in counts.items() if count > 1})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(action: Callable[[], object]) -> bool:
    """Run ``action`` in a copy of this process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run in the fork failed by itself"
    return os.WIFSIGNALED(status)


def die_before_change(directory: Path, number: int) -> None:
    """Kill this process just before the ``number``-th change to the tree at ``directory``, counted from 0."""
    changes = itertools.count()
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changing = isinstance(args[2], int) and bool(args[2] & flags)
        else:
            changing = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if not changing or isinstance(args[0], int):
            return
        path = os.fsdecode(args[0])
        inside = path.startswith(str(directory)) or not os.path.isabs(path)  # rmtree removes relative to a descriptor
        if inside and next(changes) == number:
            die()

    sys.addaudithook(watch)


def die_in_write(number: int) -> None:
    """Kill this process when half of the ``number``-th file is on the disk, counted from 0."""
    writes = itertools.count()
    sync = os.fsync

    def half(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and next(writes) == number:  # directories are synchronized too
            os.ftruncate(descriptor, status.st_size // 2)
            die()
        sync(descriptor)

    files.os.fsync = half  # type: ignore[attr-defined]


def check_resumed(source: Path, recipe: Recipe, out: Path, undisturbed: Path) -> Lines:
    """Whatever is at ``out`` either is whole or is refused, and resuming makes it what an undisturbed run writes."""
    if (out / "config.json").exists():
        try:
            open_checkpoint(out).check_contents()
        except CheckpointError:
            assert (out / ".subbit" / "state.json").exists()
    elif out.exists():
        with pytest.raises(CheckpointError):
            subbit.load(out)
    progress = Lines()
    subbit.compress(source, recipe, out, resume=True, progress=progress)
    assert contents(out) == contents(undisturbed)
    assert layers_done_twice(out) <= 1
    return progress


# ---- killed at any moment --------------------------------------------------------------------------------------------


def killed_before_every_change(
    source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path, every: int, first: int
) -> int:
    """Returns how many changes to the output directory a run makes."""
    for number in itertools.count(first, every):
        out = tmp_path / f"killed-{number}"

        def run(out: Path = out, number: int = number) -> None:
            die_before_change(out, number)
            subbit.compress(source, recipe, out)

        killed = in_a_fork(run)
        check_resumed(source, recipe, out, undisturbed)
        if not killed:
            return number
    raise AssertionError


def test_killed_before_a_change(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """Every thirteenth change to the output directory: opening, renaming and deleting files, making directories."""
    assert killed_before_every_change(source, recipe, undisturbed, tmp_path, every=13, first=2) > 50


@pytest.mark.slow
def test_killed_before_every_change(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """All of them."""
    killed_before_every_change(source, recipe, undisturbed, tmp_path, every=1, first=0)


def test_killed_at_the_end(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """Once config.json is there the checkpoint is whole, though what the run needed is not deleted yet."""

    def run(name: str) -> bool:
        def action() -> None:
            def watch(event: str, args: tuple[Any, ...]) -> None:
                if event == "os.remove" and os.fsdecode(args[0]).endswith(name):
                    die()

            sys.addaudithook(watch)
            subbit.compress(source, recipe, tmp_path / name)

        return in_a_fork(action)

    assert run("state.json")
    assert {**contents(tmp_path / "state.json"), **contents(undisturbed)} == contents(tmp_path / "state.json")
    check_resumed(source, recipe, tmp_path / "state.json", undisturbed)
    assert run("windows.safetensors")
    assert (tmp_path / "windows.safetensors" / ".subbit").is_dir()
    progress = check_resumed(source, recipe, tmp_path / "windows.safetensors", undisturbed)
    assert progress.lines == [f"{tmp_path / 'windows.safetensors'} is already complete"]


@pytest.mark.parametrize("number", [0, 2, 3, 8, 14, 16])
def test_killed_in_the_middle_of_a_file(
    number: int, source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """Of the seventeen: windows, hidden states, state, shards, index, recipe, manifest, config; half never counts."""

    def run() -> None:
        die_in_write(number)
        subbit.compress(source, recipe, tmp_path / "out")

    assert in_a_fork(run)
    assert [path for path in tmp_path.rglob("*.partial") if path.stat().st_size]
    check_resumed(source, recipe, tmp_path / "out", undisturbed)


def test_killed_again_and_again(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """Every run does one more layer, then is killed."""

    def react(text: str) -> None:
        if text.startswith("layer "):
            die()

    for _ in range(LAYERS):
        assert in_a_fork(lambda: subbit.compress(source, recipe, tmp_path / "out", resume=True, progress=Lines(react)))
    progress = check_resumed(source, recipe, tmp_path / "out", undisturbed)
    assert progress.lines == [f"resuming: {LAYERS} of {LAYERS} layers are done"]
    assert layers_done_twice(tmp_path / "out") == 0


def test_a_process_killed_from_outside(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """The command line as a process of its own, killed when its first layer has been announced."""
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "subbit.cli", "compress", str(source), "--recipe", str(tmp_path / "recipe.yaml")]
    command += ["--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: threads change the last bits of sums
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        assert any(line.startswith("layer 1/3: ") for line in process.stderr)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    progress = check_resumed(source, recipe, tmp_path / "out", undisturbed)
    assert re.fullmatch(r"resuming: [123] of 3 layers are done", progress.lines[0])


# ---- what resume refuses ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_run(source: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its second layer."""
    out = tmp_path_factory.mktemp("killed") / "out"

    def react(text: str) -> None:
        if text.startswith("layer 2/"):
            die()

    assert in_a_fork(lambda: subbit.compress(source, recipe, out, progress=Lines(react)))
    return out


@pytest.fixture
def unfinished(killed_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, for a test to go on with."""
    return Path(shutil.copytree(killed_run, tmp_path / "unfinished"))


def refused(source: Path, recipe: Recipe, out: Path, resume: bool = False, overwrite: bool = False) -> str:
    """The one line of the UserError; nothing at ``out`` has changed."""
    before = contents(out)
    with pytest.raises(UserError) as caught:
        subbit.compress(source, recipe, out, resume=resume, overwrite=overwrite)
    assert contents(out) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_recipe_is_refused(source: Path, recipe_for: Recipes, unfinished: Path) -> None:
    """And the field that differs is named; a finished run is no different."""
    other = recipe_for("pbs2p", calibration={"samples": 2, "seq_len": 8}, options={"candidates": 5})
    assert "another recipe (options differs)" in refused(source, other, unfinished, resume=True)
    other = recipe_for("stbllm", calibration={"samples": 2, "seq_len": 8})
    assert "another recipe (method differs)" in refused(source, other, unfinished, resume=True)


def test_a_field_that_recipes_did_not_have_is_no_other_recipe(source: Path, recipe: Recipe, unfinished: Path) -> None:
    """A run of an older version goes on: its recipe meant what is the default now."""
    path = unfinished / ".subbit" / "state.json"
    state = json.loads(path.read_text())
    del state["recipe"]["allocation"]["spread"]
    path.write_text(json.dumps(state))
    subbit.compress(source, recipe, unfinished, resume=True)
    state["recipe"]["allocation"]["n_low"] = 2.5
    (unfinished / "subbit_manifest.json").write_text(json.dumps(state))
    assert "another recipe (allocation differs)" in refused(source, recipe, unfinished, resume=True)


def test_another_model_is_refused(source: Path, recipe: Recipe, unfinished: Path, tmp_path: Path) -> None:
    """Other weights of the same shape, or the same weights in another dtype, are another model; a copy is not."""
    for name, model in {"seed": smallest_model(seed=1), "dtype": smallest_model().to(torch.bfloat16)}.items():
        save_model(model, tmp_path / name)
        assert "another model" in refused(tmp_path / name, recipe, unfinished, resume=True)
    (tmp_path / "copy").mkdir()
    for path in source.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    subbit.compress(tmp_path / "copy", recipe, unfinished, resume=True)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (".subbit/state.json", b"{"),
        (".subbit/state.json", b"{}"),
        (".subbit/state.json", b"[]"),
        (".subbit/state.json", b"\xff\xfe"),
        (".subbit/windows.safetensors", b"nothing"),
        (".subbit/windows.safetensors", None),
        (".subbit/hidden-00002.safetensors", b""),
        (".subbit/hidden-00002.safetensors", None),
        ("model-layer-00000.safetensors", b"x"),
        ("model-layer-00001.safetensors", None),
    ],
)
def test_a_damaged_state_is_one_line(
    file: str, damage: bytes | None, source: Path, recipe: Recipe, unfinished: Path
) -> None:
    """It names the file, or the directory, and the way out."""
    if damage is None:
        (unfinished / file).unlink()
    else:
        (unfinished / file).write_bytes(damage)
    message = refused(source, recipe, unfinished, resume=True)
    assert "cannot resume" in message
    assert "--overwrite" in message


def test_the_way_out_of_a_damaged_state_works(
    source: Path, recipe: Recipe, unfinished: Path, undisturbed: Path
) -> None:
    """With a state that cannot be read, overwriting gives what a new run gives."""
    (unfinished / ".subbit" / "state.json").write_bytes(b"{")
    subbit.compress(source, recipe, unfinished, overwrite=True)
    assert contents(unfinished) == contents(undisturbed)


def test_one_process_at_a_time(source: Path, recipe: Recipe, unfinished: Path, undisturbed: Path) -> None:
    """Who comes second is told of the first, and changes nothing; when the first is killed, the way is free."""
    code = (
        "import sys; from pathlib import Path; from subbit.checkpoint.lock import lock_directory; "
        "out = Path(sys.argv[1]); held = lock_directory(out, out / '.subbit'); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(unfinished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        for way in ("resume", "overwrite"):
            message = refused(source, recipe, unfinished, **{way: True})
            assert f"is being written by another process ({process.pid})" in message
        process.kill()
    subbit.compress(source, recipe, unfinished, resume=True)
    assert contents(unfinished) == contents(undisturbed)


def test_a_flipped_bit_in_a_finished_shard_is_found(source: Path, recipe: Recipe, unfinished: Path) -> None:
    """By its checksum; the size is the same."""
    path = unfinished / "model-layer-00000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert "model-layer-00000.safetensors is missing or altered" in refused(source, recipe, unfinished, resume=True)


def test_resuming_a_finished_run_changes_nothing(
    source: Path, recipe: Recipe, recipe_for: Recipes, undisturbed: Path
) -> None:
    """It says that there is nothing to do; with another recipe it refuses."""
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    progress = Lines()
    checkpoint = subbit.compress(source, recipe, undisturbed, resume=True, progress=progress)
    assert progress.lines == [f"{undisturbed} is already complete"]
    assert checkpoint.directory == undisturbed
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before
    assert "another recipe" in refused(source, recipe_for("stbllm"), undisturbed, resume=True)


def test_resume_starts_where_there_is_nothing(source: Path, recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """So that a script can always say --resume: a new directory, an empty one, a run killed before its first state."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "early" / ".subbit").mkdir(parents=True)
    (tmp_path / "early" / ".subbit" / ".windows.safetensors.partial").write_bytes(b"half")
    for name in ("new", "empty", "early"):
        subbit.compress(source, recipe, tmp_path / name, resume=True)
        assert contents(tmp_path / name) == contents(undisturbed)


def test_a_directory_in_use_needs_a_flag(source: Path, recipe: Recipe, undisturbed: Path, unfinished: Path) -> None:
    """Finished or not."""
    for out in (undisturbed, unfinished):
        message = refused(source, recipe, out)
        assert "--resume" in message
        assert "--overwrite" in message


def test_resume_and_overwrite_refuse_what_subbit_did_not_write(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Somebody's files, a dense model, a file in the place of the directory."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep me")
    for resume in (False, True):
        flags = {"resume": resume, "overwrite": not resume}
        assert "subbit did not write" in refused(source, recipe, tmp_path / "notes", **flags)
        assert "subbit did not write" in refused(source, recipe, source, **flags)
        with pytest.raises(UserError, match="is a file; give a directory"):
            subbit.compress(source, recipe, tmp_path / "notes" / "todo.txt", resume=resume, overwrite=not resume)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "keep me"


# ---- overwriting -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_output(source: Path, recipe_for: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another recipe makes of the model."""
    out = tmp_path_factory.mktemp("other") / "out"
    subbit.compress(source, recipe_for("stbllm", calibration={"samples": 2, "seq_len": 8}), out)
    return out


def test_overwrite_leaves_nothing_of_the_old_output(
    source: Path, recipe: Recipe, undisturbed: Path, other_output: Path, tmp_path: Path
) -> None:
    """Not even files that the new one does not have."""
    shutil.copytree(other_output, tmp_path / "out")
    (tmp_path / "out" / "model-layer-00007.safetensors").write_bytes(b"old")
    (tmp_path / "out" / "folder").mkdir()
    (tmp_path / "out" / "folder" / "file").write_bytes(b"old")
    subbit.compress(source, recipe, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert layers_done_twice(tmp_path / "out") == 0


def test_a_mistake_does_not_cost_the_old_output(
    source: Path, recipe_for: Recipes, undisturbed: Path, tmp_path: Path
) -> None:
    """The old output is deleted when the new run really starts, not before its inputs have been checked."""
    before = contents(undisturbed)
    with pytest.raises(UserError, match="does not exist"):
        subbit.compress(
            source, recipe_for(calibration={"source": str(tmp_path / "no.txt")}), undisturbed, overwrite=True
        )
    assert contents(undisturbed) == before


@pytest.mark.parametrize("number", range(0, 24, 5))
def test_killed_while_the_old_output_is_deleted(
    number: int, source: Path, recipe: Recipe, undisturbed: Path, other_output: Path, tmp_path: Path
) -> None:
    """What is left is the whole old checkpoint or an unfinished run, and the same command again does the work."""
    out = Path(shutil.copytree(other_output, tmp_path / "out"))
    before = contents(out)

    def run() -> None:
        die_before_change(out, number)
        subbit.compress(source, recipe, out, overwrite=True)

    assert in_a_fork(run)
    if (out / "config.json").exists():
        assert contents(out) == before
    else:
        with pytest.raises(CheckpointError, match="unfinished"):
            subbit.load(out)
    subbit.compress(source, recipe, out, overwrite=True)
    assert contents(out) == contents(undisturbed)


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "file",
    [
        ".model-layer-00002.safetensors.partial",
        ".subbit/.hidden-00003.safetensors.partial",
        ".subbit/.state.json.partial",
        ".model-rest.safetensors.partial",
        ".subbit_manifest.json.partial",
        ".config.json.partial",
        "tokenizer.json",
    ],
)
def test_a_full_disk_is_one_line_and_can_be_resumed(
    file: str, source: Path, recipe: Recipe, unfinished: Path, undisturbed: Path
) -> None:
    """Every write to one of the files fails with "no space left on device", as the kernel says it."""
    (unfinished / file).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"[Nn]o space left.*--resume") as caught:
        subbit.compress(source, recipe, unfinished, resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="unfinished"):
        subbit.load(unfinished)
    (unfinished / file).unlink(missing_ok=True)
    subbit.compress(source, recipe, unfinished, resume=True)
    assert contents(unfinished) == contents(undisturbed)
    assert layers_done_twice(unfinished) <= 1


def test_too_little_space_is_said_before_the_work(
    source: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how much is needed and how much there is."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"no space left for .*MB are needed"):
        subbit.compress(source, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
