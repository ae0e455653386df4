"""Mixtures of experts: every expert is compressed by itself, from the tokens that the router gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Lines, interrupt_at, logits_of, stored_tensors
from families import MOE_FAMILIES, save_model, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV4Config, PreTrainedModel
from transformers.models.aria.modeling_aria import AriaExperts, AriaTextConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

import subbit
from subbit import Recipe, UserError
from subbit.binary.compensate import inverse_factor
from subbit.binary.nm import Sparsity
from subbit.calibration.gram import GramCollector
from subbit.calibration.text import calibration_windows
from subbit.methods import METHODS
from subbit.models import source as source_module
from subbit.models.experts import RoutedExperts, is_known_stack, split_experts
from subbit.models.layout import layer_linears, router_linears
from subbit.models.source import open_source
from subbit.packing.layout import read_spec
from subbit.runtime.linear import SubbitLinear

pytestmark = pytest.mark.usefixtures("torch_backend")

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]
CheckpointOf = Callable[..., Path]
TUNED = {"reconstruction": {"steps": 3, "batch": 2}, "distillation": {"steps": 2, "batch": 2, "held_out": 1}}


def quantization(directory: Path) -> dict[str, Any]:
    """What config.json says of the compression."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def place_of(model: PreTrainedModel, name: str) -> Tensor:
    """The part of transformers' own model that is the weight of a linear: of an expert, a slice of a 3-D parameter."""
    parts = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)
    if parts is None:
        return model.get_parameter(f"{name}.weight").data
    stack, number = model.get_submodule(parts[1]), int(parts[2])
    if parts[3] == "down_proj":
        return stack.get_parameter("down_proj").data[number]
    gate_up = stack.get_parameter("gate_up_proj").data[number]
    half = len(gate_up) // 2
    return gate_up[:half] if parts[3] == "gate_proj" else gate_up[half:]


def dense_equivalent(source: Path, compressed: Path) -> PreTrainedModel:
    """transformers' own model of the source, with the weights that the compressed files stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = stored_tensors(compressed)
    for name, values in quantization(compressed)["linears"].items():
        spec = read_spec(values)
        place_of(model, name).copy_(spec.unpack({key: tensors[f"{name}.{key}"] for key in spec.tensors()}).dense())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name in tensors:  # norms, which are tuned too
            parameter.data.copy_(tensors[name])
    return model


def assert_loads_as_its_dense_equivalent(source: Path, out: Path) -> PreTrainedModel:
    """The loaded model; its logits are those of the decoded weights in the 3-D parameters."""
    model, _ = subbit.load(out)
    expected = logits_of(dense_equivalent(source, out))
    assert torch.allclose(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.1  # the comparison is not one of zeros
    return model


# ---- the module ------------------------------------------------------------------------------------------------------


def random_stack(family: str) -> nn.Module:
    """The experts of the last layer of a tiny model, as transformers has them, in its eager implementation."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    return model.get_submodule(f"model.layers.{model.config.num_hidden_layers - 1}.mlp.experts")


def routing(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """Two experts for every token, and their weights."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(tokens, experts, generator=generator).topk(2)[1], torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_split_experts_compute_what_the_stack_computes(family: str) -> None:
    """So the 3-D tensors are (experts, out, in), and the gate comes before up."""
    stack = random_stack(family)
    index, weights = routing(20, 4)
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stack(hidden, index, weights)
        torch.testing.assert_close(RoutedExperts(stack)(hidden, index, weights), expected, rtol=1e-5, atol=1e-6)
        index[3:, 1] = 4  # "no expert"
        expected = stack(hidden, index, weights)
        torch.testing.assert_close(RoutedExperts(stack)(hidden, index, weights), expected, rtol=1e-5, atol=1e-6)


def test_only_experts_with_tokens_run() -> None:
    experts = RoutedExperts(random_stack("mixtral"))
    seen: list[tuple[int, int]] = []
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda _, args, output, number=number: seen.append((number, len(args[0]))))
    experts(torch.randn(5, 64), torch.tensor([[1, 3]] * 4 + [[3, 1]]), torch.rand(5, 2))
    assert seen == [(1, 5), (3, 5)]


def test_stacks_of_another_kind_are_left_alone() -> None:
    """Transposed, with biases, with another gate, with more parameters: `RoutedExperts` computes none of these."""
    sizes = {"hidden_size": 32, "intermediate_size": 16}
    others = [
        AriaExperts(AriaTextConfig(**sizes, moe_num_experts=4)),
        GptOssExperts(GptOssConfig(**sizes, num_local_experts=4)),
        DeepseekV4Experts(DeepseekV4Config(hidden_size=32, moe_intermediate_size=16, n_routed_experts=4)),
    ]
    stack = random_stack("mixtral")
    assert is_known_stack(stack)
    stack.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    for other in [*others, stack]:
        assert not is_known_stack(other)
        model = nn.ModuleDict({"experts": other})
        split_experts(model)
        assert model["experts"] is other


def test_routers_and_gates_of_shared_experts() -> None:
    """Linears that choose experts are known by their place and size; bare parameters are listed anyway."""
    assert router_linears(tiny_model("qwen2-moe").model.layers[0]) == {"mlp.shared_expert_gate"}
    for family in ("mixtral", "llama-mha", "deepseek-v3"):
        assert router_linears(tiny_model(family).model.layers[1]) == set()
    block = nn.Module()
    block.gate, block.k_proj, block.other = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 4)
    block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    assert router_linears(nn.ModuleDict({"moe": block})) == {"moe.gate"}


# ---- reading ---------------------------------------------------------------------------------------------------------


def save_stacked(family: str, directory: Path) -> Path:
    """A checkpoint with experts as 3-D parameters, as some families publish them."""
    model = tiny_model(family)
    model.config.save_pretrained(directory)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_both_ways_to_store_experts_give_the_same_source(family: str, tmp_path: Path) -> None:
    """One by one they are read lazily; 3-D parameters are taken apart in memory."""
    single, stacked = (
        open_source(save_tiny(family, tmp_path / "one")),
        open_source(save_stacked(family, tmp_path / "two")),
    )
    assert single.note is None
    assert stacked.note is not None
    assert set(single.names) == set(stacked.names) == set(single.skeleton().state_dict())
    assert sum(".experts." in name for name in single.names) in (24, 36)
    model = tiny_model(family)
    for name in single.names:
        assert torch.equal(single.tensor(name), stacked.tensor(name)), name
        if ".experts." in name:
            assert torch.equal(single.tensor(name), place_of(model, name.removesuffix(".weight")))


def test_a_correction_of_the_router_is_not_made_up(tmp_path: Path) -> None:
    """It is a buffer; under a name that nobody knows it must not silently become zeros."""
    path = save_tiny("deepseek-v3", tmp_path) / "model.safetensors"
    tensors = {name.replace("e_score_correction_bias", "bias"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="e_score_correction_bias"):
        open_source(tmp_path)


# ---- statistics ------------------------------------------------------------------------------------------------------


def observed(clip_norm: float, min_expert_tokens: float) -> tuple[GramCollector, list[Tensor], RoutedExperts]:
    """Grams of eight experts of which the last sees nothing, and by hand what each of them saw, in two calls."""
    config = tiny_config("qwen3-moe")
    config.num_experts = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].mlp
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 40, 64, generator=generator)
    index = torch.rand(2, 40, 7, generator=generator).topk(2)[1]
    experts = RoutedExperts(block.experts)
    linears = {f"mlp.experts.{name}": linear for name, linear in layer_linears(experts).items()}
    linears["mlp.shared.down_proj"] = nn.Linear(64, 64)
    with torch.no_grad(), GramCollector(linears, clip_norm, min_expert_tokens) as grams:
        for call in range(2):
            experts(hidden[call], index[call], torch.rand(40, 2))
            linears["mlp.shared.down_proj"](hidden[call, :7])
    seen = [hidden[(index == number).any(-1)] for number in range(8)]
    return grams, seen, experts


def gram_of(tokens: Tensor) -> Tensor:
    return tokens.T @ tokens


def test_grams_are_of_the_tokens_that_each_expert_received() -> None:
    grams, seen, experts = observed(clip_norm=0, min_expert_tokens=0)
    groups = grams.shared()
    for number, tokens in enumerate(seen):
        name = f"mlp.experts.{number}"
        assert grams.tokens(f"{name}.gate_proj") == grams.tokens(f"{name}.down_proj") == len(tokens)
        assert len(tokens) > 10 if number < 7 else len(tokens) == 0
        if number == 7:
            assert not grams.gram(f"{name}.gate_proj").any()
            continue
        assert groups[f"{name}.gate_proj"] == [f"{name}.gate_proj", f"{name}.up_proj"]
        torch.testing.assert_close(grams.gram(f"{name}.gate_proj"), gram_of(tokens) / len(tokens))
        with torch.no_grad():
            gate, up = (experts.get_submodule(f"{number}.{leaf}")(tokens) for leaf in ("gate_proj", "up_proj"))
            inner = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(grams.gram(f"{name}.down_proj"), gram_of(inner) / len(tokens))


def test_an_expert_with_few_tokens_is_filled_up_with_those_of_all() -> None:
    """To a multiple of its inputs: half of 64 for gate and up, half of 32 for down."""
    grams, seen, _ = observed(clip_norm=0, min_expert_tokens=0.5)
    everything = torch.cat(seen)
    mean = gram_of(everything) / len(everything)
    counts = [len(tokens) for tokens in seen]
    assert min(counts[:7]) < 32
    for number, tokens in enumerate(seen):
        name = f"mlp.experts.{number}"
        short = max(0, 32 - len(tokens))
        assert grams.borrowed(f"{name}.gate_proj") == short
        assert grams.borrowed(f"{name}.down_proj") == max(0, 16 - len(tokens))
        expected = (gram_of(tokens) + short * mean) / max(32, len(tokens))
        torch.testing.assert_close(grams.gram(f"{name}.gate_proj"), expected)
    torch.testing.assert_close(grams.gram("mlp.experts.7.up_proj"), mean)
    assert bool(grams.gram("mlp.experts.7.down_proj").any())
    assert grams.borrowed("mlp.shared.down_proj") == 0  # it saw 14 tokens, and is no routed expert
    assert grams.tokens("mlp.shared.down_proj") == 14


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_everything_but_the_routers_is_compressed(family: str, tiny: Tiny, checkpoint_of: CheckpointOf) -> None:
    """And counted to the byte; the loaded model computes what its files say."""
    out = checkpoint_of(family, "codes", options={"sweeps": 0})
    model = assert_loads_as_its_dense_equivalent(tiny(family), out)
    facts = subbit.inspect(out)
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    matrices = {name: p for name, p in dense.named_parameters() if ".layers." in name and p.dim() > 1}
    routers = {name for name in matrices if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))}
    assert {name if name in routers else f"{name}.weight" for name in facts["left_dense"]} == routers
    linears = [name for name, module in model.named_modules() if isinstance(module, SubbitLinear)]
    assert set(linears) == set(quantization(out)["linears"])
    assert sum(".experts." in name for name in linears) == 12 * sum(
        name.endswith("experts.down_proj") for name in matrices
    )
    assert facts["linear_weights"] == sum(p.numel() for p in matrices.values())
    assert facts["parameters"] == sum(t.numel() for t in dense.state_dict().values())
    tensors = stored_tensors(out)
    stored = {name: t.nbytes for name, t in tensors.items() if not name.endswith(".bias")}
    packed = sum(size for name, size in stored.items() if name.rpartition(".")[0] in linears)
    assert facts["linear_bytes"] == packed + sum(tensors[name].nbytes for name in routers)
    assert facts["bits"]["stored"] == 8 * facts["linear_bytes"] / facts["linear_weights"]
    assert facts["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_compresses_experts(method: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Those of one layer; the others stay dense."""
    recipe = recipe_for(method, overrides={r"re:layers\.[02]\.": {"dense": True}})
    subbit.compress(tiny("qwen3-moe"), recipe, tmp_path / "out")
    assert len(quantization(tmp_path / "out")["linears"]) == 4 + 12
    assert_loads_as_its_dense_equivalent(tiny("qwen3-moe"), tmp_path / "out")


def routed_tokens(source: Path, recipe: Recipe) -> dict[int, Tensor]:
    """What each expert of the first layer sees of the calibration text, by transformers' own model and router."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer, calibration = AutoTokenizer.from_pretrained(source), recipe.calibration
    counts = calibration.samples, calibration.seq_len
    windows, _ = calibration_windows(calibration.source, tokenizer, *counts, calibration.seed, lambda: model)
    seen: dict[int, list[Tensor]] = {number: [] for number in range(4)}

    def look(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        for number, parts in seen.items():
            parts.append(args[0][(args[1] == number).any(-1)])

    model.get_submodule("model.layers.0.mlp.experts").register_forward_pre_hook(look)
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return {number: torch.cat(parts) for number, parts in seen.items()}


@pytest.mark.parametrize("method", ["stbllm", "pbs2p"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_every_expert_is_fitted_to_its_own_tokens(
    family: str, method: str, recipe_for: Recipes, tmp_path: Path
) -> None:
    """From 3-D parameters: the method's result on the tokens that the router gave the expert, and on no others."""
    source, out = save_stacked(family, tmp_path / "source"), tmp_path / "out"
    calibration = {"clip_norm": 0.0, "min_expert_tokens": 0.0}
    recipe = recipe_for(method, calibration=calibration, allocation={"kind": "uniform"})
    subbit.compress(source, recipe, out)
    seen, known = routed_tokens(source, recipe), METHODS[method]
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    log = [json.loads(line) for line in (out / "subbit_log.jsonl").read_text().splitlines()]
    counts = {entry["name"]: entry["tokens"] for entry in log if entry["event"] == "linear"}
    stored, linears = stored_tensors(out), quantization(out)["linears"]

    def from_tokens_of(number: int, weight: Tensor) -> Tensor:
        gram = gram_of(seen[number]) / len(seen[number])
        factor = inverse_factor(gram, recipe.options.damping)
        return known.run(weight, gram, factor, Sparsity.parse(recipe.sparsity), recipe.options).dense()

    for number, tokens in seen.items():
        name = f"model.layers.0.mlp.experts.{number}.up_proj"
        weight, spec = place_of(dense, name), read_spec(linears[name])
        result = spec.unpack({key: stored[f"{name}.{key}"] for key in spec.tensors()}).dense()
        assert counts[name] == len(tokens) > 0
        own, other = from_tokens_of(number, weight), from_tokens_of((number + 1) % 4, weight)
        # Rounding in the Gram may move a scale to the next float16 number, rarely a weight across a threshold.
        assert float(torch.isclose(result, own, rtol=2e-3).float().mean()) > 0.995
        assert float(torch.isclose(result, other, rtol=2e-3).float().mean()) < 0.9


def test_experts_from_3d_parameters_become_the_same_files(recipe_for: Recipes, tmp_path: Path) -> None:
    """Also those left dense, which are slices of one tensor."""
    recipe = recipe_for("rtn", overrides={r"re:experts\.[01]\.up_proj$": {"dense": True}})
    subbit.compress(save_tiny("mixtral", tmp_path / "one"), recipe, tmp_path / "first")
    subbit.compress(save_stacked("mixtral", tmp_path / "two"), recipe, tmp_path / "second")
    first, second = stored_tensors(tmp_path / "first"), stored_tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tuning_and_a_budget(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Layer by layer and as a whole; the budget holds, and gate and up of one expert get the same format."""
    out = tmp_path / "out"
    subbit.compress(tiny("qwen3-moe"), recipe_for("codes", bits=1.6, **TUNED), out)
    assert_loads_as_its_dense_equivalent(tiny("qwen3-moe"), out)
    assert 1.5 < subbit.inspect(out)["bits"]["stored"] <= 1.6
    formats = {name: (spec["n"], spec["m"]) for name, spec in quantization(out)["linears"].items()}
    for name, form in formats.items():
        assert form == formats[name.replace("gate_proj", "up_proj")]
    assert len(set(formats.values())) > 1


def starved_model(directory: Path) -> Path:
    """A model with five experts of which the last is never chosen: the others' scores come in pairs of x and −x."""
    config = tiny_config("qwen3-moe")
    config.num_experts = 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0
    save_model(model, directory)
    return directory


def test_an_expert_without_tokens_is_compressed_and_said_so(recipe_for: Recipes, tmp_path: Path) -> None:
    """A line for every layer, and the numbers in the log."""
    source, out = starved_model(tmp_path / "source"), tmp_path / "out"
    progress = Lines()
    recipe = recipe_for("codes", calibration={"min_expert_tokens": 0.25}, options={"sweeps": 0})
    subbit.compress(source, recipe, out, progress=progress)
    entries = [json.loads(line) for line in (out / "subbit_log.jsonl").read_text().splitlines()]
    linears = {entry["name"]: entry for entry in entries if entry["event"] == "linear"}
    for index in range(3):
        experts = f"model.layers.{index}.mlp.experts"
        short = {
            number
            for number in range(5)
            for name in ("gate_proj", "up_proj", "down_proj")
            if linears[f"{experts}.{number}.{name}"]["borrowed_tokens"]
        }
        assert 4 in short
        line = next(line for line in progress.lines if line.startswith(f"{experts}: "))
        assert line == (
            f"{experts}: {len(short)} of 5 experts saw fewer calibration tokens than min_expert_tokens asks for, "
            "the least 0; the Gram of all experts makes up for what they lack"
        )
        assert linears[f"{experts}.4.gate_proj"]["tokens"] == 0
        assert linears[f"{experts}.4.gate_proj"]["borrowed_tokens"] == 16  # a quarter of 64
        assert linears[f"{experts}.4.down_proj"]["borrowed_tokens"] == 8
        assert linears[f"{experts}.0.down_proj"]["tokens"] > 0
        assert linears[f"{experts}.4.up_proj"]["error"] > 0
    assert not any("no calibration token" in line for line in progress.lines)
    assert all(entry["borrowed_tokens"] == 0 for name, entry in linears.items() if "experts" not in name)
    assert_loads_as_its_dense_equivalent(source, out)


def test_without_borrowing_an_expert_without_tokens_is_named(recipe_for: Recipes, tmp_path: Path) -> None:
    source, out = starved_model(tmp_path / "source"), tmp_path / "out"
    progress = Lines()
    # not clipped, another expert happens to get no token of a later layer, too
    recipe = recipe_for("codes", calibration={"min_expert_tokens": 0, "clip_norm": 2.0}, options={"sweeps": 0})
    subbit.compress(source, recipe, out, progress=progress)
    assert not any("min_expert_tokens" in line for line in progress.lines)
    named = [line for line in progress.lines if "no calibration token reached it" in line]
    assert len(named) == 9
    assert all(".experts.4." in line for line in named)


def test_a_stopped_run_goes_on(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """To the same files, with tuning."""
    recipe = recipe_for("codes", **TUNED)
    subbit.compress(tiny("mixtral"), recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        subbit.compress(tiny("mixtral"), recipe, tmp_path / "stopped", progress=Lines(interrupt_at("layer 2/3")))
    progress = Lines()
    subbit.compress(tiny("mixtral"), recipe, tmp_path / "stopped", resume=True, progress=progress)
    assert "resuming: 2 of 3 layers are done" in progress.lines
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_overrides_of_experts_survive_saving(family: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """By name and by pattern. transformers must not merge the dense ones into a 3-D parameter on the way."""
    overrides = {
        "model.layers.0.mlp.experts.1.up_proj": {"sparsity": "2:4"},
        r"re:layers\.1\.mlp\.experts\.2\.": {"dense": True},
        r"re:layers\.2\.mlp\.experts\.": {"dense": True},
    }
    out = tmp_path / "out"
    subbit.compress(tiny(family), recipe_for("stbllm", overrides=overrides), out)
    config = quantization(out)
    assert (config["linears"]["model.layers.0.mlp.experts.1.up_proj"]["n"], config["format_version"]) == (2, 1)
    dense = [name for name, reason in config["left_dense"].items() if reason == "the recipe says so"]
    assert len(dense) == 3 + 12
    assert all(re.search(r"layers\.(1\.mlp\.experts\.2|2\.mlp\.experts)\.", name) for name in dense)
    model = assert_loads_as_its_dense_equivalent(tiny(family), out)
    model.save_pretrained(tmp_path / "saved")
    assert stored_tensors(tmp_path / "saved").keys() == stored_tensors(out).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))
    assert subbit.inspect(tmp_path / "saved")["left_dense"] == config["left_dense"]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_generate_and_save(family: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Greedily with a cache, as without one; and again after save_pretrained, in another dtype too."""
    model, tokenizer = subbit.load(checkpoint_of(family, "codes", options={"sweeps": 0}))
    inputs = tokenizer("the river", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        step = model(input_ids=tokens[:, :-1]).logits[:, inputs.input_ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(step, tokens[:, inputs.input_ids.shape[1] :])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert bool(logits_of(half).isfinite().all())


def test_checkpoints_with_dense_3d_experts_still_load(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As this package wrote them before it knew experts, and writes those of families that it does not know."""
    monkeypatch.setattr(source_module, "split_experts", lambda model: None)
    subbit.compress(tiny("mixtral"), recipe_for("rtn"), tmp_path / "out")
    left = quantization(tmp_path / "out")["left_dense"]
    assert left["model.layers.0.mlp.experts.down_proj"] == "a parameter of shape [4, 64, 128], not a linear"
    model = assert_loads_as_its_dense_equivalent(tiny("mixtral"), tmp_path / "out")
    assert not any(isinstance(module, RoutedExperts) for module in model.modules())
