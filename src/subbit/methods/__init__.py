"""The methods, one file each. A method is a function of tensors: it knows nothing of files, models or devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from subbit.linears import CompressedLinear
from subbit.methods.arb import ArbOptions, arb
from subbit.methods.billm import BillmOptions, billm
from subbit.methods.codes import CodesOptions, codes
from subbit.methods.gptq import GptqOptions, gptq
from subbit.methods.pbs2p import Pbs2pOptions, pbs2p
from subbit.methods.rtn import RtnOptions, rtn
from subbit.methods.stbllm import StbllmOptions, stbllm
from subbit.methods.stbllm_as_released import ReleasedStbllmOptions, stbllm_as_released

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A method as the pipeline sees it."""

    run: Callable[..., CompressedLinear]  # (weight, gram, factor, sparsity, options) -> linear
    options: type[Any]  # a frozen dataclass that is a MethodOptions
    allocation: str  # how it spreads N over the layers unless the recipe says otherwise
    source: str
    tunable: bool = True  # whether reconstruction and distillation know its linears
    default_sparsity: str = "4:8"  # unless the recipe says otherwise; "none" for methods that do not prune


METHODS = {
    "stbllm": Method(stbllm, StbllmOptions, "l2", "STBLLM, arXiv 2408.01803"),
    "pbs2p": Method(pbs2p, Pbs2pOptions, "cosine", "PBS²P, arXiv 2502.01705"),
    "codes": Method(codes, CodesOptions, "uniform", "exact group descent over codewords", default_sparsity="2:8"),
    "rtn": Method(rtn, RtnOptions, "uniform", "round to nearest", tunable=False, default_sparsity="none"),
    "gptq": Method(gptq, GptqOptions, "uniform", "GPTQ, arXiv 2210.17323", tunable=False, default_sparsity="none"),
    "billm": Method(billm, BillmOptions, "uniform", "BiLLM, arXiv 2402.04291", default_sparsity="none"),
    "arb": Method(arb, ArbOptions, "uniform", "ARB-LLM, arXiv 2410.03129", default_sparsity="none"),
    "stbllm-as-released": Method(
        stbllm_as_released, ReleasedStbllmOptions, "outliers", "the code of STBLLM, github.com/pprp/STBLLM"
    ),
}
