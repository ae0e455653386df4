"""Matrix products of llama.cpp's ggml, from the libraries that ``llama-cpp-python`` has built, called through ctypes.

Nothing of it is needed but these libraries: ``pip install --no-deps llama-cpp-python`` (compiles for some minutes).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"iq2_xxs": 16, "iq1_s": 19, "tq1_0": 34, "tq2_0": 35, "q1_0": 41}
ROWS = 32  # that are quantized; a matrix repeats them, since speed does not depend on the numbers
OBJECTS = 1 << 20  # bytes for the descriptions of tensors and a graph of one product
F32 = 0


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Plan(ctypes.Structure):
    """ggml_cplan; its later fields differ between versions, and room is left for them."""

    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("rest", c_void_p * 8))


def library_folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries; None where it is not installed."""
    spec = find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None


class Ggml:
    """The few functions of ggml that one product takes."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer = c_void_p
        self._declare(self.base.ggml_init, pointer, InitParams)
        self._declare(self.base.ggml_type_name, c_char_p, c_int)
        self._declare(self.base.ggml_row_size, c_size_t, c_int, c_int64)
        self._declare(self.base.ggml_new_tensor_2d, pointer, pointer, c_int, c_int64, c_int64)
        self._declare(self.base.ggml_mul_mat, pointer, pointer, pointer, pointer)
        self._declare(self.base.ggml_new_graph, pointer, pointer)
        self._declare(self.base.ggml_get_data, pointer, pointer)
        self._declare(self.base.ggml_quantize_chunk, c_size_t, c_int, pointer, pointer, *[c_int64] * 3, pointer)
        self._declare(self.base.ggml_build_forward_expand, None, pointer, pointer)
        self._declare(self.cpu.ggml_cpu_init, None)
        self._declare(self.cpu.ggml_graph_plan, Plan, pointer, c_int, pointer)
        self._declare(self.cpu.ggml_graph_compute, c_int, pointer, POINTER(Plan))
        self.cpu.ggml_cpu_init()
        self.types = {name: number for name, number in TYPES.items() if self._type_name(number) == name}

    @staticmethod
    def _declare(function: ctypes._NamedFuncPointer, result: type | None, *arguments: type) -> None:
        function.restype, function.argtypes = result, list(arguments)

    def _type_name(self, number: int) -> str:
        """Of a type of weights; anything for a number that this version does not know."""
        return (self.base.ggml_type_name(number) or b"").decode(errors="replace")

    def row_bytes(self, name: str, columns: int) -> int:
        """Of a row of weights."""
        return int(self.base.ggml_row_size(self.types[name], columns))

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Some rows of a (rows, columns) float32 weight in a type of ggml, repeated to all rows: bytes."""
        rows, columns = weight.shape
        few = weight[:ROWS].contiguous()
        packed = torch.zeros(ROWS, self.row_bytes(name, columns), dtype=torch.uint8)
        importance = (c_float * columns)(*[1.0] * columns)
        number = self.types[name]
        self.base.ggml_quantize_chunk(number, few.data_ptr(), packed.data_ptr(), 0, ROWS, columns, byref(importance))
        return packed.repeat(-(-rows // ROWS), 1)[:rows]

    def product(self, name: str, packed: Tensor, memory: Tensor, inputs: Tensor, threads: int) -> Callable[[], Tensor]:
        """A call that multiplies (batch, columns) inputs with weights in ``memory``; gives (batch, rows) float32.

        Args:
            packed: (rows, bytes of a row) of :meth:`quantize`.
            memory: bytes, at least those of the weights, inputs, outputs and OBJECTS; must live as long as the call.
        """
        rows, (batch, columns) = len(packed), inputs.shape
        context = self.base.ggml_init(InitParams(memory.nbytes, memory.data_ptr(), False))
        weight = self.base.ggml_new_tensor_2d(context, self.types[name], columns, rows)
        vectors = self.base.ggml_new_tensor_2d(context, F32, columns, batch)
        result = self.base.ggml_mul_mat(context, weight, vectors)
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, result)
        ctypes.memmove(self.base.ggml_get_data(weight), packed.data_ptr(), packed.nbytes)
        ctypes.memmove(self.base.ggml_get_data(vectors), inputs.data_ptr(), inputs.nbytes)
        plan = self.cpu.ggml_graph_plan(graph, threads, None)
        work = torch.empty(max(1, plan.work_size), dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        place = (c_float * (batch * rows)).from_address(self.base.ggml_get_data(result))
        output = torch.frombuffer(place, dtype=torch.float32).view(batch, rows)

        def call(kept: tuple[Tensor, ...] = (memory, work)) -> Tensor:
            if self.cpu.ggml_graph_compute(graph, byref(plan)):
                raise RuntimeError(f"ggml could not compute a product with {name}")
            return output

        return call
