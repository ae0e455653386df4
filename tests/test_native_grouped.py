"""The native kernels of ``grouped_binary`` linears (BiLLM, ARB-LLM, STBLLM, PBS²P), against their definition.

tests/sanitize.sh runs this under the address and undefined-behaviour sanitizers, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from grouped_linears import random_grouped
from torch import Tensor

from subbit.errors import CheckpointError
from subbit.linears import GroupedBinaryLinear
from subbit.packing.grouped import GroupedBinarySpec, pack_grouped
from subbit.runtime import native
from subbit.runtime.dispatch import choose
from subbit.runtime.linear import SubbitLinear

pytestmark = pytest.mark.skipif(native.reason_missing() is not None, reason=str(native.reason_missing()))

# (regions, regions of the salient columns, column scales)
KINDS = [
    (2, 1, False),
    (3, 1, False),
    (1, 0, False),
    (1, 1, False),
    (2, 0, True),
    (2, 2, False),
    (2, 2, True),
    (3, 2, True),
]


@pytest.fixture(params=native.variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has kernels for."""
    native.use(request.param)
    yield request.param
    native.use(None)


def module_of(linear: GroupedBinaryLinear) -> SubbitLinear:
    """As a checkpoint is loaded."""
    spec, tensors = pack_grouped(linear)
    module = SubbitLinear(spec)
    module.load_state_dict(tensors)
    return module


def expected_of(linear: GroupedBinaryLinear, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64."""
    product = inputs.double() @ linear.dense().double().T
    return product if bias is None else product + bias.double()


def error_of(output: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return float((output.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("regions", "salient_regions", "columns"), KINDS)
@pytest.mark.parametrize(("n", "m"), [(4, 8), (5, 8), (7, 8), (1, 1), (8, 8), (16, 16), (3, 4), (2, 16), (4, 16)])
def test_decoding_is_exact(n: int, m: int, regions: int, salient_regions: int, columns: bool, isa: str) -> None:
    """To the bit, in blocks of 64 with a short one at the end, any rows at a time."""
    linear = random_grouped(n, m, regions, salient_regions, columns, shape=(37, 208))
    spec, tensors = pack_grouped(linear)
    assert native.supports_grouped(spec)
    dense = linear.dense()
    assert torch.equal(native.decode_grouped(spec, tensors, slice(0, 37)), dense)
    assert torch.equal(native.decode_grouped(spec, tensors, slice(5, 22)), dense[5:22])
    assert torch.equal(native.decode_grouped(spec, tensors, slice(30, 60)), dense[30:])


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize(("regions", "salient_regions", "columns"), KINDS)
def test_products(regions: int, salient_regions: int, columns: bool, dtype: torch.dtype, isa: str) -> None:
    """Of one vector, a few and many, with a bias; the number of threads changes nothing."""
    linear = random_grouped(4, 8, regions, salient_regions, columns, shape=(700, 200), block=128)
    spec, tensors = pack_grouped(linear)
    generator = torch.Generator().manual_seed(regions)
    bias, before = torch.randn(700, generator=generator), torch.get_num_threads()
    for shape in ((200,), (1, 3, 200), (6, 200)):
        inputs = torch.randn(shape, generator=generator)
        inputs[..., :3] *= 50
        outputs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(native.grouped_linear(inputs.to(dtype), spec, tensors, bias))
        torch.set_num_threads(before)
        assert len(shape) == 2 or torch.equal(*outputs)  # many vectors are torch's product
        assert outputs[0].dtype == dtype
        assert outputs[0].shape == (*shape[:-1], 700)
        bound = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
        assert error_of(outputs[0], expected_of(linear, inputs.to(dtype), bias)) <= bound


def test_random_shapes(isa: str) -> None:
    """Rows, columns, blocks, N:M, batches and threads of every kind."""
    draw = random.Random(0)
    before = torch.get_num_threads()
    for _ in range(60):
        n, m = draw.choice([(1, 1), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (6, 8), (1, 16), (3, 16)])
        block, rows = 16 * draw.choice([1, 2, 3, 8, 16, 64]), draw.randint(1, 130)
        width = m * draw.randint(1, 2 * block // m + 3)
        linear = random_grouped(n, m, *draw.choice(KINDS), shape=(rows, width), block=block)
        spec, tensors = pack_grouped(linear)
        assert torch.equal(native.decode_grouped(spec, tensors, slice(0, rows)), linear.dense())
        inputs = torch.randn(draw.randint(1, 4), width)
        torch.set_num_threads(draw.randint(1, 4))
        output = native.grouped_linear(inputs, spec, tensors, None)
        torch.set_num_threads(before)
        expected = expected_of(linear, inputs)
        assert (output.double() - expected).norm() <= 1e-6 * inputs.norm() * linear.dense().norm()


def test_what_no_kernel_is_for() -> None:
    spec, _ = pack_grouped(random_grouped(4, 8, 2, 1, False))
    assert choose(spec).name == "native"
    assert "gradients" in choose(spec, needs_grad=True).reason
    wide, uneven = replace(spec, block_size=2048), replace(spec, block_size=24)
    for other in (wide, uneven, replace(spec, m=12), replace(spec, n=8, m=16)):
        assert choose(other).name == "torch"


def test_modules_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has to see the product; gradients and other dtypes are the torch backend's."""
    linear = random_grouped(5, 8, 3, 1, False, shape=(50, 128))
    module = module_of(linear)
    calls: list[GroupedBinarySpec] = []
    kernel = native.grouped_linear

    def counted(inputs: Tensor, spec: GroupedBinarySpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        calls.append(spec)
        return kernel(inputs, spec, tensors, bias)

    monkeypatch.setattr(native, "grouped_linear", counted)
    inputs = torch.randn(2, 128)
    with torch.inference_mode():
        assert error_of(module(inputs), expected_of(linear, inputs)) < 1e-6
        assert error_of(module(inputs.repeat(20, 1)), expected_of(linear, inputs.repeat(20, 1))) < 1e-6
        assert len(calls) == 2
        module(inputs.double())
    given = inputs.clone().requires_grad_()
    module(given).sum().backward()
    assert given.grad is not None
    assert error_of(given.grad, linear.dense().double().sum(dim=0).expand(2, -1)) < 1e-6
    assert len(calls) == 2


def test_compiled_modules_use_the_torch_backend() -> None:
    linear = random_grouped(4, 8, 2, 1, False)
    compiled, inputs = torch.compile(module_of(linear), backend="eager"), torch.randn(2, 208)
    assert error_of(compiled(inputs), expected_of(linear, inputs)) < 1e-6


@pytest.mark.parametrize("regions", [1, 3])
def test_symbols_that_no_encoder_writes(regions: int, isa: str) -> None:
    """In salient columns a residual sign is 0 or 1, and with one region the symbol of all others is 0."""
    linear = random_grouped(4, 8, regions, 1, False, shape=(40, 208))
    spec, tensors = pack_grouped(linear)
    symbol = torch.where(linear.salient if regions == 3 else ~linear.salient, regions - 1 or 1, linear.symbol)
    _, wrong = pack_grouped(replace(linear, symbol=torch.where(linear.keep, symbol, 0).to(torch.uint8)))
    for rows in (slice(0, 40), slice(7, 8)):
        with pytest.raises(CheckpointError, match="no encoder writes"):
            native.decode_grouped(spec, wrong, rows)
    with pytest.raises(CheckpointError, match="no encoder writes"):
        native.grouped_linear(torch.ones(1, 208), spec, wrong, None)
    assert torch.equal(native.decode_grouped(spec, tensors, slice(0, 40)), linear.dense())


def test_wrong_tensors() -> None:
    spec, tensors = pack_grouped(random_grouped(4, 8, 2, 1, False))
    with pytest.raises(ValueError, match="the inputs have 64 columns"):
        native.grouped_linear(torch.zeros(1, 64), spec, tensors, None)
    with pytest.raises(ValueError, match="symbols of the matrix"):
        native.grouped_linear(torch.zeros(1, 208), spec, {**tensors, "symbols": tensors["symbols"][:3]}, None)
    with pytest.raises(ValueError, match="the bias"):
        native.grouped_linear(torch.zeros(1, 208), spec, tensors, torch.zeros(3))
    assert native.grouped_linear(torch.zeros(0, 208), spec, tensors, None).shape == (0, 5)
