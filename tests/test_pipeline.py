"""The whole way from a model to a loaded checkpoint: what is loaded is exactly what the method returned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from checkpoints import Lines, logits_of, stored_tensors
from families import FAMILIES, VOCABULARY, save_model, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import subbit
from subbit import CheckpointError, Recipe, UserError
from subbit.evaluation.perplexity import evaluate_perplexity
from subbit.job import Job
from subbit.packing.layout import GroupedBinarySpec
from subbit.pipeline import compress_layers
from subbit.runtime.linear import SubbitLinear

TEXT = "The river, & an old mill."
Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]
CheckpointOf = Callable[..., Path]


def dense_weights(directory: Path) -> dict[str, Tensor]:
    """Dense weight of every compressed linear by module name, from the files of a checkpoint."""
    linears = json.loads((directory / "config.json").read_text())["quantization_config"]["linears"]
    tensors = stored_tensors(directory)
    result = {}
    for name, values in linears.items():
        spec = GroupedBinarySpec.from_dict(values)
        result[name] = spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()}).dense()
    return result


def dense_equivalent(source: Path, compressed: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of the source, with the weights that the compressed files stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    for name, weight in dense_weights(compressed).items():
        model.get_parameter(f"{name}.weight").data.copy_(weight)
    return model


def events(directory: Path, event: str) -> list[dict[str, Any]]:
    """The entries of one kind in the log."""
    entries = [json.loads(line) for line in (directory / "subbit_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


def sparsities(directory: Path) -> dict[str, int]:
    """N of every compressed linear, from config.json."""
    config = json.loads((directory / "config.json").read_text())
    return {name: spec["n"] for name, spec in config["quantization_config"]["linears"].items()}


def assert_no_checkpoint(directory: Path) -> None:
    """Nothing at ``directory`` can be taken for a finished checkpoint."""
    assert not (directory / "config.json").exists()
    with pytest.raises(CheckpointError):
        subbit.load(directory)


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "pbs2p") for family in FAMILIES), ("opt", "stbllm"), ("mistral", "stbllm")]
)
def test_a_loaded_model_is_its_dense_equivalent(
    family: str, method: str, tiny: Tiny, checkpoint_of: CheckpointOf
) -> None:
    """Every linear is compressed, every group keeps N of M, and the logits are those of the unpacked weights."""
    out = checkpoint_of(family, method)
    model, tokenizer = subbit.load(out)
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(tiny(family))(TEXT).input_ids
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    packed = {name: module for name, module in model.named_modules() if isinstance(module, SubbitLinear)}
    assert not any(isinstance(m, nn.Linear) for name, m in model.named_modules() if ".layers." in name)
    dense = dense_weights(out)
    assert packed.keys() == dense.keys()
    for name, module in packed.items():
        assert isinstance(module.spec, GroupedBinarySpec)
        weight = module.spec.decode_rows(module.packed())
        assert torch.equal(weight, dense[name])
        kept = (weight.unflatten(1, (-1, 8)) != 0).sum(dim=2)
        assert int(kept.max()) <= module.spec.n
        assert math.isclose(float(kept.float().mean()), module.spec.n, rel_tol=0.02)
    expected = logits_of(dense_equivalent(tiny(family), out))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1  # the comparison is not one of zeros


def test_a_bfloat16_model_stays_bfloat16(recipe_for: Recipes, tmp_path: Path) -> None:
    """What is not compressed keeps its dtype, "auto" loads it so, and both dtypes give the dense equivalent."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(tiny_model("qwen2").to(torch.bfloat16), source)
    subbit.compress(source, recipe_for(), out)
    stored = stored_tensors(out)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    auto, _ = subbit.load(out)
    assert auto.dtype == torch.bfloat16
    assert torch.equal(logits_of(auto), logits_of(dense_equivalent(source, out, torch.bfloat16)))
    single, _ = subbit.load(out, dtype=torch.float32)
    assert torch.allclose(logits_of(single), logits_of(dense_equivalent(source, out)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", ["1:4", "7:8", "15:16"])
def test_every_group_size_survives_the_files(sparsity: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """M of 4, 8 and 16, with N at its limits."""
    recipe = recipe_for("stbllm", sparsity=sparsity, allocation={"kind": "uniform"}, options={"block_size": 48})
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out")
    model, _ = subbit.load(tmp_path / "out")
    expected = logits_of(dense_equivalent(tiny("llama-gqa"), tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_stored_once_and_stay_tied(tiny: Tiny, checkpoint_of: CheckpointOf) -> None:
    """The head is the embedding: one tensor in the file, one in memory, one in the count."""
    out = checkpoint_of("llama-gqa")
    model, _ = subbit.load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in stored_tensors(out)
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama-gqa"))
    assert subbit.inspect(out)["parameters"] == sum(p.numel() for p in dense.parameters())


def test_perplexity_before_packing_is_perplexity_after_loading(
    tiny: Tiny, checkpoint_of: CheckpointOf, text_file: Path
) -> None:
    """Nothing is lost on the way to the file and back."""
    out = checkpoint_of("mistral", "stbllm")
    dense = dense_equivalent(tiny("mistral"), out)
    before = evaluate_perplexity(dense, tiny_tokenizer(), str(text_file), seq_len=64)
    after = subbit.evaluate(out, [str(text_file)], seq_len=64)[str(text_file)]
    assert after.tokens == before.tokens
    assert math.isclose(after.value, before.value, rel_tol=1e-3)


def test_two_runs_of_one_recipe_give_the_same_bytes(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """All files but the log, whose lines carry times; the self-sampled text included."""
    recipe = recipe_for("stbllm", calibration={"source": "self"}, allocation={"kind": "outliers", "samples": 2})
    contents = []
    for name in ("one", "two"):
        subbit.compress(tiny("qwen3"), recipe, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.name != "subbit_log.jsonl")
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert {"config.json", "tokenizer.json", "subbit_manifest.json", "subbit_recipe.yaml"} <= contents[0].keys()


def test_the_bytes_do_not_depend_on_where_the_model_lies(
    tiny: Tiny, recipe_for: Recipes, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """No path of the machine gets into the files."""
    source = tmp_path / "a" / "copy of the model"
    source.mkdir(parents=True)
    for path in tiny("llama-mha").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    one = checkpoint_of("llama-mha")
    subbit.compress(source, recipe_for(), tmp_path / "two")
    for path in one.iterdir():
        if path.name != "subbit_log.jsonl":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
            assert str(one).encode() not in path.read_bytes()


def test_the_recipe_beside_the_weights_is_the_recipe(recipe_for: Recipes, checkpoint_of: CheckpointOf) -> None:
    """It can be read back, equal to what was given."""
    fields: dict[str, Any] = {"options": {"block_size": 64}, "overrides": {"re:o_proj$": {"sparsity": "6:8"}}}
    out = checkpoint_of("llama-mha", "stbllm", **fields)
    assert Recipe.from_yaml(out / "subbit_recipe.yaml") == recipe_for("stbllm", **fields)


# ---- how N is spread -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["value", "rank"])
@pytest.mark.parametrize("kind", ["uniform", "sine", "l2", "outliers", "cosine"])
def test_every_allocation_keeps_the_mean(
    kind: str, spread: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """The weighted mean of N/M is the target to within half a step of one unit."""
    allocation = {"kind": kind, "n_low": 2.0, "n_high": 6.0, "samples": 2, "spread": spread}
    recipe = recipe_for("stbllm", allocation=allocation, options={"candidates": 8})
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama-gqa"))
    sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in sparsities(tmp_path / "out")}
    numbers = sparsities(tmp_path / "out")
    missing = sum((numbers[name] - 4) * size for name, size in sizes.items())
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    largest_unit = layer if kind in ("sine", "cosine") else 2 * 64 * 128  # gate and up are one unit
    assert abs(missing) <= largest_unit / 2
    assert (len(set(numbers.values())) == 1) == (kind == "uniform")
    for index in range(3):
        prefix = f"model.layers.{index}"
        assert len({numbers[f"{prefix}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({numbers[f"{prefix}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
        if kind in ("sine", "cosine"):
            assert len({n for name, n in numbers.items() if name.startswith(prefix)}) == 1


def test_each_method_has_the_allocation_of_its_paper(recipe_for: Recipes) -> None:
    """STBLLM by the L2 norm of the weights, PBS²P by cosine similarity, and either can be changed."""
    assert recipe_for("stbllm").allocation.kind == "l2"
    assert recipe_for("pbs2p").allocation.kind == "cosine"
    assert recipe_for("pbs2p", allocation={"kind": "uniform"}).allocation.kind == "uniform"


def test_overrides(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """By name and by pattern; the first match counts; the rest is allocated as if they were not there."""
    overrides = {
        "model.layers.0.self_attn.q_proj": {"sparsity": "2:4"},
        r"re:layers\.1\..*down_proj$": {"dense": True},
        r"re:down_proj$": {"sparsity": "7:8"},
    }
    progress = Lines()
    recipe = recipe_for("stbllm", overrides=overrides, allocation={"kind": "uniform"})
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out", progress=progress)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = {name: f"{spec['n']}:{spec['m']}" for name, spec in config["linears"].items()}
    assert found.pop("model.layers.0.self_attn.q_proj") == "2:4"
    assert found.pop("model.layers.0.mlp.down_proj") == found.pop("model.layers.2.mlp.down_proj") == "7:8"
    assert set(found.values()) == {"4:8"}
    assert config["left_dense"] == {"model.layers.1.mlp.down_proj": "the recipe says so"}
    assert "left dense: model.layers.1.mlp.down_proj (the recipe says so)" in progress.lines
    source = stored_tensors(tiny("llama-gqa"))["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(stored_tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"], source)
    model, _ = subbit.load(tmp_path / "out")
    expected = logits_of(dense_equivalent(tiny("llama-gqa"), tmp_path / "out"))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_an_override_that_matches_nothing_is_a_mistake(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """A typing error in a name must not silently compress what should have stayed dense."""
    recipe = recipe_for(overrides={"model.layers.0.self_attn.qproj": {"dense": True}})
    with pytest.raises(UserError, match="qproj"):
        subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out")


def test_inputs_that_are_no_multiple_of_m_stay_dense(recipe_for: Recipes, tmp_path: Path) -> None:
    """They are listed with the reason, counted with their real bytes, and the rest is compressed."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = {"hidden_size": 64, "intermediate_size": 100}
    save_llama(source, **config)
    progress = Lines()
    subbit.compress(source, recipe_for("stbllm", allocation={"kind": "uniform"}), out, progress=progress)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    facts = subbit.inspect(out)
    assert facts["left_dense"] == dict.fromkeys(names, "in_features 100 is not a multiple of M = 8")
    assert sum(line.startswith("left dense: ") for line in progress.lines) == 2
    entries = {linear["name"]: linear for layer in facts["layers"] for linear in layer["linears"]}
    assert entries[names[0]] == {
        "name": names[0],
        "sparsity": "dense",
        "bits": {"nominal": 32.0, "stored": 32.0},
        "error": None,
        "weights": 6400,
        "bytes": 25600,
    }
    assert facts["linear_weights"] == sum(p.numel() for n, p in tiny_llama(**config).named_parameters() if "proj" in n)
    assert facts["bits"]["nominal"] > 5  # dense linears count in the nominal bits too
    model, _ = subbit.load(out)
    assert torch.allclose(logits_of(model), logits_of(dense_equivalent(source, out)), rtol=1e-5, atol=1e-5)


def test_nothing_to_compress_is_a_mistake(recipe_for: Recipes, tmp_path: Path) -> None:
    """No linear fits M."""
    save_llama(tmp_path / "source", hidden_size=36, intermediate_size=100, num_attention_heads=3, head_dim=12)
    with pytest.raises(UserError, match="nothing to compress"):
        subbit.compress(tmp_path / "source", recipe_for(), tmp_path / "out")
    assert_no_checkpoint(tmp_path / "out")


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["self", "jsonl", "wikitext2"])
def test_calibration_sources(
    kind: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    """The origin is told to the user, kept in the manifest and shown by inspect."""
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    text = text_file.read_text()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text[i::2]}) for i in range(2)))
    source = str(tmp_path / "text.jsonl") if kind == "jsonl" else kind
    progress = Lines()
    recipe = recipe_for("rtn", calibration={"source": source})
    subbit.compress(tiny("opt"), recipe, tmp_path / "out", progress=progress)
    origin = subbit.inspect(tmp_path / "out")["calibration"]
    said = {"self": "the model itself", "jsonl": "text.jsonl (2 documents)", "wikitext2": "stands in for train"}
    assert said[kind] in origin
    assert f"calibration: {origin}, 4 windows of 32 tokens" in progress.lines


def test_the_seed_changes_the_calibration(checkpoint_of: CheckpointOf) -> None:
    """And with it the result."""
    one, two = (stored_tensors(checkpoint_of("llama-mha", calibration={"seed": seed})) for seed in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_text_in_bfloat16_finds_nearly_the_same(checkpoint_of: CheckpointOf) -> None:
    """What is stored comes from other roundings, and is as good."""
    checkpoints = [checkpoint_of("llama-mha", calibration={"precision": dtype}) for dtype in ("float32", "bfloat16")]
    one, two = map(stored_tensors, checkpoints)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    exact, rounded = (fmean(linear["error"] for linear in events(out, "linear")) for out in checkpoints)
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_singular_gram_raises_the_damping_and_says_so(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Two tokens for 64 inputs and almost no damping: the factorization fails at first, the run does not."""
    recipe = recipe_for("stbllm", calibration={"samples": 1, "seq_len": 2}, options={"damping": 1e-30})
    progress = Lines()
    subbit.compress(tiny("llama-mha"), recipe, tmp_path / "out", progress=progress)
    raised = [entry for entry in events(tmp_path / "out", "linear") if entry["damping"] > 1e-30]
    assert raised
    for entry in raised:
        text = f"{entry['name']}: the Gram is ill-conditioned, damping raised to {entry['damping']:g}"
        assert text in progress.lines
    model, _ = subbit.load(tmp_path / "out")
    assert bool(logits_of(model).isfinite().all())


def test_the_log_tells_the_run(checkpoint_of: CheckpointOf) -> None:
    """Start, a line for every linear with its numbers and time, a line for every layer, the end."""
    out = checkpoint_of("llama-mha")
    assert len(events(out, "start")) == len(events(out, "finished")) == 1
    assert [entry["index"] for entry in events(out, "layer")] == [0, 1, 2]
    linears = events(out, "linear")
    assert len(linears) == 21
    for entry in linears:
        assert entry["tokens"] == 128
        assert entry["seconds"] >= 0
        assert 0 < entry["error"] < 1
        assert entry["damping"] == 0.01


# ---- what must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", math.nan),
        ("model.layers.1.mlp.up_proj.weight", math.nan),
        ("model.layers.1.mlp.up_proj.weight", math.inf),
        ("model.layers.2.input_layernorm.weight", math.inf),
        ("model.norm.weight", math.nan),
        ("lm_head.weight", math.inf),
    ],
)
def test_nan_in_the_source_is_named(name: str, value: float, recipe_for: Recipes, tmp_path: Path) -> None:
    """Wherever it is; and nothing that looks like a checkpoint stays behind."""
    model = tiny_model("llama-mha")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    save_model(model, tmp_path / "source")
    with pytest.raises(UserError, match=f"tensor {name} .*NaN or infinity") as caught:
        subbit.compress(tmp_path / "source", recipe_for("rtn"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert_no_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("method", ["stbllm", "gptq"])
def test_weights_too_large_for_float16_scales_are_named(method: str, recipe_for: Recipes, tmp_path: Path) -> None:
    """Scales are float16; a weight beyond 65504 cannot be represented and must not become infinity."""
    model = tiny_model("llama-mha")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1e7)
    save_model(model, tmp_path / "source")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj: its scales do not fit in float16"):
        subbit.compress(tmp_path / "source", recipe_for(method), tmp_path / "out")
    assert_no_checkpoint(tmp_path / "out")


def test_one_decoder_layer_at_a_time_is_in_memory(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a layer is compressed all the others are on the meta device, and afterwards all of them are."""
    jobs: list[Job] = []

    def watch(job: Job, *args: Any) -> None:
        jobs.append(job)
        compress_layers(job, *args)

    def real_layers(job: Job) -> list[int]:
        layers = job.layout.layers(job.model)
        return [i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())]

    from subbit import layerwise, pipeline

    seen: list[list[int]] = []
    original = layerwise.run_method

    def look(job: Job, *args: Any) -> Any:
        seen.append(real_layers(job))
        return original(job, *args)

    monkeypatch.setattr(pipeline, "compress_layers", watch)
    monkeypatch.setattr(layerwise, "run_method", look)
    subbit.compress(tiny("llama-mha"), recipe_for("rtn"), tmp_path / "out")
    assert [layers for layers in seen if layers] == [[i] for i in range(3) for _ in range(7)]
    assert real_layers(jobs[0]) == []
    assert all(parameter.is_meta for parameter in jobs[0].model.parameters())


def test_old_style_generation_settings_in_the_config_do_no_harm(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Older models carry temperature and the like in config.json, which transformers refuses to save."""
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny("llama-mha").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "temperature": 0.7, "do_sample": True, "top_p": 0.9}))
    subbit.compress(source, recipe_for("rtn"), tmp_path / "out")
    model, _ = subbit.load(tmp_path / "out")
    assert bool(logits_of(model).isfinite().all())


def test_compress_returns_the_opened_checkpoint(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """The same as opening the directory."""
    checkpoint = subbit.compress(tiny("llama-mha"), recipe_for("rtn"), tmp_path / "out")
    assert checkpoint.directory == tmp_path / "out"
    assert len(checkpoint.specs) == 21
    checkpoint.check_contents()


def tiny_llama(**changes: Any) -> PreTrainedModel:
    """A random llama of two layers with another shape than that of ``families``."""
    from transformers import LlamaConfig

    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.1}
    config = LlamaConfig(**{**shape, **changes}, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_llama(directory: Path, **changes: Any) -> None:
    """Save :func:`tiny_llama` with a tokenizer."""
    save_model(tiny_llama(**changes), directory)
