"""Native kernels: against float64, on random linears of every shape; what they refuse; the operator and the module.

Run with `pytest tests/test_native.py`; tests/sanitize.sh runs it under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator
from itertools import product
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from subbit.binary.nm import Sparsity
from subbit.errors import CheckpointError, UserError
from subbit.linears import CodesLinear
from subbit.packing.codec import codeword_bits, pack_bits, packed_bytes
from subbit.packing.codes import CodesSpec, pack_codes
from subbit.packing.embedding import EmbeddingSpec
from subbit.runtime import native
from subbit.runtime.dispatch import choose, summary
from subbit.runtime.embedding import SubbitEmbedding, SubbitHead, TiedHead
from subbit.runtime.linear import SubbitLinear
from subbit.runtime.reference import packed_linear

pytestmark = pytest.mark.skipif(native.reason_missing() is not None, reason=str(native.reason_missing()))

FAST = [(1, 4), (1, 8), (2, 8), (3, 8), (4, 8), (1, 16), (2, 16), (3, 16)]
EVERY_NM = [*FAST, (2, 4), (4, 16)]
BOUND = 2e-3  # of the relative error of a product, outlier channels included


@pytest.fixture(params=native.variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has kernels for."""
    native.use(request.param)
    yield request.param
    native.use(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_linear(n: int, m: int, rows: int, columns: int, seed: int, scaled_columns: bool = True) -> CodesLinear:
    """Any mask, any signs, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // m, m, generator=generator).argsort(dim=2)
    keep = (order < n).reshape(rows, columns)
    signs = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1, 1) * keep
    row_scales = torch.randn(rows, generator=generator).half()
    column_scales = (torch.rand(columns, generator=generator) + 0.5).half() if scaled_columns else None
    return CodesLinear(Sparsity(n, m), signs.to(torch.int8), row_scales, column_scales)


def module_of(linear: CodesLinear, bias: Tensor | None = None) -> SubbitLinear:
    """As a checkpoint would be loaded."""
    spec, tensors = pack_codes(linear)
    module = SubbitLinear(spec, None if bias is None else nn.Parameter(bias, requires_grad=False))
    module.load_state_dict(tensors, strict=False)
    return module


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Of all numbers together."""
    return float((output.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# --- products -----------------------------------------------------------------------------------------------------


def fuzz(seed: int) -> None:
    """One random case against float64."""
    choice = random.Random(seed)
    n, m = choice.choice(EVERY_NM)
    rows = choice.choice([1, choice.randrange(1, 200), choice.choice([63, 64, 65, 128])])
    columns = m * choice.choice([1, choice.randrange(1, 40), choice.choice([31, 32, 33, 64, 96])])
    batch = choice.choice([1, 1, 2, 7, choice.randrange(1, 70)])
    dtype = choice.choice(native.DTYPES)
    linear = random_linear(n, m, rows, columns, seed, scaled_columns=choice.random() < 0.5)
    spec, tensors = pack_codes(linear)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, columns + 3, generator=generator).to(dtype)[:, choice.randrange(4) :][:, :columns]
    bias: Tensor | None = torch.randn(rows, generator=generator).to(choice.choice([dtype, *native.DTYPES]))
    bias = bias if choice.random() < 0.5 else None
    torch.set_num_threads(choice.choice([1, 2, 3]))
    offset = choice.randrange(4)  # codes that begin anywhere
    moved = torch.cat([tensors["codes"].new_zeros(offset), tensors["codes"].flatten()])[offset:]
    tensors["codes"] = moved.view_as(tensors["codes"])

    output = native.linear(inputs, spec, native.repack(spec, tensors), bias)

    expected = inputs.double() @ linear.dense().double().T + (0 if bias is None else bias.double())
    assert output.dtype == dtype
    assert output.shape == (batch, rows)
    # Rounding to 16 bits has an error of its own. A few outputs may be near zero by chance: then not relative to them.
    bound = BOUND + {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    typical = (inputs.double().square() @ linear.dense().double().T.square()).sum().sqrt()
    error = (output.double() - expected).norm() / torch.maximum(expected.norm(), typical)
    assert error <= bound, (n, m, rows, columns, batch, dtype)


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed: int, isa: str, threads: None) -> None:
    for case in range(12):
        fuzz(100 * seed + case)


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_outlier_channels(n: int, m: int, isa: str) -> None:
    """Eight channels fifty times as large as the others, the hardest case for tables on a grid."""
    linear = random_linear(n, m, 192, 2048, seed=n * m)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 2048, generator=generator)
    inputs[:, torch.randperm(2048, generator=generator)[:8]] *= 50
    output = native.linear(inputs, *repacked(linear), None)
    assert relative_error(output, inputs.double() @ linear.dense().double().T) <= BOUND


def repacked(linear: CodesLinear) -> tuple[CodesSpec, Tensor]:
    """The arguments of native.linear."""
    spec, tensors = pack_codes(linear)
    return spec, native.repack(spec, tensors)


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
@pytest.mark.parametrize("batch", [15, 16, 33, 100])
def test_large_batches(n: int, m: int, batch: int, isa: str) -> None:
    """Around the batch from which weights are decoded, and more inputs than have their tables at one time."""
    linear = random_linear(n, m, 130, 4096 if batch == 33 else 192, seed=batch)
    bias = torch.randn(130, generator=torch.Generator().manual_seed(batch))
    inputs = torch.randn(batch, linear.shape[1], generator=torch.Generator().manual_seed(batch))
    output = native.linear(inputs, *repacked(linear), bias)
    assert relative_error(output, inputs.double() @ linear.dense().double().T + bias.double()) <= BOUND


@pytest.mark.parametrize(("n", "m"), FAST)
def test_variants_agree(n: int, m: int) -> None:
    """Of the same tables, the same integer sums, but for an entry that is rounded the other way now and then.

    Of tables of another size or, for N:16, on another grid, nearly the same.
    """
    linear = random_linear(n, m, 130, 1000 // m * m, seed=3)
    inputs = torch.randn(3, linear.shape[1], generator=torch.Generator().manual_seed(3))
    outputs = {}
    for name in native.variants():
        native.use(name)
        spec, packed = repacked(linear)
        outputs[name] = (len(packed), native.linear(inputs, spec, packed, None))
    native.use(None)
    for size, output in outputs.values():
        expected_size, expected = outputs["portable"]
        assert relative_error(output, expected.double()) < (1e-4 if size == expected_size and m != 16 else 5e-4)


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
@pytest.mark.parametrize("batch", [3, 50])
def test_threads_do_not_change_the_result(n: int, m: int, batch: int, threads: None) -> None:
    linear = random_linear(n, m, 700, 256, seed=4)
    inputs = torch.randn(batch, 256, generator=torch.Generator().manual_seed(4))
    spec, packed = repacked(linear)
    outputs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        outputs.append(native.linear(inputs, spec, packed, None))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_special_inputs(isa: str) -> None:
    """Zeros, one huge channel, no inputs, more dimensions, a column that is not contiguous."""
    linear = random_linear(2, 8, 70, 512, seed=5)
    spec, packed = repacked(linear)
    dense = linear.dense().double()
    assert not native.linear(torch.zeros(2, 512), spec, packed, None).any()
    huge = torch.zeros(1, 512)
    huge[0, 77] = 1e30
    assert relative_error(native.linear(huge, spec, packed, None), huge.double() @ dense.T) <= BOUND
    assert native.linear(torch.zeros(0, 512), spec, packed, None).shape == (0, 70)
    assert native.linear(torch.zeros(2, 0, 512), spec, packed, None).shape == (2, 0, 70)
    assert native.linear(torch.ones(512), spec, packed, None).shape == (70,)
    rows = torch.randn(40, 512, generator=torch.Generator().manual_seed(6)) * torch.logspace(-20, 20, 40)[:, None]
    for output, expected in zip(native.linear(rows, spec, packed, None), rows.double() @ dense.T, strict=True):
        assert relative_error(output, expected) <= BOUND  # every input has a scale of its own
    strided = torch.randn(512, 4, 6, generator=torch.Generator().manual_seed(5)).permute(2, 1, 0)
    assert relative_error(native.linear(strided, spec, packed, None), strided.double() @ dense.T) <= BOUND


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_an_input_that_is_no_number_is_not_lost(value: float, n: int, m: int, isa: str) -> None:
    """Nothing finite where it counts, wherever it stands; other inputs of the batch are as ever."""
    linear = random_linear(n, m, 70, 528, seed=5)
    spec, packed = repacked(linear)
    dense = linear.dense()
    for column, batch in ((0, 3), (77, 3), (255, 3), (527, 3), (300, 35)):
        inputs = torch.randn(batch, 528, generator=torch.Generator().manual_seed(column))
        expected = inputs.double() @ dense.double().T
        inputs[1, column] = value
        output = native.linear(inputs, spec, packed, None)
        assert not output[1, dense[:, column] != 0].isfinite().any()
        assert relative_error(output[::2], expected[::2]) <= BOUND


# --- codewords ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_every_codeword(n: int, m: int, isa: str) -> None:
    """All codewords of N:M in one linear, decoded exactly, multiplied, and given back as they are stored."""
    count = comb(m, n) << n
    words = torch.arange(count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    groups = 1 + count // 70
    words = torch.nn.functional.pad(words, (0, -count % groups)).view(-1, groups)
    spec = CodesSpec(len(words), groups * m, n, m, False)
    tensors = {"codes": pack_bits(words, codeword_bits(n, m)), "row_scales": torch.ones(len(words)).half()}
    packed = native.repack(spec, tensors)
    dense = spec.decode_rows(tensors)
    assert torch.equal(native.decode(spec, packed, slice(0, len(words))), dense)
    assert torch.equal(native.stored_codes(spec, packed), tensors["codes"])
    inputs = torch.randn(2, groups * m, generator=torch.Generator().manual_seed(0))
    assert relative_error(native.linear(inputs, spec, packed, None), inputs.double() @ dense.double().T) <= BOUND


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
@pytest.mark.parametrize("scaled_columns", [False, True])
def test_decoding_is_exact(n: int, m: int, scaled_columns: bool) -> None:
    linear = random_linear(n, m, 70, 5 * 16, seed=6, scaled_columns=scaled_columns)
    spec, packed = repacked(linear)
    assert torch.equal(native.decode(spec, packed, slice(0, 70)), linear.dense())
    assert torch.equal(native.decode(spec, packed, slice(3, 66)), linear.dense()[3:66])


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_codewords_that_no_encoder_writes(n: int, m: int) -> None:
    """Each of them, at the first and at the last place."""
    width, count = codeword_bits(n, m), comb(m, n) << n
    for wrong, place in product(range(count, 1 << width, 1 + (1 << width) // 200), (0, -1)):
        words = torch.zeros(66, 9, dtype=torch.int64)
        words[place, place] = wrong
        spec = CodesSpec(66, 9 * m, n, m, False)
        tensors = {"codes": pack_bits(words, width), "row_scales": torch.ones(66).half()}
        with pytest.raises(CheckpointError, match=f"names mask {wrong >> n}, but {n}:{m} has only {comb(m, n)}"):
            native.repack(spec, tensors)


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_no_table_is_read_past_its_end(n: int, m: int) -> None:
    """Any bytes in the place of codes, which repack() would not have written: wrong weights, and nothing worse."""
    spec = CodesSpec(66, 9 * 16, n, m, False)
    codes = torch.zeros(*spec.tensors()["codes"][0], dtype=torch.uint8)
    packed = native.repack(spec, {"codes": codes, "row_scales": torch.ones(66).half()})
    packed[: -4 * 66].fill_(255)
    native.decode(spec, packed, slice(0, 66))
    native.stored_codes(spec, packed)
    assert native.linear(torch.ones(2, 9 * 16), spec, packed, None).shape == (2, 66)


def test_tensors_of_another_shape_are_refused() -> None:
    spec, tensors = pack_codes(random_linear(2, 8, 8, 64, seed=7))
    with pytest.raises(CheckpointError, match="codes"):
        native.repack(spec, {**tensors, "codes": tensors["codes"][:, :-1]})
    packed = native.repack(spec, tensors)
    with pytest.raises(ValueError, match="packed tensor"):
        native.linear(torch.ones(64), spec, packed[:-4], None)
    with pytest.raises(ValueError, match="packed tensor"):
        native.linear(torch.ones(72), spec, packed, None)
    with pytest.raises(ValueError, match="bias"):
        native.linear(torch.ones(64), spec, packed, torch.ones(7))


@pytest.mark.parametrize(("n", "m"), EVERY_NM)
def test_memory(n: int, m: int, isa: str) -> None:
    """The order of the kernels takes at most 1.3 times the codes of the file (4/3 for two), four bytes for a scale.

    With tables of 64 entries, no more bytes than the file for three (with some of them, for 1:4), and at most 2/9 more.
    """
    spec = CodesSpec(1024, 4096, n, m, True)
    size = native.shape_of_spec(spec).bytes - 4 * (1024 + 4096)
    limit = 4 / 3 if (n, m) in ((1, 4), (3, 8)) else 1.3
    if native.variant() in ("AVX512BW", "NEON"):
        limit = 1.0 if (n, m) == (1, 4) else limit
    if native.variant() in ("AMX", "AVX512VBMI"):
        limit = 11 / 9 if (n, m) == (3, 8) else 1.0 if (n, m) in ((1, 4), (2, 8), (4, 8)) else limit
    assert size <= limit * 1024 * packed_bytes(4096 // m, codeword_bits(n, m))


def test_linears_share_pages() -> None:
    """They lie one after the other in zeroed memory, and each has a storage of its own."""
    for count in (1, 100, 3 << 20, 40 << 20):
        one, other = native.zeros(count), native.zeros(count)
        assert not one.any()
        assert not other.any()
        one.fill_(1)
        assert not other.any()
        assert one.data_ptr() % 64 == 0
        assert one.untyped_storage().nbytes() == count


# --- the module ---------------------------------------------------------------------------------------------------


def test_module_keeps_what_is_stored() -> None:
    """State dict, copies, pickles and casts, before and after the first use."""
    linear = random_linear(2, 8, 70, 128, seed=8)
    module = module_of(linear, torch.ones(70))
    inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(8))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    output = module(inputs)
    assert relative_error(output, inputs.double() @ linear.dense().double().T + 1) <= BOUND
    assert not module.get_buffer("codes").numel()  # only once in memory
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).to("cpu")):
        after = other.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(other(inputs), output)
        assert torch.equal(other.packed()["codes"], before["codes"])
    half = copy.deepcopy(module).bfloat16()
    assert half.get_buffer("row_scales").dtype == torch.float16
    assert half(inputs.bfloat16()).dtype == torch.bfloat16


def test_module_follows_new_weights() -> None:
    one, other = random_linear(2, 8, 70, 128, seed=9), random_linear(2, 8, 70, 128, seed=10)
    inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(9))
    module = module_of(one)
    module(inputs)
    module.load_state_dict(pack_codes(other)[1])
    assert relative_error(module(inputs), inputs.double() @ other.dense().double().T) <= BOUND
    for name, tensor in pack_codes(one)[1].items():  # as transformers puts tensors in
        module.register_buffer(name, tensor)
    assert relative_error(module(inputs), inputs.double() @ one.dense().double().T) <= BOUND


def test_module_with_an_invalid_codeword() -> None:
    module = module_of(random_linear(2, 8, 4, 64, seed=11))
    module.get_buffer("codes").fill_(255)
    with pytest.raises(CheckpointError, match="names mask 31"):
        module(torch.ones(64))


def test_gradients_come_from_the_reference() -> None:
    linear = random_linear(2, 8, 70, 128, seed=12)
    module = module_of(linear)
    module(torch.ones(128))
    inputs = torch.ones(128, requires_grad=True)
    module(inputs).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, linear.dense().sum(dim=0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not module(inputs).requires_grad


def test_compile_and_export() -> None:
    """The operator is one node of the graph."""
    module = module_of(random_linear(2, 8, 70, 128, seed=13), torch.ones(70)).eval()
    inputs = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(13))
    expected = module(inputs)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), expected)
    program = torch.export.export(module, (inputs,))
    assert any("subbit.linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(inputs), expected)
    fresh = torch.compile(module_of(random_linear(2, 8, 70, 128, seed=13), torch.ones(70)), backend="eager")
    assert torch.equal(fresh(inputs), expected)  # prepared while it is being compiled
    torch.library.opcheck(
        torch.ops.subbit.linear.default,
        (inputs, module.prepare().packed, module.bias, 70, 2, 8, True),
        raise_exception=True,
    )


def test_whoever_has_to_see_the_operator_does() -> None:
    """Kernels are called directly only where nothing of torch listens."""
    linear = random_linear(2, 8, 70, 128, seed=15)
    spec, packed = repacked(linear)
    inputs = torch.randn(3, 128, generator=torch.Generator().manual_seed(15))
    expected = native.linear(inputs, spec, packed, None)

    ready = native.Product.of(spec, packed)

    def product(x: Tensor) -> Tensor:
        return ready(x, None)

    assert native.is_plain(inputs)
    assert not native.is_plain(inputs.clone().requires_grad_())
    assert not native.is_plain(nn.Parameter(inputs))
    with torch.no_grad():
        assert native.is_plain(inputs.clone().requires_grad_())
    assert "subbit.linear" in make_fx(product)(inputs).code
    assert "subbit::linear" in str(torch.jit.trace(product, inputs, check_trace=False).graph)
    assert torch.equal(torch.vmap(product)(inputs), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert product(mode.from_tensor(inputs)).shape == (3, 70)


# --- heads --------------------------------------------------------------------------------------------------------


def random_rows(
    bits: int, rows: int, columns: int, group_size: int, seed: int
) -> tuple[EmbeddingSpec, dict[str, Tensor]]:
    """Any codes, zeros and scales, those of both signs."""
    generator = torch.Generator().manual_seed(seed)
    spec = EmbeddingSpec(rows, columns, bits, group_size)
    shapes = {name: shape for name, (shape, _) in spec.tensors().items()}
    codes = torch.randint(256, shapes["codes"], generator=generator, dtype=torch.uint8)
    zeros = torch.randint(2**bits, shapes["zeros"], generator=generator, dtype=torch.uint8)
    scales = (torch.randn(shapes["scales"], generator=generator) / 50).half()
    scales[0, 0] = 3e-7  # below the smallest normal number
    return spec, {"codes": codes, "zeros": zeros, "scales": scales}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "group_size"), [(576, 64), (64, 64), (80, 32), (100, 64), (7, 3), (33, 64), (512, 256)]
)
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_heads(bits: int, columns: int, group_size: int, dtype: torch.dtype, isa: str, threads: None) -> None:
    """Against float64, with outlier channels and a bias; the number of threads changes nothing."""
    spec, tensors = random_rows(bits, 700, columns, group_size, seed=columns)
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2, 3, columns, generator=generator)
    inputs[..., torch.randperm(columns, generator=generator)[:3]] *= 50
    bias, given = torch.randn(700, generator=generator), inputs.to(dtype)
    outputs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        outputs.append(native.rows_linear(given, spec, tensors, bias))
    assert torch.equal(*outputs)
    assert outputs[0].dtype == dtype
    expected = given.double() @ spec.decode_rows(tensors).double().T + bias.double()
    bound = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative_error(outputs[0], expected) <= bound


def test_special_inputs_of_heads(isa: str) -> None:
    spec, tensors = random_rows(8, 20, 128, 64, seed=0)
    inputs = torch.zeros(3, 128)
    inputs[1, 70], inputs[2, 3] = float("nan"), float("inf")
    output = native.rows_linear(inputs, spec, tensors, None)
    assert not output[0].any()
    assert output[1:].isnan().all()
    assert native.rows_linear(torch.zeros(0, 128), spec, tensors, None).shape == (0, 20)
    with pytest.raises(ValueError, match="columns"):
        native.rows_linear(torch.zeros(1, 64), spec, tensors, None)
    with pytest.raises(ValueError, match="zeros of the matrix"):
        native.rows_linear(inputs, spec, {**tensors, "zeros": tensors["zeros"][:5]}, None)


def test_heads_use_the_kernel_for_a_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding; a batch, gradients and other dtypes are a dense product."""
    spec, tensors = random_rows(8, 50, 64, 64, seed=0)
    embedding, head = SubbitEmbedding(spec), SubbitHead(spec)
    for module in (embedding, head):
        module.load_state_dict(tensors, strict=False)
    calls: list[int] = []
    kernel = native.rows_linear

    def counted(*given: Any) -> Tensor:
        calls.append(len(given[0]))
        return kernel(*given)

    monkeypatch.setattr(native, "rows_linear", counted)
    expected = torch.ones(64).double() @ spec.decode_rows(tensors).double().T
    heads: list[torch.nn.Module] = [TiedHead(embedding), head]
    for one in heads:
        calls.clear()
        for inputs in (torch.ones(1, 64), torch.ones(8, 64), torch.ones(9, 64), torch.ones(1, 64).double()):
            assert torch.allclose(one(inputs).double(), expected.expand(len(inputs), -1), rtol=1e-3, atol=1e-3)
        assert calls == [1, 8]
        assert one(torch.ones(1, 64, requires_grad=True)).requires_grad
        assert calls == [1, 8]
    assert choose(EmbeddingSpec(50, 512, 8, 512)).name == "torch"


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs what, and why."""
    codes = CodesSpec(70, 128, 2, 8, False)
    assert choose(codes).name == "native"
    assert choose(codes).reason == native.variant()
    assert "cuda" in choose(codes, "cuda").reason
    assert "float64" in choose(codes, dtype=torch.float64).reason
    assert "gradients" in choose(codes, needs_grad=True).reason
    assert "5:8" in choose(CodesSpec(70, 128, 5, 8, False)).reason
    assert native.variant() in summary()
    monkeypatch.setenv("SUBBIT_NATIVE", "0")
    assert choose(codes).name == "torch"
    assert "SUBBIT_NATIVE=0" in summary()
    linear = random_linear(2, 8, 70, 128, seed=14)
    module, inputs = module_of(linear), torch.ones(2, 128)
    assert torch.equal(module(inputs), packed_linear(inputs, module.spec, module.packed(), None))


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_chosen", None)
    monkeypatch.setenv("SUBBIT_ISA", "MMX")
    with pytest.raises(UserError, match="SUBBIT_ISA is MMX"):
        native.variant()
