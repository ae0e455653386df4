"""Write a checkpoint one decoder layer at a time, so that a run killed at any moment goes on where it was.

While a run is under way the output directory has no config.json, and ``.subbit/`` holds what the next layer needs: the
state (recipe, model, finished layers), the calibration windows, and the hidden states that enter the next layer. The
state is written last, so a layer counts only when its shard and the hidden states behind it are safely on disk. At the
end config.json is written, then the state is deleted: a directory with both a manifest and a config but without a state
is finished, whatever else of ``.subbit/`` is still there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from subbit.checkpoint.files import (
    FORMAT_VERSION,
    INDEX_FILE,
    LOG_FILE,
    MANIFEST_FILE,
    RECIPE_FILE,
    disk_errors,
    read_header,
    sha256,
    write_json,
    write_tensors,
    write_text,
)
from subbit.checkpoint.lock import LOCK_FILE, lock_directory
from subbit.checkpoint.reader import read_json
from subbit.errors import CheckpointError, UserError
from subbit.recipe import Recipe

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """The output directory of one run."""

    def __init__(self, directory: Path, recipe: Recipe, model: str, *, resume: bool, overwrite: bool) -> None:
        """Decide whether to start, to resume or to refuse; nothing is written yet.

        Args:
            model: digest of the source model, so that ``resume`` cannot mix two models.

        Raises:
            UserError: the directory is not empty, or holds a run of another recipe or model.
        """
        self.directory = directory
        self._work = directory / ".subbit"
        self._recipe = recipe
        self._model = model
        self.state: dict[str, Any] = {}
        self.finished = False  # an earlier run completed all of it
        self._clear = False
        self._lock: IO[str] | None = None
        if not directory.exists():
            return
        if not directory.is_dir():
            raise UserError(f"{directory} is a file; give a directory for the output")
        if not any(directory.iterdir()):
            return
        if resume:
            self._read_state()
        elif overwrite:
            self._check_ours()
            self._clear = True
        else:
            raise UserError(f"{directory} is not empty; use --resume to go on with it or --overwrite to replace it")

    def _check_ours(self) -> None:
        ours = self._work.is_dir() or (self.directory / MANIFEST_FILE).exists()
        if not ours:
            raise UserError(
                f"{self.directory} holds files that subbit did not write; empty it or give another directory"
            )

    def _read_state(self) -> None:
        state_file = self._work / "state.json"
        if not state_file.exists():
            state_file = self.directory / MANIFEST_FILE
            self.finished = state_file.exists() and (self.directory / "config.json").exists()
            if not self.finished and self._work.is_dir():
                self._clear = True  # killed before the first state, or while an earlier output was deleted
                return
            self._check_ours()
        state = read_state(state_file)
        begun = complete(state["recipe"])
        for field, value in as_saved(self._recipe).items():
            if begun.get(field) != value:
                raise UserError(
                    f"cannot resume {self.directory}: it was started with another recipe ({field} differs); "
                    "give the same options, or --overwrite to start again"
                )
        if state["model"] != self._model:
            raise UserError(f"cannot resume {self.directory}: it was started with another model; use --overwrite")
        self.state = state

    @property
    def layers_done(self) -> int:
        """Decoder layers that need no more work."""
        return len(self.state.get("layers", []))

    def begin(self, plan: dict[str, Any], windows: Tensor, hidden: dict[str, Tensor]) -> None:
        """Start a new run: ``plan`` is kept in the state, ``windows`` and ``hidden`` (of layer 0) in files.

        Args:
            hidden: hidden states by the model they belong to, such as "student" and "teacher".

        Raises:
            UserError: another process writes there.
        """
        with disk_errors(self.directory):
            self._work.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.directory, self._work)
            if self._clear:
                self._remove_earlier()
        write_tensors(self._work / "windows.safetensors", {"windows": windows})
        write_tensors(self._hidden_file(0), hidden)
        self.state = {"recipe": self._recipe.to_dict(), "model": self._model, **plan, "layers": []}
        self._write_state()

    def _remove_earlier(self) -> None:
        """Delete an earlier output in an order that makes it an unfinished one if the run is killed in between."""
        for path in (self.directory / "config.json", self._work / "state.json", self.directory / MANIFEST_FILE):
            path.unlink(missing_ok=True)
        for path in [*self.directory.iterdir(), *self._work.iterdir()]:
            if path in (self._work, self._work / LOCK_FILE):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def restore(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The calibration windows and the hidden states that enter the next layer; checks the finished shards.

        Raises:
            UserError: something of the unfinished run is damaged, or another process goes on with it.
        """
        with disk_errors(self.directory):
            self._lock = lock_directory(self.directory, self._work)
        if self.state.get("staged"):
            self._move_staged()
        for layer in self.state["layers"]:
            path = self.directory / layer["file"]
            if not path.exists() or path.stat().st_size != layer["bytes"] or sha256(path) != layer["sha256"]:
                raise UserError(f"cannot resume: {path} is missing or altered; use --overwrite to start again")
        try:
            windows = load_file(self._work / "windows.safetensors")["windows"]
            return windows, load_file(self._hidden_file(self.layers_done))
        except (OSError, SafetensorError, KeyError):
            raise UserError(f"cannot resume: {self._work} is damaged; use --overwrite to start again") from None

    def write_layer(self, tensors: dict[str, Tensor], facts: dict[str, Any], hidden: dict[str, Tensor]) -> None:
        """Keep a finished layer: its shard, what the manifest says of it, and the hidden states that leave it."""
        index = self.layers_done
        file = f"model-layer-{index:05d}.safetensors"
        write_tensors(self.directory / file, tensors)
        write_tensors(self._hidden_file(index + 1), hidden)
        self.state["layers"].append({**self._file_facts(file), **facts})
        self._write_state()
        self._hidden_file(index).unlink(missing_ok=True)

    def stage_layer(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write another version of a finished shard beside it; returns its file facts for :meth:`commit_staged`."""
        file: str = self.state["layers"][index]["file"]
        write_tensors(self._work / file, tensors)
        return self._file_facts(file, self._work)

    def commit_staged(self, layers: list[dict[str, Any]], **facts: Any) -> None:
        """Put all staged shards into their places at once: a run that is killed in between goes on with that.

        Args:
            layers: what the manifest says of every layer from now on.
            facts: kept in the state.
        """
        self.state.update(facts, layers=layers, staged=True)
        self._write_state()
        self._move_staged()

    def _move_staged(self) -> None:
        with disk_errors(self.directory):
            for layer in self.state["layers"]:
                if (self._work / layer["file"]).exists():
                    os.replace(self._work / layer["file"], self.directory / layer["file"])
        del self.state["staged"]
        self._write_state()

    def save_work(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep tensors of an unfinished stage, atomically; :meth:`load_work` reads them after a resume.

        Returns:
            The same tensors, read from the file as they are used: memory that the system can take back.
        """
        path = self._work / f"{name}.safetensors"
        write_tensors(path, tensors)
        return load_file(path)

    def load_work(self, name: str) -> dict[str, Tensor] | None:
        """What :meth:`save_work` kept; None when there is nothing.

        Raises:
            UserError: it is damaged.
        """
        path = self._work / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            raise UserError(f"cannot resume: {path} is damaged; delete it to repeat that stage") from None

    def finish(self, rest: dict[str, Tensor], save_extras: Any) -> None:
        """Write what is not a decoder layer, the index, the recipe, the manifest and last the config.

        Args:
            rest: embeddings, final norm, head.
            save_extras: called with the directory; saves tokenizer and config.
        """
        file = "model-rest.safetensors"
        write_tensors(self.directory / file, rest)
        shards = [*self.state["layers"], self._file_facts(file)]
        self._write_index([shard["file"] for shard in shards])
        write_text(self.directory / RECIPE_FILE, self._recipe.to_yaml())
        write_json(self.directory / MANIFEST_FILE, self._manifest(shards))
        with disk_errors(self.directory):
            save_extras(self.directory)
        self.tidy()

    def tidy(self) -> None:
        """Delete what only an unfinished run needs, the state first; does no harm when there is nothing left of it."""
        with disk_errors(self.directory):
            (self._work / "state.json").unlink(missing_ok=True)
            if self._lock is not None:
                self._lock.close()
            if self._work.is_dir():
                shutil.rmtree(self._work)

    def _manifest(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        files = {shard["file"]: {"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in shards}
        return {"format_version": FORMAT_VERSION, "files": files, **self.state}

    def _write_index(self, files: list[str]) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            for name, tensor in read_header(self.directory / file).items():
                weight_map[name] = file
                total += tensor.bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.directory / INDEX_FILE, index)

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to the log, the one file whose contents depend on time."""
        with disk_errors(self.directory), (self.directory / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")

    def _file_facts(self, file: str, folder: Path | None = None) -> dict[str, Any]:
        path = (folder or self.directory) / file
        return {"file": file, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def _hidden_file(self, index: int) -> Path:
        return self._work / f"hidden-{index:05d}.safetensors"

    def _write_state(self) -> None:
        write_json(self._work / "state.json", self.state)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a run, from state.json or from the manifest of a finished one; UserError when it is damaged."""
    kinds = {"recipe": dict, "model": str, "calibration": str, "sparsities": dict, "left_dense": dict, "layers": list}
    kinds["embeddings"] = dict
    try:
        state = read_json(path)
        good = all(isinstance(state.get(field), kind) for field, kind in kinds.items())
    except CheckpointError:
        good = False
    if not good or any(not {"file", "bytes", "sha256", "linears"} <= set(layer) for layer in state["layers"]):
        raise UserError(f"cannot resume: {path} is damaged; use --overwrite to start again")
    return state


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """Its values as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(recipe.to_dict()))
    return values


def complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe that was saved by a version that had fewer fields; as it is, if it is none today."""
    try:
        return as_saved(Recipe.create(recipe))
    except UserError:
        return recipe


def check_space(directory: Path, needed: int) -> None:
    """UserError unless ``needed`` bytes are free where ``directory`` will be."""
    existing = next(parent for parent in [directory, *directory.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"no space left for {directory}: about {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        )
