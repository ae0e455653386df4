"""Which part of a compressed model costs its perplexity: parts of it are made dense again, and it is measured anew.

    python benchmarks/where_it_breaks.py OUT MODEL --dense model.layers.11.mlp.down_proj --json FILE

OUT is a checkpoint, MODEL what it was made of. Measured on a few short windows in bfloat16: the checkpoint as it is;
with the states of every window's first token taken from the dense model, to which most attention goes (another token's
for comparison); with each kind of linear dense in all layers; with each decoder layer dense; with --dense REGEX, any
number of them, the linears of which it matches the whole name.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from user_errors import run

from subbit.calibration.text import load_text, tokenize
from subbit.loading import open_any
from subbit.models.layout import find_layout, layer_linears

if TYPE_CHECKING:  # not at run time, when kernels.py beside this file would be taken for a package of that name
    from transformers import PreTrainedModel


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Of (windows, seq_len) token ids."""
    nlls = [cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]).item() for window in windows]
    return math.exp(sum(nlls) / len(nlls))


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linears of the decoder layers by full name."""
    layout = find_layout(model)
    return {f"{layout.layers_prefix}.{name}": one for name, one in layer_linears(layout.layers(model)).items()}


@contextmanager
def made_dense(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """These linears of the dense model in the place of those of ``model``."""
    own = {name: model.get_submodule(name) for name in linears}
    try:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        yield
    finally:
        for name, linear in own.items():
            model.set_submodule(name, linear)


def keep_state(token: int, state: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook: in what leaves a decoder layer, the token gets its row of ``state`` (1, seq_len, hidden)."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, token] = state[0, token]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


def with_dense_token(model: PreTrainedModel, windows: Tensor, dense: PreTrainedModel, token: int) -> float:
    """Perplexity when one token's states behind every decoder layer but the last are those of the dense model."""
    layers = list(find_layout(model).layers(model))[:-1]
    nlls = []
    for window in windows:
        states = dense(window[None], output_hidden_states=True).hidden_states[1:-1]
        hooks = [
            layer.register_forward_hook(keep_state(token, state)) for layer, state in zip(layers, states, strict=True)
        ]
        nlls.append(math.log(perplexity(model, window[None])))
        for hook in hooks:
            hook.remove()
    return math.exp(sum(nlls) / len(nlls))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """What was made dense → perplexity, printed as it comes."""
    dense, tokenizer = open_any(args.model).load(torch.bfloat16)
    model, _ = open_any(args.checkpoint).load(torch.bfloat16, unpack=True)
    ids = tokenize(tokenizer, load_text(args.dataset, "test").text)
    windows = ids[: args.windows * args.seq_len].view(args.windows, args.seq_len).long()
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = round(value, 2)
        print(f"{value:12,.1f}  {name}", flush=True)

    note("dense", perplexity(dense, windows))
    note("as it is", perplexity(model, windows))
    for token, name in ((0, "first"), (5, "sixth")):
        note(f"states of the {name} token", with_dense_token(model, windows, dense, token))
    linears = linears_of(dense)
    kinds = dict.fromkeys(name.rsplit(".", 1)[1] for name in linears)
    layout = find_layout(dense)
    parts = {f"{kind} of all layers": rf".*\.{kind}" for kind in kinds}
    parts |= {f"layer {i}": re.escape(layout.layer_name(i)) + r"\..*" for i in range(layout.num_layers)}
    for name, pattern in (parts | {pattern: pattern for pattern in args.dense}).items():
        with made_dense(model, {key: linear for key, linear in linears.items() if re.fullmatch(pattern, key)}):
            note(name, perplexity(model, windows))
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="compressed")
    parser.add_argument("model", help="dense: directory, hub id or GGUF file")
    parser.add_argument("--dense", action="append", default=[], metavar="REGEX", help="linears to be made dense")
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--windows", type=int, default=4, help="from the start of the text (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        found = measure(args)
    if args.json:
        facts = {name: getattr(args, name) for name in ("dataset", "windows", "seq_len")}
        args.json.write_text(json.dumps({"arguments": facts, "perplexity": found}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
