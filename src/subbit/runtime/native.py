"""The native kernels of ``codes`` linears (operator ``subbit::linear``), of ``grouped_binary`` linears and of heads.

docs/kernels.md says how they work.

The extension may be missing (``SUBBIT_NATIVE=0`` when subbit was installed, or no compiler) or switched off
(``SUBBIT_NATIVE=0`` now); then :func:`reason_missing` says so, and the torch backend runs everything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from subbit.binary.codebook import kept_columns
from subbit.errors import CheckpointError, UserError
from subbit.packing.codec import codeword_bits
from subbit.packing.codes import CodesSpec
from subbit.packing.embedding import EmbeddingSpec
from subbit.packing.grouped import GroupedBinarySpec
from subbit.packing.spec import LinearSpec
from subbit.runtime.reference import packed_linear

if TYPE_CHECKING:
    from subbit.runtime import _native
else:
    try:
        from subbit.runtime import _native
    except ImportError:
        _native = None

__all__ = [
    "DTYPES",
    "Product",
    "decode",
    "decode_grouped",
    "grouped_linear",
    "is_fast",
    "is_plain",
    "linear",
    "read_memory",
    "reason_missing",
    "repack",
    "round_latents",
    "rows_linear",
    "stored_codes",
    "supports",
    "supports_grouped",
    "supports_rows",
    "use",
    "variant",
    "variants",
    "zeros",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # that the kernels read and write themselves
# From this batch on, decoding a tile and a dense product are faster than looking every codeword up (docs/kernels.md).
# Those that look up a vector of rows at a time are faster than a float32 product at any batch.
DENSE_FROM = 16
TILE_WEIGHTS = 1 << 20  # decoded at a time
ROWS_UP_TO = 8  # vectors; for more of them a head is decoded a tile at a time
GROUPED_UP_TO = 4  # vectors, likewise of a grouped_binary linear


def reason_missing() -> str | None:
    """Why there are no native kernels; None where there are."""
    if os.environ.get("SUBBIT_NATIVE") == "0":
        return "switched off by SUBBIT_NATIVE=0"
    return "native kernels are not built" if _native is None else None


def supports(n: int, m: int) -> bool:
    """Whether there is a kernel for ``codes`` of N:M."""
    return m in (4, 8, 16) and 1 <= n <= min(4, m - 1)


def supports_rows(spec: EmbeddingSpec) -> bool:
    """Whether there is a kernel for the matrix of an embedding, for a few vectors at a time (:data:`ROWS_UP_TO`)."""
    return spec.group_size <= 256


def supports_grouped(spec: GroupedBinarySpec) -> bool:
    """Whether there is a kernel for the linears of BiLLM, ARB-LLM, STBLLM and PBS²P."""
    masks = spec.n == spec.m or (spec.m in (4, 8, 16) and codeword_bits(spec.n, spec.m) <= 16)
    return masks and spec.block_size % 16 == 0 and spec.block_size <= 1024 and spec.regions <= 3


def is_fast(n: int, m: int) -> bool:
    """Whether the kernel of N:M looks a vector of rows up at a time; the others take one codeword after the other."""
    return m == 8 or (n, m) in ((1, 4), (1, 16), (2, 16), (3, 16))


def variants() -> list[str]:
    """The instruction sets that this processor has kernels for, best first."""
    return [] if reason_missing() else _native.variants()


@lru_cache(maxsize=1)
def join_torch_threads() -> None:
    """Let the kernels run on the threads of torch's OpenMP, where torch brings GNU's."""
    folder = Path(torch.__file__).parent
    for library in [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]:
        function = ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
        if function:
            _native.use_gomp_parallel(function)
            return


def use(name: str | None) -> None:
    """Choose an instruction set by name, for tests and benchmarks; None is the best one again.

    A linear repacked for one instruction set is not to be multiplied with another.
    """
    global _chosen
    _chosen = _native.find(name or variants()[0])


_chosen: _native.Kernels | None = None


def kernels() -> _native.Kernels:
    """The kernels in use: the best ones, or what ``SUBBIT_ISA`` names, until :func:`use`."""
    if _chosen is None:
        join_torch_threads()
        given = os.environ.get("SUBBIT_ISA")
        names = {name.lower(): name for name in variants()}
        if given and given.lower() not in names:
            raise UserError(f"SUBBIT_ISA is {given}, but this processor has kernels for: {', '.join(variants())}")
        use(names[given.lower()] if given else None)
    assert _chosen is not None
    return _chosen


def variant() -> str:
    """Name of the instruction set in use."""
    return kernels().name


def address(tensor: Tensor | None) -> int:
    """Where the numbers of a contiguous CPU tensor are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def shape_of(rows: int, columns: int, n: int, m: int, column_scales: bool) -> _native.Shape:
    """What the extension calls a shape: the order of the codes is that of the kernels in use."""
    return make_shape(rows, columns, n, m, column_scales, kernels())


@lru_cache(maxsize=256)
def make_shape(rows: int, columns: int, n: int, m: int, column_scales: bool, kernels: _native.Kernels) -> _native.Shape:
    """See :func:`shape_of`."""
    return _native.Shape(rows, columns, n, m, column_scales, kernels)


def shape_of_spec(spec: CodesSpec) -> _native.Shape:
    """The shape of a linear."""
    return shape_of(spec.out_features, spec.in_features, spec.n, spec.m, spec.has_column_scales)


class Region:
    """Memory that small tensors lie in one after the other, because a page of 2 MiB holds several of them."""

    SIZE, PAGE = 32 << 20, 2 << 20

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size + self.PAGE, dtype=torch.uint8)  # what is not written takes no memory
        self.used, self.end = -address(self.memory) % self.PAGE, self.memory.numel()
        _native.use_large_pages(address(self.memory) + self.used, size)

    def take(self, count: int) -> Tensor | None:
        """The next (count,), which nobody has written; None if there are not as many."""
        start = self.used
        if count > self.end - start:
            return None
        self.used += -(-count // 64) * 64
        # Through NumPy, so that its storage is these bytes alone: saving it does not save its neighbours.
        return torch.from_numpy(self.memory.numpy()[start : start + count])


_region: Region | None = None
_region_lock = Lock()


def zeros(count: int) -> Tensor:
    """(count,) uint8 in memory that is fast to read from end to end."""
    global _region
    with _region_lock:
        tensor = _region.take(count) if _region else None
        if tensor is None:
            region = Region(max(count, Region.SIZE))
            tensor = region.take(count)
            if count < Region.SIZE:
                _region = region
    assert tensor is not None
    return tensor.zero_()


def repack(spec: CodesSpec, tensors: dict[str, Tensor]) -> Tensor:
    """(bytes,) uint8: the linear in the order in which the kernels read it, scales included.

    Raises:
        CheckpointError: a codeword that no encoder writes, or tensors that are not what the description says.
    """
    for name, (shape, dtype) in spec.tensors().items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            raise CheckpointError(f"{name} of a linear is {list(tensors[name].shape)}, not {list(shape)}")
    shape_ = shape_of_spec(spec)
    packed = zeros(shape_.bytes)
    codes, rows = tensors["codes"].contiguous(), tensors["row_scales"].float().contiguous()
    columns = tensors["column_scales"].float().contiguous() if spec.has_column_scales else None
    threads = torch.get_num_threads()
    wrong = _native.repack(shape_, address(codes), address(rows), address(columns), address(packed), threads)
    if wrong >= 0:
        count = len(kept_columns(spec.n, spec.m))
        raise CheckpointError(f"a codeword names mask {wrong >> spec.n}, but {spec.label} has only {count}")
    return packed


def stored_codes(spec: CodesSpec, packed: Tensor) -> Tensor:
    """The tensor ``codes`` as it is stored: the inverse of :func:`repack`."""
    shape, dtype = spec.tensors()["codes"]
    codes = torch.zeros(shape, dtype=dtype)
    _native.unpack(shape_of_spec(spec), address(packed), address(codes))
    return codes


def decode(spec: CodesSpec, packed: Tensor, rows: slice) -> Tensor:
    """(rows, in) float32: the dense weights of some rows, exactly those of ``spec.decode_rows``."""
    return decode_rows(shape_of_spec(spec), packed, rows.start, rows.stop, spec.in_features)


def decode_rows(shape: _native.Shape, packed: Tensor, start: int, stop: int, columns: int) -> Tensor:
    """See :func:`decode`."""
    weight = torch.empty(stop - start, columns)
    _native.decode(shape, address(packed), start, stop - start, address(weight))
    return weight


def round_latents(latent: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """(out, in): see :func:`subbit.tuning.tunable.latent_signs`; ``latent`` is float32, M is 4, 8 or 16.

    Args:
        dtype: int8 or bfloat16.
    """
    latent = latent.detach().contiguous()
    signs = torch.empty(latent.shape, dtype=dtype)
    groups, threads = latent.numel() // m, torch.get_num_threads()
    _native.round_latents(address(latent), groups, n, m, address(signs), dtype == torch.bfloat16, threads)
    return signs


library = torch.library.Library("subbit", "DEF")
library.define(
    "linear(Tensor input, Tensor packed, Tensor? bias, int out_features, int n, int m, bool column_scales) -> Tensor"
)


class Product:
    """A linear that :func:`repack` prepared, to be called with inputs: (..., in) → (..., out) in their dtype.

    Raises:
        ValueError: the packed tensor is not that of a linear of this shape.
    """

    def __init__(self, packed: Tensor, rows: int, columns: int, n: int, m: int, column_scales: bool) -> None:
        self.shape = shape_of(rows, columns, n, m, column_scales)
        if packed.numel() != self.shape.bytes or packed.dtype != torch.uint8 or not packed.is_contiguous():
            raise ValueError("the packed tensor is not that of a linear of this shape: use repack()")
        self.packed, self.described = packed, (rows, n, m, column_scales)
        self.rows, self.columns, self.fast = rows, columns, is_fast(n, m)
        self.multiply = _native.Linear(kernels(), self.shape, packed.data_ptr()).multiply

    @classmethod
    def of(cls, spec: CodesSpec, packed: Tensor) -> Product:
        """Of a linear."""
        return cls(packed, spec.out_features, spec.in_features, spec.n, spec.m, spec.has_column_scales)

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Without torch's dispatcher where it has nothing to do."""
        if not is_plain(inputs):
            result: Tensor = torch.ops.subbit.linear(inputs, self.packed, bias, *self.described)
            return result
        return self.run(inputs, bias)

    def run(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """The product, in float32, rounded to the dtype of ``inputs`` at the end."""
        if inputs.shape[-1] != self.columns:
            raise ValueError(f"the packed tensor is that of a linear of {self.columns} inputs, not {inputs.shape[-1]}")
        check_bias(bias, self.rows)
        if not self.fast and inputs.numel() >= DENSE_FROM * self.columns:
            return multiply_tiles(inputs, self.shape, self.packed, bias, self.rows)
        return call_kernel(self.multiply, inputs, bias, self.rows)


def linear_cpu(
    inputs: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, n: int, m: int, column_scales: bool
) -> Tensor:
    """``inputs`` (..., in) times a repacked linear."""
    return Product(packed, out_features, inputs.shape[-1], n, m, column_scales).run(inputs, bias)


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """ValueError unless it has a number for every output."""
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias is {list(bias.shape)}, not [{out_features}]")


def call_kernel(multiply: Callable[..., None], inputs: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """(..., out) in the dtype of ``inputs`` (..., in), by a kernel.

    Its arguments are the address of the inputs, whether they are bfloat16, how many vectors they are, the address of
    the bias, whether it is bfloat16, the address of the outputs, and the number of threads.
    """
    dtype = inputs.dtype
    if dtype not in KERNEL_DTYPES:
        return call_kernel(multiply, inputs.float(), bias, out_features).to(dtype)
    inputs = inputs.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in KERNEL_DTYPES else bias.float()).contiguous()
    output = torch.empty((*inputs.shape[:-1], out_features), dtype=dtype)
    brief_bias = bias is not None and bias.dtype is torch.bfloat16
    batch, threads = output.numel() // out_features, torch.get_num_threads()
    multiply(inputs.data_ptr(), dtype is torch.bfloat16, batch, address(bias), brief_bias, output.data_ptr(), threads)
    return output


def multiply_tiles(
    inputs: Tensor, shape: _native.Shape, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """As :func:`linear_cpu`, a tile of decoded rows at a time."""
    columns = inputs.shape[-1]
    rows = inputs.reshape(-1, columns).float()
    output = torch.empty(len(rows), out_features)
    step = max(1, TILE_WEIGHTS // columns)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        weight = decode_rows(shape, packed, start, stop, columns)
        part = None if bias is None else bias[start:stop].float()
        output[:, start:stop] = torch.nn.functional.linear(rows, weight, part)
    return output.view(*inputs.shape[:-1], out_features).to(inputs.dtype)


def linear_fake(
    inputs: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, n: int, m: int, column_scales: bool
) -> Tensor:
    """The shape of the result, for torch.compile and torch.export."""
    return inputs.new_empty(*inputs.shape[:-1], out_features)


library.impl("linear", linear_cpu, "CPU")
torch.library.register_fake("subbit::linear", linear_fake, lib=library)


def read_memory(memory: Tensor) -> int:
    """Read all bytes on torch's number of threads, as fast as it goes: the bound of every kernel, for benchmarks."""
    return _native.read_memory(kernels(), address(memory), memory.nbytes, torch.get_num_threads())


# By their last names: after a product the weights have pushed the tables of the modules out of the cache.
is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
tracing_state, functorch_stack = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack


def is_plain(inputs: Tensor) -> bool:
    """Whether a kernel may be called without torch's dispatcher, which takes as long as a small product.

    Not while something has to see the operator: autograd, a compiler, a tracer, a dispatch mode or functorch.
    """
    return (
        not is_compiling()
        and type(inputs) is Tensor
        and inputs.is_cpu
        and not (inputs.requires_grad and is_grad_enabled())
        and not is_in_torch_dispatch_mode()
        and tracing_state() is None
        and functorch_stack() is None
    )


def linear(inputs: Tensor, spec: CodesSpec, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs`` (..., in) times a linear that :func:`repack` prepared, (..., out) in the dtype of ``inputs``."""
    return Product.of(spec, packed)(inputs, bias)


def rows_linear(inputs: Tensor, spec: EmbeddingSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``inputs`` (..., in) times the matrix of an embedding as it is stored, (..., tokens) in the dtype of ``inputs``.

    Without torch's dispatcher, so :func:`is_plain` must hold.
    """
    check_inputs(inputs, spec, bias)
    kept = checked(spec, tensors)
    places = address(kept["codes"]), address(kept["zeros"]), address(kept["scales"])
    matrix = _native.RowMatrix(*places, spec.out_features, spec.in_features, spec.bits, spec.group_size)
    return call_kernel(partial(_native.multiply_rows, kernels(), matrix), inputs, bias, spec.out_features)


def grouped_linear(inputs: Tensor, spec: GroupedBinarySpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``inputs`` (..., in) times a linear of BiLLM, ARB-LLM, STBLLM or PBS²P as it is stored, as :func:`rows_linear`.

    A few vectors with a kernel, many with dense products of tiles of decoded rows. Where something of torch has to see
    the product, which is none of its operators, the torch backend runs it.

    Raises:
        CheckpointError: a symbol that no encoder writes.
    """
    if not is_plain(inputs):
        return packed_linear(inputs, spec, tensors, bias)
    check_inputs(inputs, spec, bias)
    if inputs.numel() > GROUPED_UP_TO * spec.in_features:
        return packed_linear(inputs, spec, tensors, bias, decode=partial(decode_grouped, spec, tensors))
    kept = checked(spec, tensors)
    matrix = grouped_matrix(spec, kept)

    def multiply(*given: Any) -> None:
        refuse_wrong(_native.multiply_grouped(kernels(), matrix, *given))

    return call_kernel(multiply, inputs, bias, spec.out_features)


def decode_grouped(spec: GroupedBinarySpec, tensors: dict[str, Tensor], rows: slice) -> Tensor:
    """(rows, in) float32: the dense weights of some rows, exactly those of ``spec.decode_rows``."""
    kept = checked(spec, tensors)
    first, last = rows.start, min(rows.stop, spec.out_features)
    weight = torch.empty(last - first, spec.in_features)
    matrix, threads = grouped_matrix(spec, kept), torch.get_num_threads()
    refuse_wrong(_native.decode_grouped(kernels(), matrix, first, last - first, address(weight), threads))
    return weight


def refuse_wrong(possible: bool) -> None:
    """CheckpointError for what the kernels of ``grouped_binary`` linears say of the symbols that they met."""
    if not possible:
        raise CheckpointError("a symbol is one which no encoder writes in its column")


def grouped_matrix(spec: GroupedBinarySpec, kept: dict[str, Tensor]) -> _native.GroupedMatrix:
    """What the extension calls a linear whose tensors are those of :func:`checked`, which must stay alive."""
    weights = address(kept["codes"]), address(kept.get("symbols")), address(kept["scales"])
    columns = address(kept.get("salient")), address(kept.get("residuals")), address(kept.get("column_scales"))
    sizes = spec.out_features, spec.in_features, spec.n, spec.m, spec.block_size, spec.regions, spec.residual_bytes
    return _native.GroupedMatrix(*weights, *columns, *sizes)


def check_inputs(inputs: Tensor, spec: LinearSpec, bias: Tensor | None) -> None:
    """ValueError unless they fit a linear."""
    if inputs.shape[-1] != spec.in_features:
        raise ValueError(f"the inputs have {inputs.shape[-1]} columns, not {spec.in_features}")
    check_bias(bias, spec.out_features)


def checked(spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a description, contiguous; ValueError unless they are what it says, and on the CPU."""
    for name, (shape, dtype) in spec.tensors().items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype or not tensors[name].is_cpu:
            raise ValueError(f"{name} of the matrix is {list(tensors[name].shape)}, not {list(shape)}")
    return {name: tensors[name].contiguous() for name in spec.tensors()}
