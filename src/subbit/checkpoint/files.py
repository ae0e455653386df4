"""Names, checksums, safetensors headers and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subbit.errors import CheckpointError, UserError

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "LOG_FILE",
    "MANIFEST_FILE",
    "RECIPE_FILE",
    "StoredTensor",
    "make_folder",
    "read_header",
    "sha256",
    "write_json",
    "write_tensors",
    "write_text",
]

FORMAT_VERSION = 1
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "subbit_manifest.json"
RECIPE_FILE = "subbit_recipe.yaml"
LOG_FILE = "subbit_log.jsonl"
# As safetensors spells them, in the order in which it stores them: the widest first, so that all are aligned.
DTYPES = {
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"},
    **{torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16"},
    **{torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    file: str
    dtype: str  # as safetensors spells it: "U8", "F16", "BF16", …
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name → tensor of a safetensors file, from its header alone.

    Raises:
        CheckpointError: missing, truncated or not safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size - 8:
                raise CheckpointError(f"{path} is truncated or no safetensors file; get it again or compress again")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {name: stored_tensor(path, entry) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; get it again or compress again") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # the last four: JSON of another shape
        raise CheckpointError(f"{path} cannot be read as safetensors; get it again or compress again") from None
    if 8 + length + end != size:
        raise CheckpointError(f"{path} has {size} bytes where its header says {8 + length + end}; it is damaged")
    return tensors


def stored_tensor(path: Path, entry: dict[str, Any]) -> StoredTensor:
    """One entry of the header of ``path``."""
    start, end = entry["data_offsets"]
    return StoredTensor(path.name, entry["dtype"], tuple(entry["shape"]), end - start)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    for chunk in iter(lambda: file.read(1 << 20), b""):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space and run again with --resume"
            raise UserError(f"no space left while writing {path}; {hint}") from None
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def make_folder(folder: Path) -> None:
    """With those above it, unless it is there; UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it is there whole or not at all, also when the machine stops in the middle."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Atomic; UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Atomic; indented, keys in the given order, NaN refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Atomic; the bytes that ``safetensors.torch.save`` gives, which would hold all of them in memory twice."""
    ordered = sorted(tensors.items(), key=lambda item: (list(DTYPES).index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    write_atomically(path, write)
