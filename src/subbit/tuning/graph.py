"""A step of training as a CUDA graph: thousands of small kernels in one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Replayed"]

WARM_UP = 3  # calls before a function is recorded: libraries and optimizers prepare themselves in the first ones


class Replayed:
    """A function on a GPU that is recorded at its fourth call, and replayed from then on.

    It must do the same work whatever the numbers are, wait for nothing, and take tensors of one shape in every call.
    What a call returns is overwritten by the next one. Source: the whole-network capture of torch's notes on CUDA.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns for ``inputs``."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up(inputs)
        if self._graph is None:
            self._inputs = tuple(one.clone() for one in inputs)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._function(*self._inputs)
        for place, one in zip(self._inputs, inputs, strict=True):
            place.copy_(one)
        self._graph.replay()
        return self._output

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On another stream, as recording asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output
