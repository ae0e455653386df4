"""What tests of whole models share: a progress that listens, and checkpoints read without subbit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from families import VOCABULARY
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Lines", "change_file", "interrupt_at", "logits_of", "stored_tensors", "token_ids"]


class Lines:
    """A progress that keeps its lines, and does something at each."""

    def __init__(self, react: Callable[[str], None] = lambda text: None) -> None:
        self.lines: list[str] = []
        self._react = react

    def line(self, text: str) -> None:
        self.lines.append(text)
        self._react(text)

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        @contextmanager
        def nothing() -> Iterator[Callable[[int, int], None]]:
            yield lambda done, total: None

        return nothing()


def interrupt_at(start: str) -> Callable[[str], None]:
    """For :class:`Lines`: end the run, as Ctrl-C does, at a line that starts so."""

    def react(text: str) -> None:
        if text.startswith(start):
            raise KeyboardInterrupt

    return react


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    return {name: one for path in sorted(directory.glob("*.safetensors")) for name, one in load_file(path).items()}


def token_ids() -> Tensor:
    """(2, 24) token ids of the tiny models, always the same."""
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))


def logits_of(model: PreTrainedModel) -> Tensor:
    """Of :func:`token_ids`."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=token_ids()).logits
    return logits


def change_file(directory: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a shard as somebody with safetensors would, index included; no checksum can complain afterwards."""
    path, index_path = directory / file, directory / "model.safetensors.index.json"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: other for name, other in index["weight_map"].items() if other != file}
    index["weight_map"].update(dict.fromkeys(tensors, file))
    index_path.write_text(json.dumps(index))
    (directory / "subbit_manifest.json").unlink(missing_ok=True)
