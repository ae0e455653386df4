"""A step of training as a CUDA graph: thousands of small kernels in one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Replayed"]

logger = logging.getLogger(__name__)

WARM_UP = 3  # calls before a function is recorded: libraries and optimizers prepare themselves in the first ones


class Replayed:
    """A function on a GPU that is recorded at its fourth call, and replayed from then on.

    It must do the same work whatever the numbers are, wait for nothing, and take tensors of one shape in every call;
    one that waits cannot be recorded, and is called again and again, with a warning. What a call returns is overwritten
    by the next one. Source: the whole-network capture of torch's notes on CUDA.
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
        if self._calls == WARM_UP + 1:
            self._record(inputs)
        if self._graph is None:
            return self._function(*inputs)
        for place, one in zip(self._inputs, inputs, strict=True):
            place.copy_(one)
        self._graph.replay()
        return self._output

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """A graph, or a warning that there is none."""
        self._inputs = tuple(one.clone() for one in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._output = self._function(*self._inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("a step of this model cannot be recorded, so every step is slow: %s", reason)
            self._end_recording()
        else:
            self._graph = graph

    @staticmethod
    def _end_recording() -> None:
        """Until a recording succeeds after one that failed, torch refuses to draw random numbers on the GPU."""
        number, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            number.add_(1)
        graph.replay()

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On another stream, as recording asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output
