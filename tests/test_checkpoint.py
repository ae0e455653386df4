"""Checkpoints: bits that are counted to the byte, damage that is found, saving and loading in every way."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_file, logits_of
from families import save_model, tiny_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import subbit
from subbit import CheckpointError, Recipe
from subbit.checkpoint.files import DTYPES, write_tensors
from subbit.runtime.linear import SubbitLinear

Recipes = Callable[..., Recipe]
Damage = Callable[[Path], None]
PACKED = ("codes", "symbols", "scales", "salient")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny bfloat16 models, so that a wrong dtype anywhere shows."""
    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            save_model(tiny_model(family).to(torch.bfloat16), saved[family])
        return saved[family]

    return save


@pytest.fixture(scope="module")
def compressed(
    sources: Callable[[str], Path], recipe_for: Recipes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``compressed(family)``: a checkpoint with linears of several sparsities and one that was left dense."""
    done: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp("compressed") / family
            overrides = {
                r"re:layers\.1\..*\bq(kv)?_proj": {"dense": True},
                r"re:layers\.2\..*\bo(ut)?_proj": {"sparsity": "7:16"},
            }
            recipe = recipe_for("stbllm", sparsity="5:8", overrides=overrides, options={"block_size": 48})
            subbit.compress(sources(family), recipe, done[family])
        return done[family]

    return run


@pytest.fixture
def copied(compressed: Callable[[str], Path], tmp_path: Path) -> Path:
    """A private copy of a llama, for a test to break."""
    return Path(shutil.copytree(compressed("llama-gqa"), tmp_path / "copied"))


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.get_buffer("scales") for name, module in model.named_modules() if isinstance(module, SubbitLinear)
    }


def parse_headers(directory: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Name → entry of all safetensors headers of a directory, and the bytes of the headers: without any library."""
    entries: dict[str, dict[str, Any]] = {}
    header_bytes = 0
    for path in directory.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        assert not entries.keys() & header.keys()
        entries.update(header)
        header_bytes += 8 + length
    return entries, header_bytes


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3", "mixtral"])
def test_inspect_counts_the_bytes_of_the_files(
    family: str, compressed: Callable[[str], Path], sources: Callable[[str], Path]
) -> None:
    """Every number again, from the files alone."""
    directory = compressed(family)
    facts = subbit.inspect(directory)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    entries, header_bytes = parse_headers(directory)
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    assert len(facts["left_dense"]) == (1 if family != "mixtral" else 1 + 3)  # routers
    dense = AutoModelForCausalLM.from_pretrained(sources(family))
    packed = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in PACKED)
    left_dense = sum(sizes.get(f"{name}.weight", 0) or sizes[name] for name in facts["left_dense"])
    matrices = [p for n, p in dense.named_parameters() if ".layers." in n and p.dim() > 1]
    assert facts["linear_bytes"] == packed + left_dense
    assert facts["linear_bytes"] + facts["dense_bytes"] == sum(sizes.values())
    assert facts["header_bytes"] == header_bytes
    assert facts["file_bytes"] == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert facts["linear_bytes"] + facts["dense_bytes"] + facts["header_bytes"] == facts["file_bytes"]
    assert facts["linear_weights"] == sum(p.numel() for p in matrices)
    assert facts["parameters"] == sum(p.numel() for p in dense.parameters())
    assert facts["bits"]["stored"] == 8 * facts["linear_bytes"] / facts["linear_weights"]
    assert facts["bits"]["model"] == 8 * facts["file_bytes"] / facts["parameters"]
    assert facts["method"] == "stbllm"
    assert facts["sparsity"] == "5:8"


def test_inspect_adds_up_over_layers_and_linears(compressed: Callable[[str], Path]) -> None:
    """Weights and bytes add up, bits are weighted means, nominal bits are N/M times one plus the salient share."""
    facts = subbit.inspect(compressed("llama-gqa"))
    assert [layer["name"] for layer in facts["layers"]] == [f"model.layers.{index}" for index in range(3)]
    for total, parts in [(facts, facts["layers"]), *((layer, layer["linears"]) for layer in facts["layers"])]:
        weights = "linear_weights" if total is facts else "weights"
        size = "linear_bytes" if total is facts else "bytes"
        assert total["linear_weights"] == sum(part[weights] for part in parts)
        assert total["linear_bytes"] == sum(part[size] for part in parts)
        for kind in ("nominal", "stored"):
            mean = sum(part["bits"][kind] * part[weights] for part in parts) / total["linear_weights"]
            assert total["bits"][kind] == pytest.approx(mean, rel=1e-12)
    linears = {linear["name"]: linear for layer in facts["layers"] for linear in layer["linears"]}
    assert len(linears) == 21
    assert linears["model.layers.1.self_attn.q_proj"]["sparsity"] == "dense"
    assert linears["model.layers.1.self_attn.q_proj"]["bits"] == {"nominal": 16.0, "stored": 16.0}
    salient = load_file(compressed("llama-gqa") / "model-layer-00002.safetensors")["model.layers.2.mlp.up_proj.salient"]
    share = sum(int(byte).bit_count() for byte in salient) / 64
    up = linears["model.layers.2.mlp.up_proj"]
    n, m = map(int, up["sparsity"].split(":"))
    assert up["bits"]["nominal"] == pytest.approx(n / m * (1 + share))
    assert 0 < up["error"] < 1


def test_only_open_formats_are_written(compressed: Callable[[str], Path]) -> None:
    """Safetensors, JSON, JSON lines, YAML and the card; nothing else and nothing hidden."""
    suffixes = {path.suffix for path in compressed("llama-gqa").rglob("*")}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".md"}
    assert not [path for path in compressed("llama-gqa").rglob("*") if path.name.startswith(".")]


def test_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    """Byte by byte, for all dtypes, scalars, empty and strided tensors, names of any language."""
    tensors = {f"{number}": torch.arange(number % 4).to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {"ä.b": torch.tensor(1.5), "b": torch.zeros(0, 3), "a": torch.randn(3, 5).half().T}
    write_tensors(tmp_path / "file.safetensors", tensors)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "file.safetensors").read_bytes() == save(plain, metadata={"format": "pt"})


def test_nothing_is_unpickled(compressed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle runs code; loading must do without."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(owner, name, refuse)
    subbit.load(compressed("llama-gqa"))
    subbit.inspect(compressed("llama-gqa"))


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(directory: Path) -> None:
    path = directory / "model-layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_to_nothing(directory: Path) -> None:
    (directory / "model-layer-00001.safetensors").write_bytes(b"")


def truncate_header(directory: Path) -> None:
    path = directory / "model-layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def flip_code(directory: Path) -> None:
    """One bit of one packed tensor: sizes and headers stay right."""
    flip(directory, "model-layer-00001.safetensors")


def flip_embedding(directory: Path) -> None:
    flip(directory, "model-rest.safetensors")


def flip(directory: Path, file: str) -> None:
    raw = bytearray((directory / file).read_bytes())
    raw[-200] ^= 16
    (directory / file).write_bytes(raw)


def garble_header(directory: Path) -> None:
    path = directory / "model-layer-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)


def header_without_offsets(directory: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "BF16"}}).encode()
    contents = len(header).to_bytes(8, "little") + header
    (directory / "model-rest.safetensors").write_bytes(contents)


def header_that_is_a_list(directory: Path) -> None:
    (directory / "model-rest.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def remove_shard(directory: Path) -> None:
    (directory / "model-layer-00001.safetensors").unlink()


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """See :func:`change_file`; of the shard of layer 1."""
    change_file(directory, "model-layer-00001.safetensors", change)


CODES = "model.layers.1.mlp.up_proj.codes"


def remove_packed(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop(CODES))


def rename_packed(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update({CODES[:-1]: tensors.pop(CODES)}))


def reshape_packed(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update({CODES: tensors[CODES][:, 1:].contiguous()}))


def retype_packed(directory: Path) -> None:
    name = "model.layers.1.mlp.up_proj.scales"
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))


def remove_norm(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))


def remove_dense_linear(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))


def reshape_norm(directory: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:32].clone()}))


def index_names_too_much(directory: Path) -> None:
    (directory / "subbit_manifest.json").unlink()
    edit_json(
        directory / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.extra": "model-rest.safetensors"}),
    )


def index_points_outside(directory: Path) -> None:
    shutil.move(directory / "model-rest.safetensors", directory.parent / "elsewhere.safetensors")
    edit_json(
        directory / "model.safetensors.index.json",
        lambda index: index.update(
            weight_map={
                name: "../elsewhere.safetensors" if "rest" in file else file
                for name, file in index["weight_map"].items()
            }
        ),
    )


def index_without_map(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def index_is_no_json(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{")


def edit_quantization(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))


def newer_format(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: quantization.update(format_version=99))


def no_format(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: quantization.update(format_version="one"))


def no_linears(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: quantization.pop("linears"))


def linears_are_a_list(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: quantization.update(linears=[1]))


def unknown_kind(directory: Path) -> None:
    edit_quantization(
        directory, lambda quantization: next(iter(quantization["linears"].values())).update(kind="spiral")
    )


def unknown_field(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: next(iter(quantization["linears"].values())).update(colour=1))


def wrong_spec_type(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: next(iter(quantization["linears"].values())).update(m="8"))


def impossible_spec(directory: Path) -> None:
    edit_quantization(directory, lambda quantization: next(iter(quantization["linears"].values())).update(block_size=0))


def linear_that_the_model_lacks(directory: Path) -> None:
    def change(quantization: dict[str, Any]) -> None:
        quantization["linears"]["model.layers.7.mlp.up_proj"] = quantization["linears"]["model.layers.1.mlp.up_proj"]

    edit_quantization(directory, change)


def manifest_is_no_json(directory: Path) -> None:
    (directory / "subbit_manifest.json").write_text("{")


def manifest_of_another_shape(directory: Path) -> None:
    edit_json(directory / "subbit_manifest.json", lambda manifest: manifest.update(layers=[3]))


def files_of_the_manifest_are_a_list(directory: Path) -> None:
    edit_json(directory / "subbit_manifest.json", lambda manifest: manifest.update(files=[]))


DAMAGES: dict[Damage, str] = {
    truncate: "model-layer-00001.safetensors has [0-9]+ bytes where its header says",
    truncate_to_nothing: "model-layer-00001.safetensors is truncated or no safetensors",
    truncate_header: "model-layer-00001.safetensors is truncated or no safetensors",
    flip_code: "model-layer-00001.safetensors is not the file that was written",
    flip_embedding: "model-rest.safetensors is not the file that was written",
    garble_header: "model-layer-00001.safetensors cannot be read as safetensors",
    header_without_offsets: "model-rest.safetensors cannot be read as safetensors",
    header_that_is_a_list: "model-rest.safetensors cannot be read as safetensors",
    remove_shard: "model-layer-00001.safetensors is missing",
    remove_packed: f"the packed tensor {CODES} is missing",
    rename_packed: f"the packed tensor {CODES} is missing",
    reshape_packed: rf"{CODES} is U8 \[128, [0-9]+\], not",
    retype_packed: r"up_proj.scales is BF16 .*, not torch.float16",
    remove_norm: "model.layers.1.input_layernorm.weight is missing",
    remove_dense_linear: "model.layers.1.self_attn.q_proj, which was left dense, is missing",
    reshape_norm: r"model.layers.1.input_layernorm.weight is \[32\]",
    index_names_too_much: "model.extra is not in model-rest.safetensors",
    index_points_outside: "outside",
    index_without_map: "weight_map",
    index_is_no_json: "model.safetensors.index.json cannot be read as JSON",
    newer_format: "format version 99.*upgrade|format version 99.*pip install -U",
    no_format: "format_version 'one'",
    no_linears: "linears",
    linears_are_a_list: "linears",
    unknown_kind: "kind 'spiral'",
    unknown_field: "colour",
    wrong_spec_type: "the description of .* makes no sense",
    impossible_spec: "the description of .* makes no sense",
    linear_that_the_model_lacks: "model.layers.7.mlp.up_proj",
    manifest_is_no_json: "subbit_manifest.json cannot be read as JSON .*; get it again",
    manifest_of_another_shape: "subbit_manifest.json is damaged; get it again",
    files_of_the_manifest_are_a_list: "subbit_manifest.json is damaged; get it again",
}


@pytest.mark.parametrize("plain", [False, True], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_and_never_random_weights(damage: Damage, plain: bool, copied: Path) -> None:
    """The same error from ``subbit.load`` and from transformers, unless that stumbles before it asks subbit."""
    damage(copied)
    if plain and damage in (index_is_no_json, index_without_map):
        with pytest.raises(Exception):  # noqa: B017, PT011
            AutoModelForCausalLM.from_pretrained(copied)
        return
    load: Callable[[Path], Any] = AutoModelForCausalLM.from_pretrained if plain else subbit.load
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_checkpoint(copied: Path, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """None at all, without a config, a dense model, an unfinished run."""
    (copied / "config.json").unlink()
    (tmp_path / "unfinished" / ".subbit").mkdir(parents=True)
    for directory, complaint in {
        tmp_path / "nowhere": "is no directory",
        copied: "has no config.json",
        sources("llama-gqa"): "was not compressed by subbit",
        tmp_path / "unfinished": "is unfinished.*--resume",
    }.items():
        for call in (subbit.load, subbit.inspect):
            with pytest.raises(CheckpointError, match=complaint) as caught:
                call(directory)
            assert "\n" not in str(caught.value)


def test_a_config_without_quantization_loads_no_random_weights(copied: Path) -> None:
    """Without subbit's section transformers knows nothing of packed linears; subbit refuses the directory."""
    edit_json(copied / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="no subbit quantization_config"):
        subbit.load(copied)


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3", "mixtral", "qwen3-moe"])
def test_saved_again_it_is_the_same(family: str, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    """``save_pretrained`` to another place keeps every packed byte; both ways of loading and inspect work there."""
    model, tokenizer = subbit.load(compressed(family))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    before, after = parse_headers(compressed(family))[0], parse_headers(tmp_path / "saved")[0]
    packed = [name for name in before if name.rpartition(".")[2] in PACKED]
    assert packed
    assert all(before[name]["shape"] == after[name]["shape"] for name in packed)
    assert all(before[name]["dtype"] == after[name]["dtype"] for name in packed)
    expected = logits_of(model)
    again, again_tokenizer = subbit.load(tmp_path / "saved")
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)
    assert again_tokenizer("the river").input_ids == tokenizer("the river").input_ids
    here, there = subbit.inspect(compressed(family)), subbit.inspect(tmp_path / "saved")
    for key in ("linear_weights", "linear_bytes", "dense_bytes", "parameters", "left_dense", "method", "sparsity"):
        assert there[key] == here[key], key
    assert there["bits"]["stored"] == here["bits"]["stored"]
    assert there["bits"]["nominal"] == here["bits"]["nominal"]


def test_saved_in_shards(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    """However transformers cuts the files."""
    model, _ = subbit.load(compressed("llama-gqa"))
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_stay_float16_whatever_the_model_is_cast_to(
    dtype: torch.dtype, compressed: Callable[[str], Path]
) -> None:
    """They are what the file says, bit for bit: loaded in a dtype, or cast to it by ``to`` of the model or a layer."""
    directory = compressed("llama-gqa")
    stored = {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    cast = AutoModelForCausalLM.from_pretrained(directory).to(dtype)
    there_and_back = AutoModelForCausalLM.from_pretrained(directory).to(torch.bfloat16).to(torch.float32).to(dtype)
    parts = AutoModelForCausalLM.from_pretrained(directory)
    for layer in parts.model.layers:
        layer.float()
        layer.half()
    for model in (loaded, cast, there_and_back, parts):
        scales = scales_of(model)
        assert len(scales) == 20
        for name, value in scales.items():
            assert value.dtype == torch.float16
            assert torch.equal(value.view(torch.int16), stored[f"{name}.scales"].view(torch.int16))
    for model in (loaded, cast, there_and_back):
        assert model.model.norm.weight.dtype == dtype
        assert logits_of(model).dtype == dtype
        assert bool(logits_of(model).isfinite().all())


def test_generate(compressed: Callable[[str], Path]) -> None:
    """With a cache, greedily and by sampling, in a batch, for a loaded model as for any other."""
    model, tokenizer = subbit.load(compressed("llama-gqa"), dtype=torch.float32)
    inputs = tokenizer("the river", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy.shape[1] == inputs.input_ids.shape[1] + 8
    with torch.no_grad():
        step = model(input_ids=greedy[:, :-1]).logits[:, inputs.input_ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(step, greedy[:, inputs.input_ids.shape[1] :])
    batch = model.generate(inputs.input_ids.repeat(2, 1), max_new_tokens=4, do_sample=True, pad_token_id=0)
    assert len(batch) == 2


def test_load_gives_a_model_for_inference(compressed: Callable[[str], Path]) -> None:
    """In eval mode, on the device asked for, printable, with a tokenizer; "auto" is the dtype of the source."""
    model, tokenizer = subbit.load(compressed("llama-gqa"))
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("the river").input_ids, skip_special_tokens=True) == "the river"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print(model)
    assert "SubbitLinear(64, 64, " in printed.getvalue()
    same = AutoTokenizer.from_pretrained(compressed("llama-gqa"))
    assert same.get_vocab() == tokenizer.get_vocab()


def test_state_dict_round_trip(compressed: Callable[[str], Path]) -> None:
    """torch's own way of copying weights works too."""
    model, _ = subbit.load(compressed("llama-gqa"), dtype=torch.float32)
    other, _ = subbit.load(compressed("llama-gqa"), dtype=torch.float32)
    for scales in scales_of(other).values():
        scales.zero_()
    assert not torch.equal(logits_of(other), logits_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
