"""The plan of a run: importance measured on the dense model, without touching what the run calibrates on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import save_tiny
from transformers import AutoModelForCausalLM

from subbit.binary.nm import Sparsity
from subbit.job import Job
from subbit.models.layout import find_layout
from subbit.models.source import open_source
from subbit.models.streaming import capture_inputs
from subbit.planning import make_plan, measured_importance, plan_sparsity
from subbit.progress import SilentProgress
from subbit.recipe import Recipe

WINDOWS = torch.randint(5, 100, (3, 24), generator=torch.Generator().manual_seed(0))


def job_of(directory: Path, recipe: Recipe) -> Job:
    """A job on the CPU."""
    source = open_source(directory)
    model = source.skeleton()
    return Job(source, model, find_layout(model), recipe, torch.device("cpu"), SilentProgress())


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gemma3"])
def test_cosine_importance_is_that_of_the_whole_dense_model(family: str, tmp_path: Path) -> None:
    """1 / mean cosine of every decoder layer's input and output, taken from Hugging Face's own hidden states."""
    save_tiny(family, tmp_path)
    job = job_of(tmp_path, Recipe.create({"allocation": {"kind": "cosine"}, "calibration": {"precision": "float32"}}))
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, WINDOWS)
        importance = measured_importance(job, hidden, calls)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in job.layout.layers(model):
            layer.register_forward_hook(
                lambda _, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
            )
        model(WINDOWS)
    assert len(seen) == job.layout.num_layers
    for index, (before, after) in enumerate(seen):
        cosine = float(torch.cosine_similarity(before, after, dim=-1).mean())
        for name in job.linears(index):
            assert importance[name] == pytest.approx(1 / max(cosine, 1e-2), rel=1e-4)


@pytest.mark.parametrize("sparsity", ["7:8", "1:4"])
def test_a_target_at_the_edge_is_spread_over_what_is_a_sparsity(sparsity: str, tmp_path: Path) -> None:
    """N of no linear is 0 or M, though the importance asks for one more or less than the target."""
    save_tiny("llama-gqa", tmp_path)
    job = job_of(tmp_path, Recipe.create({"method": "pbs2p", "sparsity": sparsity, "allocation": {"kind": "sine"}}))
    sparsities = plan_sparsity(job, make_plan(job), torch.empty(0), [])[0]
    assert {str(Sparsity.parse(found)) for found in sparsities.values()} == {sparsity}


@pytest.mark.parametrize("kind", ["uniform", "sine", "l2", "outliers", "cosine"])
def test_planning_leaves_the_calibration_activations_alone(kind: str, tmp_path: Path) -> None:
    """What enters the first layer is calibrated on afterwards: measuring importance on it must not change it."""
    save_tiny("llama-gqa", tmp_path)
    job = job_of(tmp_path, Recipe.create({"allocation": {"kind": kind, "samples": 2}}))
    with torch.no_grad():
        hidden, calls = capture_inputs(job.model, job.layout, job.source, WINDOWS)
        before = hidden.clone()
        plan_sparsity(job, make_plan(job), hidden, calls)
    assert torch.equal(hidden, before)
