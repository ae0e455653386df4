"""Run a model one decoder layer at a time, with only that layer in memory.

    model = source.skeleton()                                     # no memory at all
    hidden, calls = capture_inputs(model, layout, source, windows)  # embeddings, and what each layer is given besides
    for index, layer in enumerate(layout.layers(model)):
        materialize(layer, layout.layer_name(index), source)
        hidden = run_layer(layer, calls[index], hidden)
        release(layer)
    logits = run_head(model, layout, source, hidden)

Masks, position embeddings and per-layer attention variants are never rebuilt here: the model's own forward runs with
its decoder layers replaced by stand-ins, which note down what they are called with.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subbit.errors import UserError
from subbit.models.layout import ModelLayout
from subbit.models.source import ModelSource

__all__ = ["LayerCall", "capture_inputs", "materialize", "outside_on_demand", "release", "run_head", "run_layer"]

_TOKENS = 4096  # that are embedded at a time


# ---- tensors in and out ----------------------------------------------------------------------------------------------


def materialize(module: nn.Module, prefix: str, source: ModelSource, *, device: torch.device | str = "cpu") -> None:
    """Fill a meta-device module with its real parameters and buffers.

    Parameters and persistent buffers come from `source` under `prefix` + "." + local name, floating-point ones as
    float32; parameters do not require gradients, and tied ones stay one tensor. Buffers that no checkpoint stores
    (rotary frequencies, embedding scales) are computed by the model's own initialiser, and keep their dtype.
    A `UserError` names a tensor that holds NaN or infinity, or a buffer that cannot be computed.
    """
    release(module)
    filled: dict[str, nn.Parameter] = {}
    for path, submodule in module.named_modules():
        _fill(submodule, _join(prefix, path), source, filled, device)


def release(module: nn.Module) -> None:
    """Give the memory of a module back: all its parameters and buffers return to the meta device."""
    module.to("meta")


def _fill(
    module: nn.Module,
    path: str,
    source: ModelSource,
    filled: dict[str, nn.Parameter],
    device: torch.device | str,
) -> None:
    """Fill the tensors that `module` itself owns; `filled` (stored name → parameter) keeps tied parameters tied."""
    # Buffers first: the initialiser also touches the parameters, which costs nothing while they are still on meta.
    _fill_buffers(module, path, source, device)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        full_name = _join(path, name)
        stored = source.stored_name(full_name)
        if stored not in filled:
            tensor = _read(source, full_name, device)
            filled[stored] = nn.Parameter(tensor, requires_grad=False)
        module._parameters[name] = filled[stored]


def _fill_buffers(module: nn.Module, path: str, source: ModelSource, device: torch.device | str) -> None:
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    persistent = {n for n in buffers if n not in module._non_persistent_buffers_set and _join(path, n) in source}
    computed = [name for name in buffers if name not in persistent]
    if computed:
        _initialise_buffers(module, path, computed, source)
    for name in buffers:
        if name in persistent:
            module._buffers[name] = _read(source, _join(path, name), device)
        else:
            module._buffers[name] = module.get_buffer(name).to(device)


def _initialise_buffers(module: nn.Module, path: str, names: list[str], source: ModelSource) -> None:
    """Compute buffers as transformers does after loading: allocate them, then let `_init_weights` write the values."""
    for name in names:
        meta = module.get_buffer(name)
        blank = torch.nan if meta.is_floating_point() else 0
        module._buffers[name] = torch.full(meta.shape, blank, dtype=meta.dtype)
    with torch.no_grad():
        source.initialiser(path)._init_weights(module)
    for name in names:
        buffer = module.get_buffer(name)
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UserError(
                f"the checkpoint does not store buffer {_join(path, name)} and {type(module).__name__} "
                "does not say how to compute it; this model cannot be streamed"
            )


def _read(source: ModelSource, name: str, device: torch.device | str) -> Tensor:
    """A private copy of a source tensor, checked to be finite, floating-point ones as float32."""
    tensor = source.tensor(name)
    if not tensor.is_floating_point():
        return tensor.to(device, copy=True)
    # The extremes carry NaN along, and take a twentieth of the time of isfinite() on the whole tensor.
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise UserError(f"tensor {name} in {source.directory} holds NaN or infinity; download the model again")
    return tensor.to(device=device, dtype=torch.float32, copy=True)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


@contextmanager
def outside_on_demand(
    model: PreTrainedModel, layout: ModelLayout, source: ModelSource, device: torch.device | str
) -> Iterator[None]:
    """Fill the modules outside the decoder layers the moment they run, and release these again at the end."""
    touched: list[nn.Module] = []
    tied: dict[str, nn.Parameter] = {}

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        def fill(module: nn.Module, args: Any) -> None:
            if any(tensor.is_meta for tensor in _own_tensors(module)):
                touched.append(module)
                _fill(module, path, source, tied, device)

        return fill

    inside = layout.layers_prefix + "."
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not path.startswith(inside) and _own_tensors(module):
                stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        try:
            yield
        finally:
            for module in touched:
                _release_own(module)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _release_own(module: nn.Module) -> None:
    """Like `release`, but leaves the children of `module` alone."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to("meta")


# ---- what a decoder layer is called with -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to a decoder layer besides the hidden states, recorded for a batch of one window."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class _StopForward(Exception):  # noqa: N818 (no error)
    """Ends the model's forward once the layers have been recorded."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _WantsTuples(Exception):  # noqa: N818 (no error)
    """The model takes `[0]` of what a layer returns, so stand-ins have to return tuples."""


@dataclass
class _Recorder:
    """Stands in for all decoder layers: each returns its input unchanged, and notes down its call."""

    stop_after: int
    as_tuple: bool
    hidden: Tensor | None = None
    calls: list[LayerCall] = field(default_factory=list)

    def visit(self, index: int, hidden: Tensor, call: LayerCall) -> Any:
        if index != len(self.calls):
            raise UserError(f"unsupported model: it does not run its decoder layers once each, in order ({index})")
        if self.hidden is None:
            self.hidden = hidden
        elif hidden.shape != self.hidden.shape and not self.as_tuple:
            raise _WantsTuples
        elif hidden.shape != self.hidden.shape or not torch.equal(hidden, self.hidden):
            raise UserError(f"unsupported model: it changes the hidden states between its decoder layers ({index})")
        self.calls.append(call)
        if len(self.calls) == self.stop_after:
            raise _StopForward(self.hidden)
        return (hidden,) if self.as_tuple else hidden


def capture_inputs(
    model: PreTrainedModel,
    layout: ModelLayout,
    source: ModelSource,
    windows: Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, list[LayerCall]]:
    """What enters the first decoder layer, and what every decoder layer is given besides.

    `model` is a skeleton, `windows` token ids [samples, seq_len] without padding. Returns the hidden states
    [samples, seq_len, hidden] float32 on the CPU, and one `LayerCall` a layer with tensors on `device`. Only modules
    that run before the decoder layers are filled, one after another, and released at the end; `progress(done, total)`
    counts windows. A `UserError` says if the windows do not fit the model, or if the model is one whose
    layers cannot be run one by one.
    """
    _check_windows(model, windows)
    samples = windows.shape[0]
    hidden = torch.empty(0)
    calls: list[LayerCall] = []
    # The second window is recorded in full as well: calls that depend on the tokens cannot be shared.
    parts = [*windows[:2].split(1), *windows[2:].split(max(1, _TOKENS // windows.shape[1]))]
    done = 0
    with outside_on_demand(model, layout, source, device):
        for number, part in enumerate(part for part in parts if len(part)):
            depth = layout.num_layers if number < 2 else 1
            entered, recorded = _record(model, layout, part.to(device), depth)
            if number == 1 and not _same(recorded, calls):
                raise UserError("unsupported model: it gives its decoder layers inputs that depend on the tokens")
            if number == 0:
                calls, hidden = recorded, torch.empty(samples, *entered.shape[1:])
            hidden[done : done + len(part)] = entered
            done += len(part)
            if progress is not None:
                progress(done, samples)
    return hidden, calls


def run_layer(layer: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    """Run one materialized decoder layer on hidden states [batch, seq_len, hidden]; returns the same shape.

    The call was recorded with batch 1: its tensors are broadcast where their first dimension is a batch of one, else
    the batch is run one window at a time. Floating-point tensors of the call follow the dtype of `hidden`.
    """
    batch = hidden.shape[0]
    if batch == 1 or all(_broadcasts(leaf) for leaf in _leaves((call.args, call.kwargs))):
        return _invoke(layer, call, hidden, batch)
    return torch.cat([_invoke(layer, call, hidden[i : i + 1], 1) for i in range(batch)])


def run_head(
    model: PreTrainedModel,
    layout: ModelLayout,
    source: ModelSource,
    hidden: Tensor,
    *,
    device: torch.device | str = "cpu",
    gradient: bool = False,
) -> Tensor:
    """Logits [batch, seq_len, vocab] on `device` from the output of the last decoder layer [batch, seq_len, hidden].

    The model's own forward runs with its layers replaced, so that final norm, projections and soft-capping are its own.
    Modules that are on meta are filled for the call: to call this repeatedly, do so inside `outside_on_demand`.
    `gradient`: keep the graph from `hidden` to the logits.
    """
    hidden = hidden.to(device)
    window = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device)
    last = layout.num_layers - 1

    def attempt(as_tuple: bool) -> Tensor:
        recorder = _Recorder(stop_after=layout.num_layers + 1, as_tuple=as_tuple)

        def stand_in(index: int, entered: Tensor, call: LayerCall) -> Any:
            passed = recorder.visit(index, entered, call)
            if index < last:
                return passed
            return (hidden,) if as_tuple else hidden

        with _stand_ins(layout.layers(model), stand_in), torch.set_grad_enabled(gradient):
            logits: Tensor = model(input_ids=window, use_cache=False).logits
        if logits.shape[:-1] != hidden.shape[:-1]:
            raise _WantsTuples
        return logits

    with outside_on_demand(model, layout, source, device):
        try:
            logits = attempt(as_tuple=False)
        except _WantsTuples:
            logits = attempt(as_tuple=True)
    return logits


def _record(model: PreTrainedModel, layout: ModelLayout, window: Tensor, depth: int) -> tuple[Tensor, list[LayerCall]]:
    """Run the model's forward on one window [1, seq_len] until `depth` decoder layers have been called.

    Returns the hidden states [1, seq_len, hidden] that entered the first of them, and the calls.
    """
    for as_tuple in (False, True):
        recorder = _Recorder(stop_after=depth, as_tuple=as_tuple)
        with _stand_ins(layout.layers(model), recorder.visit), torch.no_grad():
            try:
                model(input_ids=window, use_cache=False)
            except _StopForward as stop:
                return stop.hidden, recorder.calls
            except _WantsTuples:
                continue
        break
    raise UserError(
        f"unsupported model: {type(model).__name__} did not run the decoder layers at {layout.layers_prefix}"
    )


@contextmanager
def _stand_ins(layers: nn.ModuleList, visit: Callable[[int, Tensor, LayerCall], Any]) -> Iterator[None]:
    """Replace the forward of each decoder layer on the instance, and put everything back at the end."""

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return visit(index, hidden, LayerCall(args[1:], kwargs))

        return forward

    saved = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = stand_in(index)
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.numel() == 0:
        raise ValueError(f"windows must be token ids [samples, seq_len], not {tuple(windows.shape)}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise UserError(f"windows of {windows.shape[1]} tokens exceed the model's {context} positions; shorten seq_len")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(windows.max())
    if largest >= rows or int(windows.min()) < 0:
        raise UserError(f"token id {largest} does not fit the model's {rows} embeddings; use the model's own tokenizer")


# ---- recorded calls --------------------------------------------------------------------------------------------------


def _invoke(layer: nn.Module, call: LayerCall, hidden: Tensor, batch: int) -> Tensor:
    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            leaf = leaf.to(hidden.dtype)
        return leaf.expand(batch, *leaf.shape[1:]) if batch > 1 and leaf.dim() >= 2 else leaf

    output = layer(hidden, *_map(fit, call.args), **_map(fit, call.kwargs))
    result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result


def _broadcasts(leaf: Any) -> bool:
    """Whether a recorded value also serves a larger batch."""
    if isinstance(leaf, Tensor):
        return leaf.dim() < 2 or leaf.shape[0] == 1
    return leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device))


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [_map(function, value) for value in tree]
        return values if isinstance(tree, list) else tuple(values)
    return function(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def _same(left: list[LayerCall], right: list[LayerCall]) -> bool:
    """Whether two recordings hold equal tensors (other values are flags, or objects of one call, and not compared)."""
    pairs = [[list(_leaves((c.args, c.kwargs))) for c in calls] for calls in (left, right)]
    tensors = [[leaf for call in calls for leaf in call if isinstance(leaf, Tensor)] for calls in pairs]
    return len(tensors[0]) == len(tensors[1]) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(*tensors, strict=True)
    )
