"""Sources, layouts and streaming: a model run one decoder layer at a time must equal the model run at once.

Run with `pytest tests/test_models.py`.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES, VOCABULARY, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subbit.errors import UserError
from subbit.models.layout import ModelLayout, find_layout, fused_groups, layer_linears, uncompressed_matrices
from subbit.models.source import ModelSource, open_source
from subbit.models.streaming import LayerCall, capture_inputs, materialize, release, run_head, run_layer


def windows(samples: int = 3, seq_len: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, seq_len), generator=torch.Generator().manual_seed(1))


def is_meta(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def is_real(module: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def stream(source: ModelSource, ids: Tensor) -> Tensor:
    """Logits of the streamed model; asserts on the way that never more than one decoder layer is in memory."""
    model = source.skeleton()
    layout = find_layout(model)
    hidden, calls = capture_inputs(model, layout, source, ids)
    assert is_meta(model)
    layers = layout.layers(model)
    for index, layer in enumerate(layers):
        materialize(layer, layout.layer_name(index), source)
        assert is_real(layer)
        assert all(is_meta(other) for other in layers if other is not layer)
        with torch.no_grad():
            hidden = run_layer(layer, calls[index], hidden)
        release(layer)
    logits = run_head(model, layout, source, hidden)
    assert is_meta(model)
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama-gqa", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A private copy of a good model, for a test to break."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- streaming equals the whole model --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_models(family: str, tmp_path: Path) -> None:
    sharded = {"max_shard_size": "100KB"} if family == "qwen3" else {}
    source = open_source(save_tiny(family, tmp_path, **sharded))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(sharded)
    assert source.note is None
    ids = windows()
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=ids).logits
    torch.testing.assert_close(stream(source, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_mixtures_of_experts_are_streamed_like_any_model(family: str, tmp_path: Path) -> None:
    source = open_source(save_tiny(family, tmp_path))
    assert source.note is None
    ids = windows()
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=ids).logits
    torch.testing.assert_close(stream(source, ids), expected, rtol=1e-5, atol=1e-5)
    model = source.skeleton()
    layer = find_layout(model).layers(model)[-1]
    assert uncompressed_matrices(layer) == {"mlp.gate.weight": (4, 64)}
    assert sum(".experts." in name for name in layer_linears(layer)) == 12


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_load_model_equals_the_saved_model(family: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(family, tmp_path)))
    ids = windows()
    with torch.no_grad():
        torch.testing.assert_close(source.load_model()(input_ids=ids).logits, tiny_model(family)(input_ids=ids).logits)


def test_bfloat16_checkpoints_are_read_as_float32(tmp_path: Path) -> None:
    tiny_model("llama-mha").to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.dtype == torch.bfloat16
    assert source.tensor("lm_head.weight").dtype == torch.bfloat16
    ids = windows()
    with torch.no_grad():
        expected = source.load_model()(input_ids=ids).logits
    torch.testing.assert_close(stream(source, ids), expected, rtol=1e-5, atol=1e-5)


def test_captured_calls_keep_sliding_and_full_attention_apart(tmp_path: Path) -> None:
    source = open_source(save_tiny("gemma3", tmp_path))
    model = source.skeleton()
    steps: list[tuple[int, int]] = []
    layout = find_layout(model)
    hidden, calls = capture_inputs(model, layout, source, windows(), progress=lambda *step: steps.append(step))
    assert hidden.shape == (3, 24, 64)
    assert hidden.dtype == torch.float32
    assert len(calls) == 4
    assert steps == [(1, 3), (2, 3), (3, 3)]
    rotary = [call.kwargs["position_embeddings"][0] for call in calls]
    assert torch.equal(rotary[0], rotary[2])
    assert not torch.equal(rotary[0], rotary[1])
    assert all("forward" not in vars(layer) for layer in layout.layers(model))


# ---- names and ties --------------------------------------------------------------------------------------------------


def rename(directory: Path, change: Callable[[str], str]) -> None:
    path = directory / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_names_are_the_modules_and_tied_ones_are_served(llama: Path) -> None:
    source = open_source(llama)
    assert source.tied == ["lm_head.weight"]
    assert set(source.names) | set(source.tied) == set(source.skeleton().state_dict())
    assert torch.equal(source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight"))
    assert "model.norm.weight" in source
    assert "model.nothing.weight" not in source
    with pytest.raises(KeyError):
        source.tensor("model.nothing.weight")


def test_materializing_a_whole_model_keeps_ties(llama: Path) -> None:
    source = open_source(llama)
    model = source.skeleton()
    materialize(model, "", source)
    assert is_real(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = windows()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_model("llama-gqa")(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_checkpoint_without_the_base_prefix_is_matched(family: str, tmp_path: Path) -> None:
    rename(save_tiny(family, tmp_path), lambda name: name.removeprefix("model."))
    source = open_source(tmp_path)
    assert source.note is None
    assert find_layout(source.skeleton()).layer_name(0) + ".self_attn.q_proj.weight" in source.names
    assert stream(source, windows()).shape == (3, 24, VOCABULARY)


def test_only_the_head_of_a_tied_pair_is_stored(broken: Path) -> None:
    rename(broken, lambda name: "lm_head.weight" if "embed_tokens" in name else name)
    source = open_source(broken)
    assert source.tied == ["model.embed_tokens.weight"]
    ids = windows()
    with torch.no_grad():
        expected = tiny_model("llama-gqa")(input_ids=ids).logits
    torch.testing.assert_close(stream(source, ids), expected, rtol=1e-5, atol=1e-5)


def test_tokenizer_round_trip(llama: Path) -> None:
    tokenizer = open_source(llama).tokenizer()
    text = "The harbour, 1984: boats & rain.\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < VOCABULARY
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tiny_tokenizer()) <= VOCABULARY


# ---- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prefix", "count"),
    [("llama-mha", "model.layers", 3), ("opt", "model.decoder.layers", 3), ("gemma3", "model.layers", 4)],
)
def test_layout_is_found(family: str, prefix: str, count: int) -> None:
    assert find_layout(tiny_model(family)) == ModelLayout(prefix, count)


def test_layout_of_a_model_without_layers() -> None:
    model = tiny_model("llama-mha")
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="no list of 7 decoder layers"):
        find_layout(model)


def test_linears_and_matrices_of_a_layer() -> None:
    layer = tiny_model("phi3").model.layers[0]
    assert list(layer_linears(layer)) == [
        "self_attn.o_proj",
        "self_attn.qkv_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    assert uncompressed_matrices(layer) == {}


def test_fused_groups() -> None:
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert fused_groups(names) == [names[:3], [names[3]], names[4:6], [names[6]]]
    other = ["a.k_proj", "b.k_proj", "a.v_proj", "a.fc1", "q_proj"]
    assert fused_groups(other) == [["a.k_proj", "a.v_proj"], ["b.k_proj"], ["a.fc1"], ["q_proj"]]


# ---- run_layer and the guards of capture_inputs ----------------------------------------------------------------------


class Biased(nn.Module):
    """A layer of the older kind: returns a tuple, and is given something that has no batch dimension."""

    def forward(self, hidden: Tensor, bias: Tensor) -> tuple[Tensor]:
        assert bias.shape[0] in (4, hidden.shape[0])
        return (hidden + bias.sum(0),)


def test_run_layer_loops_where_a_call_cannot_be_broadcast() -> None:
    hidden = torch.randn(3, 5, 8)
    bias = torch.randn(4, 5, 8)
    assert torch.equal(run_layer(Biased(), LayerCall((bias,), {}), hidden), hidden + bias.sum(0))


def capture_patched(directory: Path, patch: Callable[[Any], None], ids: Tensor | None = None) -> Any:
    source = open_source(directory)
    model = source.skeleton()
    patch(model)
    return capture_inputs(model, find_layout(model), source, windows() if ids is None else ids)


def run_layers(change: Callable[[int, Any, Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Give a LLaMA a forward of its own: embeddings, then `change(index, layer, ids, hidden)` for each layer."""

    def patch(model: Any) -> None:
        def forward(input_ids: Tensor, **_: Any) -> None:
            hidden = model.model.embed_tokens(input_ids)
            for index, layer in enumerate(model.model.layers):
                hidden = change(index, layer, input_ids, hidden)

        model.forward = forward

    return patch


def test_models_that_index_the_output_of_a_layer(llama: Path) -> None:
    hidden, calls = capture_patched(llama, run_layers(lambda index, layer, ids, hidden: layer(hidden)[0]))
    assert hidden.shape == (3, 24, 64)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, layer, ids, hidden: layer(hidden * 2), "changes the hidden states between"),
        (lambda index, layer, ids, hidden: layer(layer(hidden)), "once each, in order"),
        (lambda index, layer, ids, hidden: layer(hidden, ids=ids), "depend on the tokens"),
        (lambda index, layer, ids, hidden: layer(hidden) if index else hidden, "once each, in order"),
        (lambda index, layer, ids, hidden: hidden, "did not run the decoder layers"),
    ],
)
def test_models_that_cannot_be_streamed_are_refused(llama: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        capture_patched(llama, run_layers(change))


def test_windows_must_fit_the_model(llama: Path) -> None:
    with pytest.raises(UserError, match="exceed the model's 256 positions"):
        capture_patched(llama, lambda model: None, windows(1, 300))
    with pytest.raises(UserError, match="token id 128 does not fit the model's 128 embeddings"):
        capture_patched(llama, lambda model: None, torch.full((1, 8), 128))


def test_a_buffer_that_nobody_can_compute(llama: Path) -> None:
    source = open_source(llama)
    layer = source.skeleton().model.layers[0]
    layer.register_buffer("secret", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(UserError, match=r"buffer model\.layers\.0\.secret"):
        materialize(layer, "model.layers.0", source)


def test_not_a_number_is_refused_by_name(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    source = open_source(broken)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* NaN"):
        materialize(source.skeleton().model.layers[1], "model.layers.1", source)


# ---- what can be wrong with a source ---------------------------------------------------------------------------------


def refused(model: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("nowhere.gguf")
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    assert "not a .gguf" in refused(tmp_path / "file.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "gated", "offline"])
def test_hub_failures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    kinds: dict[str, type[Exception]] = {
        "missing": RepositoryNotFoundError,
        "gated": GatedRepoError,
        "offline": LocalEntryNotFoundError,
    }
    # Not by calling the class: it wants the response of whichever HTTP client this version of the hub uses.
    error = kinds[kind].__new__(kinds[kind])
    error.args = ("no route to host\nmore",)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    words = {"missing": "neither a local path nor", "gated": "accept its licence", "offline": "no route to host"}
    assert words[kind] in refused("some/model")


def test_a_hub_model_is_fetched_without_pickles_or_code(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(model: str, **kwargs: Any) -> str:
        asked.update(kwargs, model=model)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("some/model").directory == llama
    assert asked["model"] == "some/model"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"quantization_config": {"quant_method": "subbit"}}, "already compressed by subbit"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "t5 model, which is no causal"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which is no causal"),
        ({"model_type": "unheard-of"}, "transformers cannot read"),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "c.C"}}, "trust_remote_code"),
    ],
)
def test_configs_that_are_refused(broken: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(broken, **changes)
    with pytest.raises(UserError, match=message):
        open_source(broken)


def test_damaged_files(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"this is no header" * 8)
    assert "no valid safetensors file" in refused(broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "never reads" in refused(broken)
    (broken / "pytorch_model.bin").unlink()
    assert "no weights" in refused(broken)
    (broken / "a.gguf").touch()
    (broken / "b.gguf").touch()
    assert "2 .gguf files" in refused(broken)
    (broken / "a.safetensors").touch()
    (broken / "b.safetensors").touch()
    assert "no model.safetensors.index.json" in refused(broken)
    (broken / "config.json").write_text("{")
    assert "no valid JSON" in refused(broken)


def test_damaged_shards(tmp_path: Path) -> None:
    save_tiny("llama-mha", tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(weight_map.items()))
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra": shard}}))
    assert "names tensor model.extra" in refused(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {name: "../elsewhere.safetensors"}}))
    assert "outside the model directory" in refused(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / shard).unlink()
    assert f"names {shard}, which is missing" in refused(tmp_path)
    index.write_text("{}")
    assert "no weight_map" in refused(tmp_path)


def test_a_missing_parameter(broken: Path) -> None:
    rename(broken, lambda name: name.replace("layers.1.mlp.up_proj", "layers.1.mlp.sideways"))
    assert "model.layers.1.mlp.up_proj.weight" in refused(broken)


def test_shapes_that_do_not_fit_the_config(broken: Path) -> None:
    edit_config(broken, intermediate_size=96)
    assert "transformers cannot load" in refused(broken)


def test_integer_weights_are_quantized(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, broken / "model.safetensors", metadata={"format": "pt"})
    assert f"tensor {name} is I8" in refused(broken)


def test_no_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    source = open_source(broken)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        source.tokenizer()
    for path in broken.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer files"):
        source.tokenizer()


def write_gguf(path: Path) -> None:
    """A one-layer float32 LLaMA without a tokenizer's tables beyond the tokens themselves."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(40)
    writer.add_token_list([f"t{i}" for i in range(40)])
    rows: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    rows |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}.weight": shape for name, shape in rows.items()}
    shapes |= {"token_embd.weight": (40, 32), "output_norm.weight": (32,)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_is_held_in_memory_and_can_be_saved_as_dense(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf")
    source = open_source(tmp_path)
    assert source.gguf_file == "model.gguf"
    assert source.note is not None
    assert source.note.startswith("GGUF files are dequantized")
    assert source.tied == ["lm_head.weight"]
    ids = windows() % 40
    model = source.load_model()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(stream(source, ids), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(stream(open_source(tmp_path / "dense"), ids), expected, rtol=1e-5, atol=1e-5)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "subbit[demo]"' in refused(tmp_path)


def test_a_damaged_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "cannot load" in refused(tmp_path / "model.gguf")
