"""Numbers that no encoder writes are found when a checkpoint is loaded, whatever runs it; and what loading leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from math import comb
from pathlib import Path

import pytest
import torch
from checkpoints import change_file, logits_of
from commands import Run, assert_one_line
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import subbit
from subbit import CheckpointError, Recipe
from subbit.integrations.transformers import release_files
from subbit.packing import codec
from subbit.packing.codec import check_codewords, codeword_bits, pack_bits
from subbit.packing.grouped import GroupedBinarySpec
from subbit.runtime import native

Tiny = Callable[[str], Path]
Recipes = Callable[..., Recipe]
SHARD = "model-layer-00001.safetensors"
NAME = "model.layers.1.mlp.up_proj"
EVERY_NM = [(1, 4), (1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (6, 8), (8, 8), (2, 16), (3, 16)]


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run what is loaded."""
    if request.param == "torch":
        monkeypatch.setenv("SUBBIT_NATIVE", "0")
    elif native.reason_missing():
        pytest.skip(str(native.reason_missing()))
    return str(request.param)


@pytest.fixture
def compress(tiny: Tiny, recipe_for: Recipes, tmp_path: Path) -> Callable[..., Path]:
    """``compress(method, …)``: a checkpoint of the tiny Llama."""

    def run(method: str, **fields: object) -> Path:
        subbit.compress(tiny("llama-mha"), recipe_for(method, **fields), tmp_path / "out")
        return tmp_path / "out"

    return run


def refused(directory: Path, complaint: str) -> None:
    """By both ways to load, with the file and the linear."""
    where = re.escape(str(directory / SHARD))
    for load in (subbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{where}: {NAME}: {complaint}") as error:
            load(directory)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("sparsity", ["2:8", "3:8", "4:8", "2:16"])
def test_codewords(sparsity: str, backend: str, compress: Callable[..., Path]) -> None:
    n, m = map(int, sparsity.split(":"))
    directory = compress("codes", sparsity=sparsity)
    largest = (1 << codeword_bits(n, m)) - 1 >> n

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.codes"][-1] = 255

    change_file(directory, SHARD, spoil)
    refused(directory, f"a codeword names mask {largest}, but {sparsity} has only {comb(m, n)}")


def test_grouped_codewords(backend: str, compress: Callable[..., Path]) -> None:
    directory = compress("pbs2p", sparsity="4:8")
    change_file(directory, SHARD, lambda tensors: tensors[f"{NAME}.codes"][3].fill_(255))
    refused(directory, "a codeword names mask 127, but 4:8 has only 70")


def test_symbol_bytes(compress: Callable[..., Path]) -> None:
    directory = compress("stbllm", sparsity="4:8")
    change_file(directory, SHARD, lambda tensors: tensors[f"{NAME}.symbols"][3, 0].fill_(250))
    refused(directory, "a symbol byte is 250")


def test_the_command_says_it_in_one_line(compress: Callable[..., Path], run: Run) -> None:
    directory = compress("codes", sparsity="2:8")
    change_file(directory, SHARD, lambda tensors: tensors[f"{NAME}.codes"][0, 0].fill_(127))
    ran = run("generate", directory, "--prompt", "the river")
    assert_one_line(ran, f"{SHARD}: {NAME}: a codeword names mask 31")


# ---- the check itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_every_place_is_looked_at(n: int, m: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All codewords pass; the smallest that is none is found in every place of a row, with any neighbours."""
    width, first = codeword_bits(n, m), comb(m, n) << n
    monkeypatch.setattr(codec, "CODEWORDS_AT_ONCE", 2 * count)
    every = torch.arange(min(first, 500)) * max(1, (first - 1) // 499) % first
    rows = torch.nn.functional.pad(every, (0, -len(every) % count)).view(-1, count)
    rows[-1, -1] = first - 1
    check_codewords(pack_bits(rows, width), count, n, m)
    if first == 1 << width:
        return
    for place, wrong in product(range(count), (first, (1 << width) - 1)):
        words = torch.full((3, count), first - 1)
        words[1, place] = wrong
        with pytest.raises(CheckpointError, match=f"names mask {wrong >> n}, but {n}:{m} has only {comb(m, n)}"):
            check_codewords(pack_bits(words, width), count, n, m)


def test_blocks_are_checked_each() -> None:
    """Codewords of a short last block, and padding that is none."""
    spec = GroupedBinarySpec(3, 40, 4, 8, 16, 1, False)
    words = torch.full((9, 2), (70 << 4) - 1)
    codes = pack_bits(words, 11).view(3, 9)[:, :8].clone()
    codes[:, 6:] = pack_bits(words[:3, :1], 11)
    tensors = {"codes": codes, "scales": torch.ones(3, 3, 2).half()}
    spec.check(tensors)
    codes[2, 6:] = pack_bits(torch.tensor([[70 << 4]]), 11)[0]
    with pytest.raises(CheckpointError, match="names mask 70"):
        spec.check(tensors)


# ---- what loading leaves ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(native.reason_missing() is not None, reason=str(native.reason_missing()))
def test_a_loaded_model_has_its_codewords_once(compress: Callable[..., Path]) -> None:
    """In the order of the kernels from the start, and with no weight file still open for a few norms."""
    directory = compress("codes", sparsity="2:8")
    model, _ = subbit.load(directory)
    linears = [one for name, one in model.named_modules() if name.endswith("_proj")]
    assert all(linear._native is not None and not linear.get_buffer("codes").numel() for linear in linears)
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text()
        assert str(directory / SHARD) not in maps
    before = logits_of(model)
    for move in (lambda: model.to("cpu"), lambda: nn.Module.to(model, torch.float32), lambda: nn.Module.float(model)):
        move()
        assert all(linear._native is not None for linear in linears)
        assert torch.equal(logits_of(model), before)
    assert all(module.get_buffer("row_scales").dtype == torch.float16 for module in linears)


def test_small_remains_of_a_file_are_copied(tmp_path: Path) -> None:
    """Less than half of a file, not more; parameters stay the same objects."""
    model = nn.Module()
    model.small, model.large = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.arange(40.0))
    model.register_buffer("scales", torch.arange(3.0)[:])
    files = {"small": tmp_path / "a", "scales": tmp_path / "a", "large": tmp_path / "b"}
    for file in set(files.values()):
        file.write_bytes(bytes(100))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    small = model.small
    release_files(model, files)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert [name for name in before if before[name] != after[name]] == ["small", "scales"]
    assert model.small is small
    assert torch.equal(model.small, torch.arange(4.0))
    assert torch.equal(model.get_buffer("scales"), torch.arange(3.0))
