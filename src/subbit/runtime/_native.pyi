class Shape:
    def __init__(self, rows: int, columns: int, n: int, m: int, column_scales: bool, kernels: Kernels) -> None: ...
    @property
    def bytes(self) -> int: ...

class Kernels:
    @property
    def name(self) -> str: ...

def variants() -> list[str]: ...
def find(name: str) -> Kernels: ...
def use_gomp_parallel(function: int) -> None: ...
def use_large_pages(bytes: int, count: int) -> None: ...
def repack(shape: Shape, codes: int, row_scales: int, column_scales: int, buffer: int, threads: int) -> int: ...
def unpack(shape: Shape, buffer: int, codes: int) -> None: ...
def decode(shape: Shape, buffer: int, first_row: int, rows: int, weights: int) -> None: ...

class Linear:
    def __init__(self, kernels: Kernels, shape: Shape, buffer: int) -> None: ...
    def multiply(
        self,
        inputs: int,
        bfloat16: bool,
        batch: int,
        bias: int,
        bfloat16_bias: bool,
        outputs: int,
        threads: int,
    ) -> None: ...

class RowMatrix:
    def __init__(
        self, codes: int, zeros: int, scales: int, rows: int, columns: int, bits: int, group_size: int
    ) -> None: ...

def multiply_rows(
    kernels: Kernels,
    matrix: RowMatrix,
    inputs: int,
    bfloat16: bool,
    batch: int,
    bias: int,
    bfloat16_bias: bool,
    outputs: int,
    threads: int,
) -> None: ...

class GroupedMatrix:
    def __init__(
        self,
        codes: int,
        symbols: int,
        scales: int,
        salient: int,
        residuals: int,
        column_scales: int,
        rows: int,
        columns: int,
        n: int,
        m: int,
        block_size: int,
        regions: int,
        residual_bytes: int,
    ) -> None: ...

def multiply_grouped(
    kernels: Kernels,
    matrix: GroupedMatrix,
    inputs: int,
    bfloat16: bool,
    batch: int,
    bias: int,
    bfloat16_bias: bool,
    outputs: int,
    threads: int,
) -> bool: ...
def decode_grouped(
    kernels: Kernels, matrix: GroupedMatrix, first_row: int, rows: int, weights: int, threads: int
) -> bool: ...
def read_memory(kernels: Kernels, bytes: int, count: int, threads: int) -> int: ...
def round_latents(latents: int, groups: int, n: int, m: int, signs: int, bfloat16: bool, threads: int) -> None: ...
