"""Embedding and head in 8 and 4 bits: exact in the file and in the model, one copy where they are tied, all counted."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Lines, change_file, interrupt_at, logits_of, stored_tensors, token_ids
from commands import Run, assert_one_line
from families import VOCABULARY, save_model, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import subbit
from subbit import CheckpointError, Recipe, UserError
from subbit.checkpoint.reader import open_checkpoint
from subbit.checkpoint.writer import CheckpointWriter
from subbit.job import Job
from subbit.packing.embedding import EmbeddingSpec, pack_matrix, pack_rows, quantize_rows
from subbit.runtime.embedding import SubbitEmbedding, SubbitHead, TiedHead, embedding_scale

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]
Compress = Callable[..., Path]
TIED = {
    "llama-gqa": True,
    "llama-mha": False,
    "gemma3": True,
    "opt": True,
    "qwen2": True,
    "qwen3": False,
    "phi3": False,
}
ALL_DENSE = {"re:.*": {"dense": True}}


@pytest.fixture
def compress(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> Compress:
    """``compress(family or directory, width, …)``: the output; no linear is compressed unless ``overrides`` says so."""

    def run(source: str | Path, width: str = "8bit", out: str = "out", **fields: Any) -> Path:
        directory = source if isinstance(source, Path) else tiny(source)
        recipe = recipe_for(**{"method": "rtn", "embeddings": width, "overrides": ALL_DENSE, **fields})
        subbit.compress(directory, recipe, tmp_path / out)
        return tmp_path / out

    return run


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Some rows larger than others, as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def read_matrix(tensors: dict[str, Tensor], name: str, bits: int, columns: int) -> Tensor:
    """The matrix that docs/format.md defines, a weight at a time."""
    codes, zeros, scales = (tensors[f"{name}.{key}"] for key in ("codes", "zeros", "scales"))
    dense = torch.empty(len(codes), columns)
    for row in range(len(codes)):
        for column in range(columns):
            byte = int(codes[row, column * bits // 8])
            code = byte if bits == 8 else byte >> 4 * (column % 2) & 15
            dense[row, column] = float(scales[row, column // 64]) * (code - int(zeros[row, column // 64]))
    return dense


def dense_equivalent(source: Path, compressed: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of the source, with the weights that the compressed files stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    checkpoint, tensors = open_checkpoint(compressed), stored_tensors(compressed)
    for name, spec in {**checkpoint.specs, **checkpoint.embeddings.specs}.items():
        weight = spec.decode_rows({key: tensors[f"{name}.{key}"] for key in spec.tensors()})
        model.get_parameter(f"{name}.weight").data.copy_(weight)
    return model


def edit_section(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config."""
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def change_rest(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """See :func:`change_file`; of what is in no decoder layer."""
    change_file(directory, "model-rest.safetensors", change)


# ---- the packed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 128, 200])
def test_packing_is_exact(bits: int, columns: int) -> None:
    """What is unpacked is what was quantized; its dense value is that of the format; slices of rows too."""
    rows = quantize_rows(random_matrix(5, columns), bits)
    spec, tensors = pack_rows(rows)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
    assert spec.stored_bytes == 5 * (-(-columns * bits // 8) + 3 * -(-columns // 64))
    again = spec.unpack(tensors)
    assert torch.equal(again.codes, rows.codes)
    assert torch.equal(again.zeros, rows.zeros)
    assert torch.equal(again.scales, rows.scales)
    expected = read_matrix({f"x.{key}": tensor for key, tensor in tensors.items()}, "x", bits, columns)
    assert torch.equal(spec.decode_rows(tensors), expected)
    assert torch.equal(rows.dense(), expected)
    assert torch.equal(spec.decode_rows(spec.row_slice(tensors, slice(2, 4))), expected[2:4])
    assert EmbeddingSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(("bits", "error"), [(8, 0.006), (4, 0.1)])
def test_the_error_is_that_of_the_width(bits: int, error: float) -> None:
    """Of normal weights; and at 8 bits no weight is further off than about half a step."""
    matrix = random_matrix(200, 128)
    rows = quantize_rows(matrix, bits)
    lost = (rows.dense() - matrix).norm() / matrix.norm()
    assert 0.7 * error < float(lost) < error
    if bits == 8:
        step = rows.scales.float().repeat_interleave(64, dim=1)
        assert bool(((rows.dense() - matrix).abs() <= 0.7 * step).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_special_rows(bits: int) -> None:
    """Zero stays zero, weights of one sign and rows of one value too, and tiny ones become zero, not NaN."""
    matrix = torch.stack(
        [
            torch.zeros(64),
            torch.full((64,), 0.25),
            -torch.linspace(1, 2, 64),
            torch.full((64,), 1e-12),
            torch.eye(64)[3],
        ]
    )
    dense = quantize_rows(matrix, bits).dense()
    assert torch.allclose(dense, matrix, atol=2 / 2**bits)
    assert torch.equal(dense[0], matrix[0])
    assert torch.allclose(dense[1], matrix[1], rtol=1e-3)
    assert bool((dense[4][matrix[4] == 0] == 0).all())


def test_a_large_matrix_is_packed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles are no part of the result, and the error is that of the whole."""
    matrix = random_matrix(50, 96).to(torch.bfloat16)
    spec = EmbeddingSpec(50, 96, 4)
    whole, error = pack_matrix(matrix, spec)
    monkeypatch.setattr("subbit.packing.embedding.TILE_WEIGHTS", 700)
    tiles, same = pack_matrix(matrix, spec)
    assert all(torch.equal(tiles[name], whole[name]) for name in whole)
    lost = (spec.decode_rows(whole) - matrix.float()).norm() / matrix.float().norm()
    assert error == pytest.approx(float(lost), rel=1e-5)
    assert same == pytest.approx(error, rel=1e-5)


def test_what_no_encoder_writes_is_an_error() -> None:
    """A zero point beyond the codes, and scales that float16 does not hold."""
    spec, tensors = pack_rows(quantize_rows(random_matrix(3, 64), 4))
    tensors["zeros"][1] = 16
    with pytest.raises(CheckpointError, match="zero point is 16"):
        spec.unpack(tensors)
    with pytest.raises(OverflowError, match="float16"):
        pack_matrix(torch.full((2, 64), 1e9), EmbeddingSpec(2, 64, 8))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "width"), [*((family, "8bit") for family in TIED), ("llama-mha", "4bit"), ("gemma3", "4bit")]
)
def test_a_loaded_model_is_its_dense_equivalent(family: str, width: str, tiny: Tiny, compress: Compress) -> None:
    """With compressed linears as well; tied matrices are one in the file and in memory."""
    out = compress(family, width, overrides={})
    model, _ = subbit.load(out)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, SubbitEmbedding)
    assert isinstance(head, TiedHead if TIED[family] else SubbitHead)
    packed = [name for name in model.state_dict() if name.endswith(".zeros")]
    assert len(packed) == (1 if TIED[family] else 2)
    tensors = stored_tensors(out)
    assert not [name for name in tensors if "embed_tokens.weight" in name or name.startswith("lm_head.weight")]
    assert len([name for name in tensors if name.endswith(".zeros")]) == len(packed)
    bits = int(width[0])
    for name in packed:
        module = name.removesuffix(".zeros")
        size = sum(tensors[f"{module}.{key}"].nbytes for key in ("codes", "zeros", "scales"))
        assert size == VOCABULARY * (64 * bits // 8 + 3)
        dense = read_matrix(tensors, module, bits, 64)
        assert torch.equal(model.get_submodule(module).weight, dense)
    expected = logits_of(dense_equivalent(tiny(family), out))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tiny(family))), expected, rtol=1e-3)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out)), logits_of(model))


@pytest.mark.parametrize("family", ["gemma3", "llama-mha", "opt"])
def test_bfloat16(family: str, compress: Compress, tmp_path: Path) -> None:
    """The embedding gives the dtype of the model, rounded as the dense one rounds; casts of the model change it."""
    source = tmp_path / "source"
    save_model(tiny_model(family).to(torch.bfloat16), source)
    out = compress(source)
    model, _ = subbit.load(out)
    dense = dense_equivalent(source, out, torch.bfloat16)
    looked_up = model.get_input_embeddings()(token_ids())
    assert looked_up.dtype == torch.bfloat16
    assert torch.equal(looked_up, dense.get_input_embeddings()(token_ids()))
    assert logits_of(model).dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(dense))
    single = subbit.load(out)[0].to(torch.float32)
    assert single.get_input_embeddings()(token_ids()).dtype == torch.float32
    assert single.get_output_embeddings().weight.dtype == torch.float32
    scales = {name: tensor for name, tensor in single.state_dict().items() if name.endswith(".scales")}
    assert scales
    assert all(torch.equal(tensor, stored_tensors(out)[name]) for name, tensor in scales.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Embedding, Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_the_scale_of_an_embedding_is_kept(kind: Callable[..., nn.Embedding], dtype: torch.dtype) -> None:
    """Families that scale inside the embedding round in two ways."""
    torch.manual_seed(0)
    extra = {} if kind is nn.Embedding else {"embed_scale": 23.7}
    old = kind(10, 64, padding_idx=0, **extra).to(dtype)
    scale = embedding_scale(old)
    assert scale is not None
    spec, tensors = pack_rows(quantize_rows(old.weight.detach().float(), 8))
    new = SubbitEmbedding(spec, scale, dtype)
    new.load_state_dict(tensors)
    old.weight.data.copy_(new.weight)
    ids = torch.arange(10).view(2, 5)
    assert new(ids).dtype == dtype
    assert torch.equal(new(ids), old(ids))


def test_other_embeddings_have_no_known_lookup() -> None:
    """One that normalizes, one of another class, and what is no embedding."""

    class NormedEmbedding(nn.Embedding):
        pass

    assert embedding_scale(nn.Embedding(4, 4, max_norm=1.0)) is None
    assert embedding_scale(NormedEmbedding(4, 4)) is None
    assert embedding_scale(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "gemma3", "opt"])
def test_saved_again_it_is_the_same(family: str, compress: Compress, tmp_path: Path) -> None:
    """``save_pretrained`` writes every packed tensor once, and both ways of loading and inspect work there."""
    out = compress(family)
    model, _ = subbit.load(out)
    model.tie_weights()  # transformers' own tying finds nothing to tie
    for name, options in {"whole": {}, "shards": {"max_shard_size": "20KB"}}.items():
        save_model(model, tmp_path / name, **options)
        before, after = stored_tensors(out), stored_tensors(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        for again in (subbit.load(tmp_path / name)[0], AutoModelForCausalLM.from_pretrained(tmp_path / name)):
            assert torch.equal(logits_of(again), logits_of(model))
        here, there = subbit.inspect(out), subbit.inspect(tmp_path / name)
        for key in ("embeddings", "embedding_bytes", "dense_bytes", "linear_bytes", "parameters"):
            assert there[key] == here[key], key


def test_copies_stay_tied(compress: Compress) -> None:
    """A deep copy has its own matrix, which its embedding and its head share; state dicts fit."""
    model, _ = subbit.load(compress("llama-gqa"))
    other = copy.deepcopy(model)
    assert other.lm_head.embedding is other.model.embed_tokens
    other.model.embed_tokens.get_buffer("scales").zero_()
    assert bool((logits_of(other) == 0).all())
    assert not bool((logits_of(model) == 0).any())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))


def test_generate(compress: Compress) -> None:
    """Greedily with a cache, as step by step without."""
    model, tokenizer = subbit.load(compress("gemma3", "4bit"))
    inputs = tokenizer("the river", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy.shape[1] == inputs.input_ids.shape[1] + 8
    with torch.no_grad():
        step = model(input_ids=greedy[:, :-1]).logits[:, inputs.input_ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(step, greedy[:, inputs.input_ids.shape[1] :])


def test_resizing_is_refused(compress: Compress) -> None:
    """Not silently replaced by random rows."""
    model, _ = subbit.load(compress("llama-gqa"))
    with pytest.raises(TypeError, match="SubbitEmbedding"):
        model.resize_token_embeddings(VOCABULARY + 8)


# ---- which matrix is which -------------------------------------------------------------------------------------------


def rewrite_source(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Save a tied llama whose stored tensors are changed."""
    save_tiny("llama-gqa", directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_matrix_that_is_stored_under_the_heads_name(compress: Compress, tmp_path: Path) -> None:
    """Older files do so; it becomes the embedding's."""
    source = rewrite_source(tmp_path / "source", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    out = compress(source)
    assert not {EMBEDDING, HEAD} & stored_tensors(out).keys()
    model, _ = subbit.load(out)
    assert isinstance(model.lm_head, TiedHead)
    dense = dense_equivalent(source, out)
    assert torch.allclose(logits_of(model), logits_of(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_matrices_that_are_both_stored(equal: bool, compress: Compress, tmp_path: Path) -> None:
    """One if they are equal; two if not, as transformers loads them."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] * (1 if equal else 2)

    source = rewrite_source(tmp_path / "source", change)
    out = compress(source)
    assert len([name for name in stored_tensors(out) if name.endswith(".zeros")]) == (1 if equal else 2)
    model, _ = subbit.load(out)
    assert isinstance(model.lm_head, TiedHead if equal else SubbitHead)
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == equal
    assert torch.allclose(logits_of(model), logits_of(dense_equivalent(source, out)), rtol=1e-5, atol=1e-5)


def test_a_lookup_that_is_not_known_stays_dense(
    compress: Compress, tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the head that is tied to it, and with the reason in the file and in what inspect prints."""
    monkeypatch.setattr("subbit.embeddings.embedding_scale", lambda module: None)
    out = compress("llama-gqa", overrides={})
    facts = subbit.inspect(out)
    reason = "a Embedding, which is no lookup that subbit knows"
    assert facts["embeddings"] == {name: {"left_dense": reason} for name in ("lm_head", "model.embed_tokens")}
    assert facts["embedding_bytes"] == 0
    model, _ = subbit.load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits_of(model), logits_of(dense_equivalent(tiny("llama-gqa"), out)), rtol=1e-5, atol=1e-5)
    printed = run("inspect", out).out
    assert f"left dense: lm_head ({reason})" in printed
    assert "embeddings, norms, biases" in printed


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_calibration_sees_the_packed_embedding(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the first layer is what enters it in the compressed model."""
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []
    from subbit import pipeline

    original = pipeline.compress_layers

    def watch(job: Job, writer: CheckpointWriter, *args: Any) -> None:
        seen.append(writer.restore())
        original(job, writer, *args)

    monkeypatch.setattr(pipeline, "compress_layers", watch)
    model, _ = subbit.load(compress("gemma3", "4bit"))
    windows, hidden = seen[0]
    with torch.no_grad():
        assert torch.allclose(model.get_input_embeddings()(windows), hidden["student"], rtol=1e-6)


def test_every_matrix_is_packed_once_in_a_run(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration, distillation and the file share what was packed."""
    packed: list[EmbeddingSpec] = []

    def counted(matrix: Tensor, spec: EmbeddingSpec) -> tuple[dict[str, Tensor], float]:
        packed.append(spec)
        return pack_matrix(matrix, spec)

    monkeypatch.setattr("subbit.embeddings.pack_matrix", counted)
    compress("llama-mha", method="codes", overrides={}, distillation={"steps": 1}, calibration={"seq_len": 8})
    assert len(packed) == 2


@pytest.mark.parametrize("stop_at", ["layer 2/3", "model.embed_tokens = lm_head"])
def test_a_resumed_run_gives_the_same_files(stop_at: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Stopped among the layers, and when the embedding is packed; another width is another recipe."""
    recipe = recipe_for("rtn", embeddings="4bit")
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out", progress=Lines(interrupt_at(stop_at)))
    with pytest.raises(UserError, match="embeddings differs"):
        subbit.compress(tiny("llama-gqa"), recipe_for("rtn", embeddings="8bit"), tmp_path / "out", resume=True)
    progress = Lines()
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out", resume=True, progress=progress)
    expected = f"model.embed_tokens = lm_head: 4 bits, {128 * 64 * 4:,} → {128 * 35:,} bytes, relative error 0."
    assert progress.lines[-1].startswith(expected)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "subbit_log.jsonl":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_the_embeddings(compress: Compress, recipe_for: Recipes, tiny: Tiny, tmp_path: Path) -> None:
    """No linear has to be compressed where the embeddings are; otherwise there is nothing to do."""
    facts = subbit.inspect(compress("llama-gqa"))
    assert facts["bits"]["stored"] == 32
    assert len(facts["left_dense"]) == 21
    with pytest.raises(UserError, match="nothing to compress"):
        subbit.compress(tiny("llama-gqa"), recipe_for(overrides=ALL_DENSE), tmp_path / "nothing")


def test_a_model_without_linears(recipe_for: Recipes, tmp_path: Path) -> None:
    """GPT-2 has matrices of another class: its embedding can be packed, and an override for nothing is one line."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, eos_token_id=2)
    save_model(AutoModelForCausalLM.from_config(config), tmp_path / "source")
    with pytest.raises(UserError, match="matches no linear of the model, which has none"):
        subbit.compress(tmp_path / "source", recipe_for(embeddings="8bit", overrides=ALL_DENSE), tmp_path / "out")
    subbit.compress(tmp_path / "source", recipe_for(embeddings="8bit"), tmp_path / "out")
    model, _ = subbit.load(tmp_path / "out")
    expected = logits_of(dense_equivalent(tmp_path / "source", tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_nan_is_an_error(name: str, compress: Compress, tmp_path: Path) -> None:
    """As everywhere, before any work; so are weights beyond float16."""
    model = tiny_model("llama-mha")
    model.get_parameter(name).data[5, 3] = torch.nan
    for value, complaint in [(torch.nan, "NaN or infinity"), (1e9, "too large for float16.*embeddings: keep")]:
        model.get_parameter(name).data[5, 3] = value
        save_model(model, tmp_path / "source")
        with pytest.raises(UserError, match=f"{name.removesuffix('.weight')}.*{complaint}") as caught:
            compress(tmp_path / "source")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "config.json").exists()


def test_the_recipe(run: Run, tmp_path: Path) -> None:
    """keep is the default; anything else than the three words is one clear line."""
    assert Recipe().embeddings == "keep"
    assert Recipe.create({"embeddings": "4bit"}).to_dict()["embeddings"] == "4bit"
    with pytest.raises(UserError, match=r"^recipe: embeddings: Input should be 'keep', '8bit' or '4bit'$"):
        Recipe.create({"embeddings": "5bit"})
    ran = run("compress", "x", "-o", tmp_path / "o", "--embeddings", "5bit")
    assert_one_line(ran, "recipe: embeddings: Input should be 'keep', '8bit' or '4bit'")


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "width"), [("llama-gqa", "8bit"), ("llama-gqa", "keep"), ("llama-mha", "4bit"), ("opt", "4bit")]
)
def test_inspect_counts_the_bytes_of_the_files(family: str, width: str, compress: Compress, tiny: Tiny) -> None:
    """Four parts that add up to the files; the parameters are those of the dense model."""
    out = compress(family, width, overrides={})
    facts = subbit.inspect(out)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    tensors = stored_tensors(out)
    packed = [name for name in tensors if "embed_tokens." in name or name.startswith("lm_head.")]
    expected = 0 if width == "keep" else sum(tensors[name].nbytes for name in packed)
    assert facts["embedding_bytes"] == expected
    assert facts["linear_bytes"] + facts["embedding_bytes"] + facts["dense_bytes"] == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    parts = ("linear_bytes", "embedding_bytes", "dense_bytes", "header_bytes")
    assert sum(facts[part] for part in parts) == facts["file_bytes"]
    assert facts["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    dense = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert facts["parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    assert facts["bits"]["model"] == 8 * facts["file_bytes"] / facts["parameters"]
    if width == "keep":
        assert facts["embeddings"] == {}
        return
    entry = next(entry for entry in facts["embeddings"].values() if "bytes" in entry)
    bits = int(width[0])
    assert entry == {"label": f"{bits} bits", "stored": bits + 0.375, "weights": 8192, "bytes": 1024 * bits + 384}
    assert sum("tied_to" in entry for entry in facts["embeddings"].values()) == TIED[family]


def test_inspect_prints_it(compress: Compress, run: Run) -> None:
    """The parts by their names."""
    out = compress("llama-gqa", overrides={})
    printed = run("inspect", out).out
    assert "+ 8,576 packed embeddings + 1,792 norms, biases, others + " in printed
    assert "model.embed_tokens: 8 bits, 8.375 stored, 8,576 bytes" in printed
    assert "lm_head: the matrix of model.embed_tokens" in printed


# ---- damage ----------------------------------------------------------------------------------------------------------


CODES = "model.embed_tokens.codes"
Damage = Callable[[Path], None]


def section(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda directory: edit_section(directory, lambda quantization: change(quantization["embeddings"]))


def rest(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda directory: change_rest(directory, change)


def smaller(directory: Path) -> None:
    """A row less than the model has, in the file and in the section."""
    keys = ("codes", "zeros", "scales")
    change_rest(
        directory,
        lambda t: t.update({f"model.embed_tokens.{k}": t[f"model.embed_tokens.{k}"][1:].clone() for k in keys}),
    )
    edit_section(directory, lambda q: q["embeddings"]["model.embed_tokens"].update(out_features=VOCABULARY - 1))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (rest(lambda t: t.pop(CODES)), f"the packed tensor {CODES} is missing"),
    "misshapen": (rest(lambda t: t.update({CODES: t[CODES][:, 1:].clone()})), rf"{CODES} is U8 \[128, 63\], not"),
    "mistyped": (
        rest(lambda t: t.update({"model.embed_tokens.scales": t["model.embed_tokens.scales"].float()})),
        "embed_tokens.scales is F32 .*, not torch.float16",
    ),
    "no section": (lambda d: edit_section(d, lambda q: q.pop("embeddings")), "model.embed_tokens.weight is missing"),
    "a list": (lambda d: edit_section(d, lambda q: q.update(embeddings=[1])), "embeddings makes no sense"),
    "no spec": (section(lambda s: s.update({"lm_head": 3})), "embeddings makes no sense"),
    "5 bits": (section(lambda s: s["model.embed_tokens"].update(bits=5)), "embeddings makes no sense"),
    "no groups": (section(lambda s: s["model.embed_tokens"].update(group_size=0)), "embeddings makes no sense"),
    "unknown kind": (section(lambda s: s["model.embed_tokens"].update(kind="spiral")), "kind 'spiral'"),
    "unknown field": (section(lambda s: s["model.embed_tokens"].update(colour=1)), "colour"),
    "tied to nothing": (section(lambda s: s["lm_head"].update(to="model.nowhere")), "embeddings makes no sense"),
    "no such module": (section(lambda s: s.update(elsewhere=s.pop("lm_head"))), "elsewhere"),
    "another size": (smaller, r"model.embed_tokens is \(128, 64\) in the model, but 127, 64 in the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(damage: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """The same from ``subbit.load`` and from transformers; never random numbers."""
    whole = checkpoint_of("llama-gqa", "rtn", embeddings="8bit", overrides=ALL_DENSE)
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    change, complaint = DAMAGES[damage]
    change(out)
    for load in (subbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=complaint) as caught:
            load(out)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_the_section_is_one_with_dense_embeddings(compress: Compress, tiny: Tiny) -> None:
    """The key is optional."""
    out = compress("llama-gqa", "keep", overrides={})
    edit_section(out, lambda quantization: quantization.pop("embeddings"))
    model, _ = subbit.load(out)
    assert torch.allclose(logits_of(model), logits_of(dense_equivalent(tiny("llama-gqa"), out)), rtol=1e-5, atol=1e-5)
    assert subbit.inspect(out)["embeddings"] == {}
