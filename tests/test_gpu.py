"""What runs on a GPU, against the same on the CPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subbit
from subbit import Recipe
from subbit.binary.nm import Sparsity, keep_top
from subbit.checkpoint.reader import open_checkpoint
from subbit.loading import load_any
from subbit.tuning import distill as distilling
from subbit.tuning.graph import Replayed
from subbit.tuning.optimizer import set_rate
from subbit.tuning.tunable import latent_signs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]

STAGES: dict[str, Any] = {
    "reconstruction": {"steps": 4, "batch": 2, "precision": "float32"},
    "distillation": {"steps": 8, "batch": 2, "held_out": 1, "latent_rate": 5e-3, "precision": "float32"},
}
WINDOW = torch.arange(3, 40)[None]


def errors_of(directory: Path) -> list[float]:
    """Relative output errors of all linears."""
    return [linear["error"] for layer in subbit.inspect(directory)["layers"] for linear in layer["linears"]]


@pytest.mark.parametrize("method", ["stbllm", "pbs2p", "billm", "arb", "codes", "rtn", "gptq", "stbllm-as-released"])
def test_every_method_is_as_good_as_on_the_cpu(method: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Output errors within a hundredth on average; and the model gives the same logits on both."""
    recipe = recipe_for(method)
    for device in ("cpu", "cuda"):
        subbit.compress(tiny("llama-gqa"), recipe, tmp_path / device, device=device)
    here, there = errors_of(tmp_path / "cpu"), errors_of(tmp_path / "cuda")
    assert sum(there) == pytest.approx(sum(here), rel=0.01)
    logits = [load_any(tmp_path / "cuda", torch.float32)[0].to(d)(WINDOW.to(d)).logits.cpu() for d in ("cpu", "cuda")]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "mixtral"])
def test_tuning_is_that_of_the_cpu(family: str, tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """Both stages begin and end as on the CPU: roughly, since a codeword that differs changes all that follow. A step
    of a model with experts is not recorded, and works as well."""
    recipe = recipe_for("codes", calibration={"seq_len": 16}, **STAGES)
    layers, ends = {}, {}
    for device in ("cpu", "cuda"):
        subbit.compress(tiny(family), recipe, tmp_path / device, device=device)
        manifest = open_checkpoint(tmp_path / device).manifest
        layers[device] = [layer["reconstruction"]["before"] for layer in manifest["layers"]]
        ends[device] = manifest["distillation"]
    assert layers["cuda"][0] == pytest.approx(layers["cpu"][0], rel=0.05)
    assert layers["cuda"] == pytest.approx(layers["cpu"], rel=0.5)
    assert ends["cuda"]["after"] == pytest.approx(ends["cpu"]["after"], rel=0.5)


def test_a_recorded_step_is_the_step(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distillation with a CUDA graph ends where it ends without one, with activations kept or computed again."""
    ends = []
    calls: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        calls.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    for number, (recorded, again) in enumerate([(True, False), (False, False), (True, True)]):
        calls.clear()
        monkeypatch.setattr(distilling, "Replayed", Replayed if recorded else lambda step: step)
        stages = {**STAGES, "distillation": {**STAGES["distillation"], "checkpoint_activations": again}}
        recipe, out = recipe_for("codes", calibration={"seq_len": 16}, **stages), tmp_path / str(number)
        subbit.compress(tiny("llama-gqa"), recipe, out, device="cuda")
        assert len(calls) == (5 if recorded else 0)  # of eight steps, three before it is recorded
        ends.append(open_checkpoint(out).manifest["distillation"]["after"])
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-3)


def test_replayed_is_the_function() -> None:
    """With other numbers in every call, and a state that the calls change."""
    linear = nn.Linear(8, 8).cuda()
    total = torch.zeros(8, device="cuda")

    def function(inputs: Tensor, shift: Tensor) -> Tensor:
        total.add_(1.0)
        with torch.no_grad():
            return linear(inputs) + shift + total

    replayed = Replayed(function)
    for call in range(1, 9):
        inputs, shift = torch.randn(4, 8, device="cuda"), torch.randn(8, device="cuda")
        with torch.no_grad():
            expected = linear(inputs) + shift + call
        torch.testing.assert_close(replayed(inputs, shift), expected)


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """A function that waits for the GPU; with one warning, and random numbers can be drawn afterwards."""
    replayed = Replayed(lambda inputs: inputs * float(inputs.sum()))
    for _ in range(6):
        inputs = torch.randn(4, device="cuda")
        torch.testing.assert_close(replayed(inputs), inputs * inputs.sum())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("m", [4, 8, 16])
def test_latents_are_rounded_as_on_the_cpu(m: int) -> None:
    """Ties included."""
    latent = (2 * torch.randn(300, 4 * m, generator=torch.Generator().manual_seed(m))).round()
    for n in range(1, 4):
        expected = torch.where(latent < 0, -1, 1) * keep_top(latent.abs(), n, m)
        assert torch.equal(latent_signs(latent.cuda(), Sparsity(n, m)).cpu(), expected.to(torch.int8))


def test_an_interrupted_run_goes_on_on_the_gpu(
    tiny: Tiny, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in distillation, after a saved state: the end is that of a run in one go."""
    recipe = recipe_for("codes", calibration={"seq_len": 16}, **STAGES)
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "whole", device="cuda")
    monkeypatch.setattr("subbit.distillation.SAVE_SECONDS", 0.0)

    def stop(optimizer: torch.optim.Optimizer, number: int, steps: int) -> None:
        if number == 5:
            raise KeyboardInterrupt
        set_rate(optimizer, number, steps)

    with monkeypatch.context() as patch:
        patch.setattr("subbit.tuning.distill.set_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "halves", device="cuda")
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "halves", device="cuda", resume=True)
    ends = [open_checkpoint(tmp_path / out).manifest["distillation"]["after"] for out in ("whole", "halves")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_a_budget_on_the_gpu(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> None:
    """The plan measures what every linear costs there."""
    subbit.compress(tiny("llama-gqa"), recipe_for("codes", bits=1.2), tmp_path, device="cuda")
    assert 1.1 < subbit.inspect(tmp_path)["bits"]["stored"] <= 1.2
