"""Open the model to compress, and read its tensors one by one.

A source is a directory of safetensors files, a model on the Hugging Face hub, or a GGUF file. Safetensors are read
lazily by name, so that a model larger than memory can be walked through layer by layer; GGUF files, and checkpoints
that transformers renames or merges while loading, have to be held in memory as a whole, and `ModelSource.note` then
says so. Experts are read one by one, as most checkpoints store them (`models/experts.py`); a checkpoint that has them
as 3-D parameters is one of those held in memory. Pickled weights are never read.
"""

import copy
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from subbit.errors import UserError
from subbit.models.experts import RoutedExperts, split_experts

__all__ = ["ModelSource", "model_digest", "open_source"]

_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.tiktoken", "*.jinja", "README.md")
# Second copies of the weights that some repositories carry for other programs.
_HUB_SKIP = ("original/*", "onnx/*", "consolidated*.safetensors")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*.model", "tekken.json", "*.tiktoken")
# How Mixtral's own checkpoints, and those of the families after it, spell what transformers now calls otherwise.
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _TensorInfo:
    dtype: str  # as safetensors spells it: "BF16", "F32", "I64", …
    shape: tuple[int, ...]


class _TensorStore(Protocol):
    @property
    def info(self) -> Mapping[str, _TensorInfo]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _FileStore:
    """Tensors in safetensors files; a file is mapped only while a tensor read from it is alive."""

    info: Mapping[str, _TensorInfo]
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        with _open_safetensors(self.files[name]) as file:
            return cast(Tensor, file.get_tensor(name))


@dataclass(frozen=True)
class _MemoryStore:
    """Tensors of a model that was loaded as a whole."""

    info: Mapping[str, _TensorInfo]
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class _ReplacingStore:
    """Another store, but for some tensors, which are computed whenever they are read."""

    base: _TensorStore
    replaced: Mapping[str, Callable[[], Tensor]]

    @property
    def info(self) -> Mapping[str, _TensorInfo]:
        return self.base.info

    def read(self, name: str) -> Tensor:
        return self.replaced[name]() if name in self.replaced else self.base.read(name)


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A causal language model on disk, its tensors readable one by one under the names of the transformers module.

    `directory` holds the config and tokenizer files (beside a GGUF file there may be none: use `tokenizer()`).
    `tied` are parameters that the checkpoint lacks because they share another's tensor; `tensor()` serves them too.
    `note` is one line for the user when the model had to be loaded into memory as a whole, else None.
    """

    config: PreTrainedConfig
    directory: Path
    dtype: torch.dtype
    names: list[str]
    tied: list[str]
    note: str | None
    gguf_file: str | None
    trust_remote_code: bool
    _store: _TensorStore = field(repr=False)
    _stored_names: Mapping[str, str] = field(repr=False)
    _reference: PreTrainedModel = field(repr=False)

    def __contains__(self, name: str) -> bool:
        """Whether `tensor(name)` can be served; true for tied names as well."""
        return name in self._stored_names

    def stored_name(self, name: str) -> str:
        """The name under which the checkpoint keeps the tensor: equal for two names that are one tied tensor."""
        return self._stored_names[name]

    def tensor(self, name: str) -> Tensor:
        """Read one parameter or buffer, on the CPU, in the dtype of the checkpoint; `KeyError` for an unknown name.

        It is a view of the mapped file, or the source's own tensor if the whole model is in memory: copy it to keep it
        or to write into it.
        """
        return self._store.read(self._stored_names[name])

    def replacing(self, tensors: Mapping[str, Callable[[], Tensor]]) -> "ModelSource":
        """The same model with other values for some tensors, each computed anew whenever it is read."""
        replaced = {self._stored_names[name]: read for name, read in tensors.items()}
        return replace(self, _store=_ReplacingStore(self._store, replaced))

    def skeleton(self) -> PreTrainedModel:
        """A new model without memory: every parameter and buffer on the meta device (float32), in eval mode.

        Its experts are `RoutedExperts` wherever they can be.
        """
        return _build_skeleton(self.config, self.trust_remote_code)

    def initialiser(self, module_path: str) -> PreTrainedModel:
        """The (meta) model or sub-model that knows how to initialise the module at `module_path`."""
        owner: nn.Module = self._reference
        module: nn.Module = self._reference
        for part in filter(None, module_path.split(".")):
            module = getattr(module, part)
            owner = module if isinstance(module, PreTrainedModel) else owner
        return cast(PreTrainedModel, owner)

    def load_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the whole model into memory, in eval mode."""
        return _load_whole(self.directory, self.gguf_file, dtype, self.trust_remote_code)[0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; a `UserError` if there is none or it cannot be read."""
        kwargs = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        if not self.gguf_file and not any(any(self.directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise UserError(f"{self.directory} has no tokenizer files; copy tokenizer.json (and its config) there")
        try:
            return AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True, **kwargs
            )
        except Exception as error:  # transformers raises anything here, down to bare Exception
            hint = "download its tokenizer files again"
            raise UserError(f"cannot read the tokenizer in {self.directory} ({_first_line(error)}); {hint}") from error


def open_source(model: str | Path, trust_remote_code: bool = False) -> ModelSource:
    """Open the model at a local directory, a hub id or a GGUF file; a `UserError` says what is wrong with it.

    A directory holds config.json and safetensors (one file, or shards with an index), or exactly one .gguf file.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file but not a .gguf; give the directory of the model instead")
        return _open_gguf(path, trust_remote_code)
    directory = path if path.is_dir() else _download(str(model), trust_remote_code)
    gguf = _lone_gguf(directory)
    if gguf is not None:
        return _open_gguf(gguf, trust_remote_code)
    config = _read_config(directory, trust_remote_code)
    store = _index_safetensors(directory)
    reference = _build_skeleton(config, trust_remote_code)
    stored_names, missing = _match_names(reference, store.info, directory)
    if missing:
        return _open_whole(directory, None, trust_remote_code)
    return _make_source(directory, config, reference, store, stored_names, None, None, trust_remote_code)


def model_digest(source: ModelSource) -> str:
    """Tells models apart: config, tensor names, shapes, dtypes and the first values of every tensor.

    Where the model lies and which transformers reads it is no part of it: it must be the same after a move.
    """
    config = {k: v for k, v in source.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(source.names):
        tensor = source.tensor(name)
        head = tensor.flatten()[:64].float().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + head)
    return digest.hexdigest()


# ---- finding the files -----------------------------------------------------------------------------------------------


def _download(model: str, trust_remote_code: bool) -> Path:
    """Fetch config, tokenizer and safetensors of a hub model into the local cache (or find them there)."""
    if not _HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors")):
        raise UserError(f"{model} does not exist; give a directory, a .gguf file or a hub id such as org/name")
    from huggingface_hub import snapshot_download  # here: importing it opens an HTTP client
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else list(_HUB_FILES)
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(_HUB_SKIP)))
    except GatedRepoError as error:
        raise UserError(
            f"hub model {model} is gated: accept its licence at https://huggingface.co/{model} and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{model} is neither a local path nor a model on the Hugging Face hub; "
            "check the spelling, or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # network and disk fail in many ways, all of them the user's to mend
        raise UserError(
            f"{model} is not a local path, and fetching it from the Hugging Face hub failed ({_first_line(error)}); "
            "check the spelling and the network, or give a local directory"
        ) from error


def _lone_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory without safetensors, if there is exactly one."""
    found = sorted(directory.glob("*.gguf"))
    if not found or any(directory.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise UserError(f"{directory} holds {len(found)} .gguf files; give the path of one, e.g. {found[0]}")
    return found[0]


def _index_safetensors(directory: Path) -> _FileStore:
    """Read the headers of every shard (not the tensors); `UserError` for missing, damaged or pickled files."""
    index = directory / _INDEX
    weight_map = _read_weight_map(index) if index.is_file() else {}
    shards = sorted({directory / file for file in weight_map.values()}) or [_single_file(directory)]
    info: dict[str, _TensorInfo] = {}
    files: dict[str, Path] = {}
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{index} names {shard.name}, which is missing; download the model again")
        with _open_safetensors(shard) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                info[name] = _TensorInfo(header.get_dtype(), tuple(header.get_shape()))
                files[name] = shard
    absent = next((name for name in weight_map if name not in info), None)
    if absent is not None:
        raise UserError(f"{index} names tensor {absent}, which its shard {weight_map[absent]} lacks; download it again")
    return _FileStore(info, files)


def _single_file(directory: Path) -> Path:
    """The one safetensors file of a directory without an index."""
    found = sorted(directory.glob("*.safetensors"))
    if directory / "model.safetensors" in found:
        return directory / "model.safetensors"
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{directory} holds {len(found)} safetensors files but no {_INDEX}; download the model again")
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise UserError(
            f"{directory} holds pickled weights only (pytorch_model.bin), which subbit never reads; "
            "convert them with transformers: from_pretrained, then save_pretrained"
        )
    raise UserError(f"{directory} holds no weights: neither *.safetensors nor a .gguf file; check the path")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download the model again")
    outside = next((f for f in weight_map.values() if Path(f).is_absolute() or ".." in Path(f).parts), None)
    if outside is not None:
        raise UserError(f"{index} names {outside}, which lies outside the model directory; do not trust this model")
    return weight_map


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no valid safetensors file ({_first_line(error)}); download it again") from error


# ---- config and skeleton ---------------------------------------------------------------------------------------------


def _read_config(directory: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Load config.json and check that it describes a dense causal language model."""
    path = directory / "config.json"
    if (directory / "adapter_config.json").is_file() and not path.is_file():
        raise UserError(f"{directory} is an adapter, not a model; merge it into its base model first")
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; give the directory that holds config.json and *.safetensors")
    raw = _read_json(path)
    _refuse_quantized(raw.get("quantization_config"), directory)
    custom = raw.get("auto_map") or {}
    known = raw.get("model_type") in CONFIG_MAPPING
    if custom and not known and not trust_remote_code:
        raise UserError(
            f"{directory} needs its own Python code to load; read its *.py files, then allow it with trust_remote_code"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # remote code may raise anything
        raise UserError(f"transformers cannot read {path}: {_first_line(error)}") from error
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        _refuse_other_task(raw.get("architectures") or [], expected, path)
    elif not (trust_remote_code and "AutoModelForCausalLM" in custom):
        raise UserError(f"{path} describes a {raw.get('model_type')} model, which is no causal language model")
    return config


def _refuse_quantized(quantization: Any, directory: Path) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    if method == "subbit":
        raise UserError(f"{directory} is already compressed by subbit; give the original model")
    raise UserError(f"{directory} is already quantized ({method}); give the original, unquantized model")


def _refuse_other_task(architectures: list[str], expected: str, path: Path) -> None:
    """Refuse heads that are not for language modelling, e.g. a LlamaForSequenceClassification."""
    generative = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "Model")
    if architectures and expected not in architectures and not any(a.endswith(generative) for a in architectures):
        raise UserError(f"{path} describes a {architectures[0]}, which is no causal language model; give a {expected}")


def _build_skeleton(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a bad config or remote code may raise anything
        raise UserError(f"transformers cannot build this {config.model_type} model: {_first_line(error)}") from error
    split_experts(model)
    return cast(PreTrainedModel, model.eval())


# ---- from the checkpoint's names to the module's ---------------------------------------------------------------------


def _match_names(
    model: PreTrainedModel, info: Mapping[str, _TensorInfo], directory: Path
) -> tuple[dict[str, str], list[str]]:
    """Module name → stored name, and the parameters that the checkpoint does not have under any name.

    A checkpoint of the base model, or of another transformers version, may lack or carry the base-model prefix.
    Persistent buffers that are not stored are no loss, they can be initialised, except beside experts: there, one may
    be a correction of the router, stored under a name that only transformers knows.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    needed = {**parameters, **state} if any(isinstance(m, RoutedExperts) for m in model.modules()) else parameters
    stored_names: dict[str, str] = {}
    for name, tensor in state.items():
        stored = next((c for c in _spellings(name, model.base_model_prefix) if c in info), None)
        if stored is None or info[stored].shape != tuple(tensor.shape):
            continue
        if tensor.is_floating_point() and info[stored].dtype not in _FLOATS:
            raise UserError(
                f"{directory} is already quantized (tensor {stored} is {info[stored].dtype}); give the original model"
            )
        stored_names[name] = stored
    _alias_tied(parameters, stored_names)
    return stored_names, [name for name in needed if name not in stored_names]


def _spellings(name: str, base_prefix: str) -> list[str]:
    """Names that a checkpoint may store a tensor under, the likeliest first."""
    prefix = f"{base_prefix}."
    expert = re.sub(r"(\.experts\.\d+\.)(\w+)", lambda found: found[1] + _MIXTRAL.get(found[2], found[2]), name)
    forms = dict.fromkeys((name, expert, expert.replace(".mlp.", ".block_sparse_moe.")))
    return [spelling for form in forms for spelling in (form, form.removeprefix(prefix), prefix + form)]


def _alias_tied(parameters: Mapping[str, nn.Parameter], stored_names: dict[str, str]) -> None:
    """Let parameters that the skeleton ties to a stored one, and that are not stored themselves, share its tensor."""
    stored_of = {id(parameters[name]): stored for name, stored in stored_names.items() if name in parameters}
    for name, parameter in parameters.items():
        if name not in stored_names and id(parameter) in stored_of:
            stored_names[name] = stored_of[id(parameter)]


def _make_source(
    directory: Path,
    config: PreTrainedConfig,
    reference: PreTrainedModel,
    store: _TensorStore,
    stored_names: dict[str, str],
    note: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> ModelSource:
    own_name: dict[str, str] = {}
    for name, stored in stored_names.items():  # tied names stand last
        own_name.setdefault(stored, name)
    names = list(own_name.values())
    return ModelSource(
        config=config,
        directory=directory,
        dtype=_main_dtype(store.info[stored_names[name]] for name in names),
        names=names,
        tied=[name for name, stored in stored_names.items() if own_name[stored] != name],
        note=note,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
        _store=store,
        _stored_names=stored_names,
        _reference=reference,
    )


def _main_dtype(infos: Any) -> torch.dtype:
    """The floating-point dtype that most elements of the checkpoint have."""
    elements: Counter[str] = Counter()
    for info in infos:
        if info.dtype in _FLOATS:
            elements[info.dtype] += torch.Size(info.shape).numel()
    return _FLOATS[elements.most_common(1)[0][0]] if elements else torch.float32


# ---- models that must be loaded as a whole ---------------------------------------------------------------------------


def _open_gguf(path: Path, trust_remote_code: bool) -> ModelSource:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'reading {path.name} needs the {package} package; run: pip install "subbit[demo]"')
    return _open_whole(path.parent, path.name, trust_remote_code)


def _open_whole(directory: Path, gguf_file: str | None, trust_remote_code: bool) -> ModelSource:
    """Let transformers load (dequantize, rename, merge) the checkpoint, and serve the tensors of the loaded model."""
    dtype = torch.float32 if gguf_file else "auto"
    model, missing = _load_whole(directory, gguf_file, dtype, trust_remote_code)
    where = directory / gguf_file if gguf_file else directory
    if missing:
        raise UserError(f"{where} lacks {len(missing)} parameters of the model, e.g. {missing[0]}; download it again")
    split_experts(model)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    tensors |= {name: buffers[name] for name in model.state_dict() if name in buffers}
    codes = {dtype: code for code, dtype in _FLOATS.items()}
    info = {name: _TensorInfo(codes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
    reference = _build_skeleton(model.config, trust_remote_code)
    stored_names, unmatched = _match_names(reference, info, where)
    if unmatched:
        raise UserError(f"{where} lacks parameter {unmatched[0]} after loading; this model cannot be compressed")
    reason = "GGUF files are dequantized" if gguf_file else "transformers converts this checkpoint while loading"
    note = f"{reason}: the whole model is held in memory instead of one layer at a time"
    store = _MemoryStore(info, tensors)
    return _make_source(directory, model.config, reference, store, stored_names, note, gguf_file, trust_remote_code)


def _load_whole(
    directory: Path, gguf_file: str | None, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The loaded model in eval mode, and the names of the parameters that the files did not fill."""
    kwargs: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # damaged files, shapes that do not fit, missing packages, remote code
        where = directory / gguf_file if gguf_file else directory
        raise UserError(f"transformers cannot load {where}: {_first_line(error)}") from error
    if gguf_file:
        _forget_quantization(model)
    return model.eval(), sorted(loading["missing_keys"])


def _forget_quantization(model: PreTrainedModel) -> None:
    """A model dequantized from GGUF is an ordinary one, but transformers refuses to save it while these are set."""
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)


# ---- small helpers ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no valid JSON ({_first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; download it again")
    return content


def _first_line(error: Exception) -> str:
    """The first line of an exception's text, shortened, for messages of one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."
