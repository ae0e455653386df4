"""Open a compressed checkpoint: what it holds, how many bits that is, and whether it is intact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from subbit.checkpoint.files import DTYPES, FORMAT_VERSION, INDEX_FILE, MANIFEST_FILE, StoredTensor, read_header, sha256
from subbit.errors import CheckpointError
from subbit.packing.embedding import PackedEmbeddings
from subbit.packing.layout import LinearSpec, read_spec

__all__ = ["Checkpoint", "check_format_version", "is_compressed", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A compressed checkpoint directory; only headers and JSON have been read."""

    directory: Path
    config: dict[str, Any]
    specs: dict[str, LinearSpec]  # compressed linears by module name
    embeddings: PackedEmbeddings  # input embedding and head; empty where they are stored dense
    tensors: dict[str, StoredTensor]
    manifest: dict[str, Any]  # empty after save_pretrained() to another place

    @cached_property
    def files(self) -> list[str]:
        """The weight files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.directory / file).stat().st_size for file in self.files)

    def packed(self, name: str) -> dict[str, StoredTensor]:
        """The stored tensors of a compressed linear, by short name."""
        return {key: self.tensors[f"{name}.{key}"] for key in self.specs[name].tensors()}

    def check_structure(self) -> None:
        """CheckpointError unless every packed tensor is there with the shape and dtype that its spec says.

        So must be what was left dense; whether dense embeddings, norms and biases are there only the model can tell.
        """
        packed: dict[str, LinearSpec] = {**self.specs, **self.embeddings.specs}
        for name, spec in packed.items():
            for key, (shape, dtype) in spec.tensors().items():
                stored = self.tensors.get(f"{name}.{key}")
                if stored is None:
                    raise CheckpointError(f"{self.directory}: the packed tensor {name}.{key} is missing")
                if stored.shape != shape or stored.dtype != DTYPES[dtype]:
                    found = f"{stored.dtype} {list(stored.shape)}"
                    raise CheckpointError(f"{self.directory}: {name}.{key} is {found}, not {dtype} {list(shape)}")
        for name in self.config["quantization_config"]["left_dense"]:
            if f"{name}.weight" not in self.tensors and name not in self.tensors:
                raise CheckpointError(f"{self.directory}: {name}, which was left dense, is missing")

    def check_contents(self) -> None:
        """CheckpointError unless every file has the checksum of the manifest, where there is one."""
        for file, facts in self.manifest.get("files", {}).items():
            path = self.directory / file
            if not path.exists():
                raise CheckpointError(f"{path} is missing; get it again or compress again")
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path} is not the file that was written (checksum differs); get it again")


def is_compressed(directory: Path) -> bool:
    """Whether ``config.json`` there says that subbit wrote it."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool((config.get("quantization_config") or {}).get("quant_method") == "subbit")
    except (OSError, ValueError, AttributeError):  # the last: JSON of another shape
        return False


def open_checkpoint(directory: str | Path, config: dict[str, Any] | None = None) -> Checkpoint:
    """Read the headers of a compressed checkpoint and check its structure, not yet its checksums.

    Args:
        config: what its config.json will say, of a checkpoint that lacks nothing else yet.

    Raises:
        CheckpointError: no, an unfinished, a damaged or a newer checkpoint.
    """
    directory = Path(directory)
    config = read_config(directory) if config is None else config
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "subbit":
        raise CheckpointError(
            f"{directory} was not compressed by subbit (its config.json has no subbit quantization_config)"
        )
    check_format_version(quantization, directory)
    check_fields(quantization, directory)
    specs = read_specs(quantization["linears"], directory)
    manifest = read_manifest(directory / MANIFEST_FILE)
    embeddings = PackedEmbeddings.from_dict(quantization.get("embeddings", {}), directory)
    checkpoint = Checkpoint(directory, config, specs, embeddings, read_tensors(directory), manifest)
    checkpoint.check_structure()
    return checkpoint


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``; CheckpointError that tells a missing directory from an unfinished run."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give the output directory of 'subbit compress'")
    if not (directory / "config.json").exists():
        if (directory / ".subbit").is_dir():
            raise CheckpointError(f"{directory} is unfinished; run the same 'subbit compress' with --resume")
        raise CheckpointError(f"{directory} has no config.json; give the output directory of 'subbit compress'")
    return read_json(directory / "config.json")


def check_format_version(quantization: dict[str, Any], where: Any) -> None:
    """CheckpointError for a format that this version cannot read."""
    version = quantization.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: format_version {version!r} is not a version of subbit's format")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this subbit reads up to {FORMAT_VERSION}: pip install -U subbit"
        )


def check_fields(quantization: dict[str, Any], where: Any) -> None:
    """CheckpointError unless the quantization_config has all that docs/format.md says."""
    for field, kind in {"method": str, "sparsity": str, "linears": dict, "left_dense": dict}.items():
        if not isinstance(quantization.get(field), kind):
            raise CheckpointError(f"{where}: {field!r} is missing in the quantization_config, or is no {kind.__name__}")


def read_specs(linears: dict[str, Any], where: Any) -> dict[str, LinearSpec]:
    """The descriptions of the compressed linears; CheckpointError for one that makes no sense."""
    specs = {}
    for name, values in linears.items():
        try:
            specs[name] = read_spec(values)
            sizes = [size for shape, _ in specs[name].tensors().values() for size in shape]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            sizes = [0]
        if min(sizes) < 1:
            raise CheckpointError(f"{where}: the description of {name} makes no sense: {values}")
    return specs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); get it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object; get it again")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    """What subbit recorded of a checkpoint; empty where the file did not travel with it."""
    manifest = read_json(path) if path.exists() else {}
    layers, files = manifest.get("layers", []), manifest.get("files", {})
    whole = isinstance(layers, list) and isinstance(files, dict)
    if not whole or not all(isinstance(layer, dict) and isinstance(layer.get("linears"), dict) for layer in layers):
        raise CheckpointError(f"{path} is damaged; get it again or delete it (no weights are in it)")
    return manifest


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All stored tensors by name, from the headers of the index's files or of the only file."""
    index = directory / INDEX_FILE
    if not index.exists():
        return read_header(directory / "model.safetensors")
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names and files; get it again or compress again")
    outside = next((file for file in weight_map.values() if Path(file).name != file), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {outside}, which lies outside the checkpoint; do not trust it")
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    missing = [name for name, file in weight_map.items() if name not in headers[file]]
    if missing:
        raise CheckpointError(
            f"{directory}: the tensor {missing[0]} is not in {weight_map[missing[0]]} as the index says"
        )
    return {name: headers[file][name] for name, file in weight_map.items()}
