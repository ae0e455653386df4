"""A budget in stored bits, and the efforts: what is allocated, what the files hold, what is refused.

Run with `pytest tests/test_budget.py`.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from checkpoints import Lines, interrupt_at
from commands import Run, assert_one_line
from families import VOCABULARY, tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import subbit
from subbit import Recipe, UserError
from subbit.binary.allocate import allocate_bytes
from subbit.binary.codebook import sign_codebook
from subbit.budget import RELATIVE_ERROR, compress_quickly, unit_costs, unit_formats
from subbit.cli import build_recipe
from subbit.effort import EFFORTS, with_effort
from subbit.job import Job
from subbit.models.layout import find_layout, fused_groups
from subbit.models.source import open_source
from subbit.models.streaming import capture_inputs
from subbit.packing.codes import CodesSpec
from subbit.packing.layout import read_spec
from subbit.planning import Plan, fixed_parts, make_plan, plan_sparsity
from subbit.progress import SilentProgress
from subbit.tuning.precision import Products, products_here

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]
Table = list[list[float]]
Sizes = list[list[int]]

SMALL = {"samples": 2, "seq_len": 16}
QUICK: dict[str, Any] = {"calibration": SMALL, "options": {"sweeps": 0}}


# --- the allocator ----------------------------------------------------------------------------------------------------


def random_units(seed: int, convex: bool) -> tuple[Table, Sizes]:
    """Four units of up to four formats, larger ones with smaller errors; convex: gains for a byte shrink."""
    generator = random.Random(seed)
    errors, sizes = [], []
    for _ in range(4):
        steps = generator.randint(0, 3)
        size, error = [generator.randint(1, 9)], [generator.uniform(5, 10)]
        ratios = sorted((generator.uniform(0.01, 0.3) for _ in range(steps)), reverse=convex)
        for ratio in ratios:
            more = generator.randint(1, 6)
            size.append(size[-1] + more)
            error.append(error[-1] - ratio * more)
        errors.append(error)
        sizes.append(size)
    return errors, sizes


def sums(errors: Table, sizes: Sizes, chosen: list[int]) -> tuple[float, int]:
    lost = sum(unit[number] for unit, number in zip(errors, chosen, strict=True))
    return lost, sum(unit[number] for unit, number in zip(sizes, chosen, strict=True))


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_allocation_against_every_choice(seed: int, convex: bool) -> None:
    """Never above the budget; no worse than the best of all by more than one unit can gain; nothing more would fit."""
    errors, sizes = random_units(seed, convex)
    least, most = sum(unit[0] for unit in sizes), sum(unit[-1] for unit in sizes)
    every = [sums(errors, sizes, list(c)) for c in itertools.product(*(range(len(unit)) for unit in sizes))]
    largest_gain = max(unit[0] - unit[-1] for unit in errors)
    for budget in range(least, most + 2):
        chosen = allocate_bytes(errors, sizes, budget)
        lost, taken = sums(errors, sizes, chosen)
        assert taken <= budget
        best = min(error for error, size in every if size <= budget)
        assert best <= lost <= best + largest_gain + 1e-9
        for unit, number in enumerate(chosen):
            for step in range(number + 1, len(sizes[unit])):
                assert taken + sizes[unit][step] - sizes[unit][number] > budget
    assert chosen == [len(unit) - 1 for unit in sizes]


def test_one_unit_gets_the_best_that_fits() -> None:
    """Whatever the order of gains: a step may skip formats."""
    errors, sizes = [[10.0, 9.9, 1.0, 0.5]], [[2, 3, 5, 9]]
    assert [allocate_bytes(errors, sizes, budget)[0] for budget in range(2, 11)] == [0, 1, 1, 2, 2, 2, 2, 3, 3]


def test_the_best_of_equal_sizes() -> None:
    """Tiny linears whose formats fill the same bytes; and a larger format that is worse is never taken."""
    assert allocate_bytes([[3.0, 2.0, 1.0], [5.0, 6.0]], [[4, 4, 4], [1, 2]], 100) == [2, 0]
    assert allocate_bytes([[3.0, 2.0, 1.0]], [[4, 4, 5]], 4) == [1]


def test_ties_go_to_the_earlier_unit() -> None:
    errors, sizes = [[2.0, 1.0]] * 4, [[1, 2]] * 4
    assert allocate_bytes(errors, sizes, 6) == [1, 1, 0, 0]
    assert allocate_bytes(errors, sizes, 6) == allocate_bytes(errors, sizes, 6)


def test_a_budget_below_the_smallest_formats() -> None:
    """The caller has to say so before; here it is an error, not a plan that does not fit."""
    with pytest.raises(ValueError, match="the smallest formats take 5 bytes, more than 4"):
        allocate_bytes([[1.0], [1.0]], [[2], [3]], 4)
    assert allocate_bytes([[1.0], [1.0]], [[2], [3]], 5) == [0, 0]
    assert allocate_bytes([], [], 0) == []


def test_formats_ascend_in_bits_and_descend_in_error() -> None:
    """The table of relative errors, and which of its formats a linear can have."""
    bits = [CodesSpec(1, 16 * 128, int(f[0]), int(f[2:]), False).stored_bytes for f in RELATIVE_ERROR]
    assert bits == sorted(bits)
    assert len(set(bits)) == len(bits)
    assert list(RELATIVE_ERROR.values()) == sorted(RELATIVE_ERROR.values(), reverse=True)
    assert unit_formats([64, 32]) == list(RELATIVE_ERROR)
    assert unit_formats([64, 24]) == ["1:8", "1:4", "2:8", "3:8", "4:8"]
    assert unit_formats([20]) == ["1:4"]


# --- whole models -----------------------------------------------------------------------------------------------------


def labels(directory: Path) -> dict[str, str]:
    """N:M of every compressed linear."""
    config = json.loads((directory / "config.json").read_text())
    return {name: read_spec(values).label for name, values in config["quantization_config"]["linears"].items()}


def assert_within_a_step(directory: Path, bits: float) -> None:
    """The stored bits are within the budget, and no unit could have had the next larger of its formats."""
    facts = subbit.inspect(directory)
    assert facts["bits"]["stored"] <= bits
    left = bits * facts["linear_weights"] / 8 - facts["linear_bytes"]
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    specs = {name: read_spec(values) for name, values in config["linears"].items()}
    for unit in fused_groups(list(specs)):
        assert len({specs[name].label for name in unit}) == 1
        forms = unit_formats([specs[name].in_features for name in unit])
        for form in forms[forms.index(specs[unit[0]].label) + 1 :]:
            n, m = map(int, form.split(":"))
            larger = [replace(spec, n=n, m=m) for name in unit if isinstance(spec := specs[name], CodesSpec)]
            more = sum(spec.stored_bytes for spec in larger) - sum(specs[name].stored_bytes for name in unit)
            assert more > left, (unit, form)


@pytest.mark.parametrize("column_scales", [True, False])
@pytest.mark.parametrize("bits", [0.97, 1.1, 1.5])
def test_the_file_is_as_large_as_asked_for(
    bits: float, column_scales: bool, tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """At most the budget, and within a step of one unit of it; fused linears alike; the words say what was asked."""
    if column_scales:
        bits += 0.2
    options = {"sweeps": 0, "column_scales": column_scales}
    subbit.compress(
        tiny("llama-gqa"), recipe_for("codes", bits=bits, calibration=SMALL, options=options), tmp_path / "o"
    )
    assert_within_a_step(tmp_path / "o", bits)
    found = labels(tmp_path / "o")
    assert len(set(found.values())) > 1
    for index in range(3):
        prefix = f"model.layers.{index}"
        assert len({found[f"{prefix}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({found[f"{prefix}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    assert subbit.inspect(tmp_path / "o")["sparsity"] == f"{bits:g} bits"
    assert Recipe.from_yaml(tmp_path / "o" / "subbit_recipe.yaml").bits == bits
    subbit.load(tmp_path / "o")


def refused(source: Path, recipe: Recipe, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        subbit.compress(source, recipe, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def number_in(message: str) -> float:
    return float(re.findall(r"\d+\.\d{4}", message)[-1])


@pytest.mark.parametrize("column_scales", [True, False])
def test_budgets_out_of_reach_name_the_nearest(
    column_scales: bool, tiny: Tiny, recipe_for: Recipes, tmp_path: Path
) -> None:
    """Which works when it is given instead: all linears then have the smallest, or the largest, of the formats."""
    fields = {"calibration": SMALL, "options": {"sweeps": 0, "column_scales": column_scales}}
    source = tiny("llama-gqa")
    for bits, word, form in [(0.1, "least", "1:16"), (9.0, "most", "4:8")]:
        message = refused(source, recipe_for("codes", bits=bits, **fields), tmp_path / "no")
        assert message.startswith(f"{bits:g} stored bits cannot be reached: the {word} for this model is")
        nearest = number_in(message)
        subbit.compress(source, recipe_for("codes", bits=nearest, **fields), tmp_path / word)
        assert set(labels(tmp_path / word).values()) == {form}
        assert subbit.inspect(tmp_path / word)["bits"]["stored"] == pytest.approx(nearest, abs=1.01e-4)


@pytest.mark.parametrize("hidden", [32, 48, 80, 96, 112])
def test_the_least_budget_is_named_rounded_up(hidden: int, recipe_for: Recipes, tmp_path: Path) -> None:
    """Sizes whose least is no round number: the four digits of the message must still be enough."""
    save_llama(tmp_path / "source", hidden_size=hidden, intermediate_size=176, num_hidden_layers=1)
    message = refused(tmp_path / "source", recipe_for("codes", bits=0.2, **QUICK), tmp_path / "out")
    subbit.compress(tmp_path / "source", recipe_for("codes", bits=number_in(message), **QUICK), tmp_path / "out")


def test_a_budget_that_is_met_to_the_bit(recipe_for: Recipes, tmp_path: Path) -> None:
    """Given as the exact quotient of bytes and weights, which is no short binary fraction."""
    save_llama(tmp_path / "source", hidden_size=48, intermediate_size=112, num_hidden_layers=1)
    job = job_of(tmp_path / "source", recipe_for("codes", bits=2.0, **QUICK))
    shapes = {name: linear.weight.shape for name, linear in job.linears(0).items()}
    weights = sum(shape.numel() for shape in shapes.values())
    for form in ("1:16", "2:8"):
        n, m = map(int, form.split(":"))
        size = sum(CodesSpec(shape[0], shape[1], n, m, True).stored_bytes for shape in shapes.values())
        bits = 8 * size / weights
        for exact in (bits, bits * (1 - 1e-12)):
            plan_of(job_of(tmp_path / "source", recipe_for("codes", bits=exact, **QUICK)))
        if form == "1:16":
            sparsities = plan_of(job_of(tmp_path / "source", recipe_for("codes", bits=bits, **QUICK)))[0]
            assert set(sparsities.values()) == {form}


def job_of(directory: Path, recipe: Recipe) -> Job:
    source = open_source(directory)
    model = source.skeleton()
    return Job(source, model, find_layout(model), recipe, torch.device("cpu"), SilentProgress())


def plan_of(job: Job) -> tuple[dict[str, str], Tensor]:
    """N:M of every linear, and what enters the first layer."""
    windows = torch.randint(3, 100, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, windows)
        return plan_sparsity(job, make_plan(job), hidden, calls)[0], hidden


def save_llama(directory: Path, change: Callable[[Any], None] = lambda model: None, **shape: Any) -> None:
    """A tiny random llama; ``change`` is called with the model before it is saved."""
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**{**settings, **shape}, vocab_size=VOCABULARY, pad_token_id=None, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def test_overrides_and_dense_linears_count(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Their bytes are taken from the budget, and they are what the overrides say."""
    overrides = {"re:layers.0.*q_proj": {"sparsity": "4:8"}, "re:layers.1.*down_proj": {"dense": True}}
    recipe = recipe_for("codes", bits=3.9, overrides=overrides, **QUICK)
    out = tmp_path / "out"
    subbit.compress(tiny("llama-gqa"), recipe, out)
    found = labels(out)
    assert found["model.layers.0.self_attn.q_proj"] == "4:8"
    assert "model.layers.1.mlp.down_proj" not in found
    facts = subbit.inspect(out)
    assert set(facts["left_dense"]) == {"model.layers.1.mlp.down_proj"}
    assert 3.8 < facts["bits"]["stored"] <= 3.9
    without = subbit.inspect(out)["linear_bytes"] - 4 * 64 * 128  # float32
    assert 8 * without / (facts["linear_weights"] - 64 * 128) < 1.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_that_fit_no_format_count(dtype: torch.dtype, recipe_for: Recipes, tmp_path: Path) -> None:
    """in_features that are no multiple of 4, in the dtype in which they are stored, which may be another than most."""

    def change(model: Any) -> None:
        model.to(torch.bfloat16)
        model.model.layers[0].mlp.down_proj.to(dtype)

    save_llama(tmp_path / "source", change, intermediate_size=66)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 66)
    dense = 64 * 66 * (dtype.itemsize + 2)
    bits = (8 * dense + 1.3 * (weights - 2 * 64 * 66)) / weights
    subbit.compress(tmp_path / "source", recipe_for("codes", bits=bits, **QUICK), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model-layer-00000.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert stored.dtype == dtype
    assert set(subbit.inspect(tmp_path / "out")["left_dense"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert_within_a_step(tmp_path / "out", bits)


def test_what_else_counts(tiny: Tiny, recipe_for: Recipes) -> None:
    """Parameters that are no linears, as stacks of experts may be; of a GGUF file everything is stored as float16."""
    job = job_of(tiny("llama-gqa"), recipe_for("codes", bits=2.0))
    norm, linear, other = (
        f"model.layers.0.{x}" for x in ("input_layernorm.weight", "mlp.down_proj", "self_attn.q_proj")
    )
    plan = Plan({other: "2:8"}, {norm: "…", linear: "…"}, {})
    # q: 64 × 64 at 7 bits a group, and a scale a row and a column
    expected = {other: (64 * 64, 64 * 7 + 2 * 128), norm: (64, 4 * 64), linear: (64 * 128, 4 * 64 * 128)}
    assert fixed_parts(job, plan) == expected
    gguf = replace(job, source=replace(job.source, gguf_file="model.gguf"))
    assert fixed_parts(gguf, plan)[linear] == (64 * 128, 2 * 64 * 128)


def test_a_budget_where_all_is_decided(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Nothing is left to choose, but the budget is not forgotten."""
    overrides = {"re:.": {"sparsity": "2:8"}}
    message = refused(tiny("llama-gqa"), recipe_for("codes", bits=0.9, overrides=overrides, **QUICK), tmp_path / "out")
    assert "the least for this model is" in message
    bits = number_in(message)
    subbit.compress(tiny("llama-gqa"), recipe_for("codes", bits=bits, overrides=overrides, **QUICK), tmp_path / "out")
    assert subbit.inspect(tmp_path / "out")["bits"]["stored"] <= bits


def test_bits_go_where_the_errors_are(recipe_for: Recipes, tmp_path: Path) -> None:
    """Linears that codewords of 2:8 express exactly get the least; the others share what there is."""

    def change(model: Any) -> None:
        words = sign_codebook(2, 8)
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            chosen = torch.randint(len(words), (64, 8), generator=torch.Generator().manual_seed(0))
            linear.weight.copy_(0.1 * words[chosen].flatten(1))

    save_llama(tmp_path / "source", change)
    job = job_of(tmp_path / "source", recipe_for("codes", bits=1.6, **QUICK))
    sparsities, hidden = plan_of(job)
    before = hidden.clone()
    easy = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert {sparsities[name] for name in easy} == {"1:16"}
    assert all(form != "1:16" for name, form in sparsities.items() if name not in easy), sparsities
    again, hidden = plan_of(job)
    assert again == sparsities
    assert torch.equal(hidden, before)  # what is calibrated on afterwards


def unit_costs_of(
    job: Job, windows: Tensor
) -> tuple[list[list[str]], list[float], dict[str, Tensor], dict[str, float]]:
    """Units of a budget, what each costs, and the weights and relative errors that it costs that for."""
    compressed: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, windows)
        choice = make_plan(job).choice
        assert choice is not None
        costs = unit_costs(job, choice.units, hidden, calls)
        for layer in job.dense_pass("all", hidden, calls):
            compressed.update(compress_quickly(job, layer, errors))
    return choice.units, costs, compressed, errors


FEW_WINDOWS = torch.randint(3, 100, (3, 16), generator=torch.Generator().manual_seed(0))


def test_the_cost_of_a_unit_is_the_divergence_when_it_alone_is_compressed(recipe_for: Recipes, tmp_path: Path) -> None:
    """Against the whole model run at once, with one unit's weights replaced; the model itself is not changed."""
    save_llama(tmp_path / "source")
    job = job_of(tmp_path / "source", recipe_for("codes", bits=1.0, **QUICK))
    units, costs, compressed, _ = unit_costs_of(job, FEW_WINDOWS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(FEW_WINDOWS).logits.log_softmax(-1)
        for unit, cost in zip(units, costs, strict=True):
            student = copy.deepcopy(model)
            for name in unit:
                student.get_submodule(name).weight.copy_(compressed[name])
            have = student(FEW_WINDOWS).logits.log_softmax(-1)
            expected = float((wanted.exp() * (wanted - have)).sum(-1).mean())
            assert expected > 0
            assert cost == pytest.approx(expected, rel=1e-2, abs=2e-6)


def test_experts_share_what_they_cost_together(tiny: Tiny, recipe_for: Recipes) -> None:
    """All experts of a layer are compressed at once: their costs are in the order of their errors."""
    job = job_of(tiny("qwen3-moe"), recipe_for("codes", bits=1.6, **QUICK))
    units, costs, _, errors = unit_costs_of(job, FEW_WINDOWS)
    experts = [number for number, unit in enumerate(units) if ".0.mlp.experts." in unit[0]]
    assert len(experts) > 4
    ratios = [costs[number] / sum(errors[name] for name in units[number]) for number in experts]
    assert min(ratios) > 0
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)


def test_two_runs_and_a_resumed_one_give_the_same_bytes(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """The plan is made once, and kept."""
    recipe = recipe_for("codes", bits=1.2, **QUICK)
    contents = []
    for name in ("one", "two", "stopped"):
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                subbit.compress(tiny("qwen3"), recipe, tmp_path / name, progress=Lines(interrupt_at("layer 2/")))
        subbit.compress(tiny("qwen3"), recipe, tmp_path / name, resume=True)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.name != "subbit_log.jsonl")
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1] == contents[2]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"method": "pbs2p", "bits": 1.1}, "bits, a budget, is for method codes, not pbs2p; give a sparsity"),
        ({"bits": 1.1}, "bits, a budget, is for method codes"),
        ({"method": "gptq", "bits": 2.1}, "bits, a budget, is for method codes, not gptq"),
        ({"method": "codes", "bits": 0}, "bits: Input should be greater than 0"),
        ({"method": "codes", "bits": float("nan")}, "bits: "),
        ({"method": "codes", "bits": "many"}, "bits: "),
        ({"method": "codes", "allocation": {"kind": "budget"}}, "bits and allocation.kind: budget go together"),
        (
            {"method": "codes", "bits": 1.1, "allocation": {"kind": "l2"}},
            "bits and allocation.kind: budget go together",
        ),
        ({"method": "codes", "options": {"block_size": 64}}, "has no option 'block_size'; it has sweeps, "),
    ],
)
def test_recipes_that_make_no_sense(values: dict[str, Any], complaint: str) -> None:
    """One line each."""
    with pytest.raises(UserError) as caught:
        Recipe.create(values)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_a_budget_reads_back(tmp_path: Path) -> None:
    recipe = Recipe.create({"method": "codes", "bits": 1.1, "overrides": {"re:o_proj": {"sparsity": "4:8"}}})
    assert recipe.allocation.kind == "budget"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert Recipe.create({"method": "codes"}).allocation.kind == "uniform"
    assert Recipe.create({"method": "codes"}).sparsity == "2:8"


@pytest.mark.parametrize("sparsity", ["2:8", "3:8"])
def test_bits_and_a_sparsity_exclude_each_other(sparsity: str) -> None:
    """Also the default one, where somebody gives it."""
    both: dict[str, Any] = {"method": "codes", "bits": 0.8, "sparsity": sparsity}
    with pytest.raises(ValueError, match="bits and a sparsity exclude each other; give one of them"):
        Recipe(**both)
    with pytest.raises(UserError, match=r"^recipe: bits and a sparsity exclude each other; give one of them$"):
        Recipe.create(both)


@pytest.mark.parametrize("saved", [True, False])
def test_bits_and_a_sparsity_replace_each_other_over_a_file(saved: bool, tmp_path: Path) -> None:
    """Whether the file is of a person or of an earlier run, which spells everything out; by option and by ``--set``."""

    def file(values: dict[str, Any]) -> Path:
        text = Recipe.create(values).to_yaml() if saved else yaml.safe_dump(values)
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    budget = Recipe.create({"method": "codes", "bits": 0.9})
    pruned = Recipe.create({"method": "codes", "sparsity": "3:8"})
    budgets: list[tuple[dict[str, Any], list[str]]] = [({"bits": 0.9}, []), ({}, ["bits=0.9"])]
    for given, assignments in budgets:
        for values in ({"bits": 0.8}, {"sparsity": "4:8"}, {"allocation": {"kind": "l2", "n_low": 1.0}}):
            assert build_recipe(file({"method": "codes", **values}), given, assignments) == budget
    sparsities: list[tuple[dict[str, Any], list[str]]] = [({"sparsity": "3:8"}, []), ({}, ["sparsity=3:8"])]
    for given, assignments in sparsities:
        assert build_recipe(file({"method": "codes", "bits": 0.8}), given, assignments) == pruned
    kept = build_recipe(file({"method": "codes", "allocation": {"kind": "sine"}}), {"sparsity": "3:8"}, [])
    assert kept.allocation.kind == "sine"
    with pytest.raises(UserError, match="bits and a sparsity exclude each other"):
        build_recipe(file({"method": "codes", "bits": 0.8}), {"sparsity": "3:8", "bits": 0.9}, [])


def test_efforts_are_recipes() -> None:
    """Each is complete; more effort is never fewer sweeps, windows or steps; column scales go only where they pay."""
    recipes = [Recipe.create(with_effort(effort, {})) for effort in ("fast", "standard", "best")]
    assert set(EFFORTS) == {"fast", "standard", "best"}
    assert {recipe.method for recipe in recipes} == {"codes"}
    for work in (
        [recipe.options.sweeps for recipe in recipes],
        [recipe.calibration.samples for recipe in recipes],
        [recipe.reconstruction.steps for recipe in recipes],
        [recipe.distillation.steps for recipe in recipes],
    ):
        assert work == sorted(work)
    assert recipes[0].reconstruction.steps == recipes[0].distillation.steps == 0
    assert recipes[1].reconstruction.steps > 0


def test_an_effort_fills_in_what_is_left_open() -> None:
    """Value by value inside the sections; what is given stays; the efforts themselves do not change."""
    before = copy.deepcopy(EFFORTS)
    given = {"bits": 1.0, "calibration": {"samples": 3}, "options": {"damping": 0.5}, "reconstruction": {"steps": 0}}
    copied = copy.deepcopy(given)
    values = with_effort("standard", given, "matrix units")
    expected = copy.deepcopy(EFFORTS["standard"])
    assert values["method"] == "codes"
    assert values["bits"] == 1.0
    assert values["calibration"] == {**expected["calibration"], "samples": 3}
    assert values["options"] == {**expected["options"], "damping": 0.5}
    assert values["reconstruction"] == {**expected["reconstruction"], "steps": 0}
    values["calibration"]["samples"] = 99
    assert before == EFFORTS
    assert given == copied
    for method in ("pbs2p", "gptq"):
        with pytest.raises(UserError, match=f"effort is for method codes, not {method}"):
            with_effort("fast", {"method": method})
    with pytest.raises(UserError, match="there is no effort 'heroic'; choose fast, standard, best"):
        with_effort("heroic", {})


def test_standard_is_shorter_without_matrix_units() -> None:
    """In the steps of both stages alone, and what is given counts more; the other efforts are the same everywhere."""
    quick, *others = (with_effort("standard", {"bits": 1.0}, products) for products in get_args(Products))
    steps = [values["distillation"]["steps"] for values in (quick, *others)]
    assert steps == sorted(set(steps), reverse=True)
    for slow in others:
        assert slow["distillation"]["samples"] >= slow["distillation"]["steps"] * slow["distillation"]["batch"]
        layers = slow["reconstruction"]["steps"]
        assert 0 < layers <= quick["reconstruction"]["steps"]
        assert slow["reconstruction"] == {**quick["reconstruction"], "steps": layers}
        assert {**slow, "reconstruction": quick["reconstruction"], "distillation": quick["distillation"]} == quick
    given = with_effort("standard", {"distillation": {"steps": 7}}, "float32")
    assert given["distillation"]["steps"] == 7
    for effort in ("fast", "best"):
        assert with_effort(effort, {}, "matrix units") == with_effort(effort, {}, "float32")
    assert with_effort("standard", {}) == with_effort("standard", {}, products_here())


def test_options_of_the_command_line_become_a_recipe(tmp_path: Path) -> None:
    """--bits alone means codes; --set counts more than an effort; a recipe file stands between."""
    fast = EFFORTS["fast"]
    expected = {"method": "codes", "bits": 1.1, **fast}
    assert build_recipe(None, {"bits": 1.1}, [], "fast") == Recipe.create(expected)
    assert build_recipe(None, {"bits": 1.1}, []) == Recipe.create({"method": "codes", "bits": 1.1})
    assert build_recipe(None, {}, [], "best") == Recipe.create({"method": "codes", **EFFORTS["best"]})
    recipe = build_recipe(None, {"bits": 1.1}, ["options.sweeps=7", "calibration.seed=5"], "fast")
    assert recipe == Recipe.create(
        {**expected, "options": {"sweeps": 7}, "calibration": {**fast["calibration"], "seed": 5}}
    )
    (tmp_path / "recipe.yaml").write_text("method: codes\ncalibration: {samples: 9}\n")
    recipe = build_recipe(tmp_path / "recipe.yaml", {"calibration.seq_len": 33}, [], "fast")
    assert (recipe.calibration.samples, recipe.calibration.seq_len, recipe.options.sweeps) == (9, 33, 2)
    with pytest.raises(UserError, match="bits, a budget, is for method codes, not stbllm"):
        build_recipe(None, {"bits": 1.1, "method": "stbllm"}, [])


def test_the_command_line(tiny: Tiny, text_file: Path, tmp_path: Path, run: Run) -> None:
    """`--bits 1.3 --effort fast` end to end; `--effort` with another method is one line."""
    command = ["compress", tiny("llama-gqa"), "--calibration", text_file, "--samples", 2, "--seq-len", 16]
    ran = run(*command, "--bits", 1.3, "--effort", "fast", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "1.3 bits" in ran.out
    calibration = {"source": str(text_file), "samples": 2, "seq_len": 16}
    written = Recipe.from_yaml(tmp_path / "out" / "subbit_recipe.yaml")
    assert written == Recipe.create({"method": "codes", "bits": 1.3, **EFFORTS["fast"], "calibration": calibration})
    assert_within_a_step(tmp_path / "out", 1.3)
    refusals = {
        ("--method", "pbs2p", "--effort", "fast"): "effort is for method codes, not pbs2p",
        ("--effort", "heroic"): "there is no effort 'heroic'",
        ("--method", "pbs2p", "--bits", "1.1"): "is for method codes, not pbs2p",
        ("--bits", "0.1"): "0.1 stored bits cannot be reached: the least for this model is",
        ("--bits", "-1"): "bits: Input should be greater than 0",
    }
    for options, complaint in refusals.items():
        ran = run(*command, *options, "-o", tmp_path / "no")
        assert_one_line(replace(ran, err=ran.err.splitlines(keepends=True)[-1]), complaint)
        assert "Traceback" not in ran.err
        assert not (tmp_path / "no").exists()
