"""Find the decoder layers of any causal language model, and the linears inside one.

Nothing here knows a model family: the decoder layers are the `ModuleList` that is as long as the config says, and the
linears are whatever `nn.Linear` the layer holds.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from subbit.errors import UserError

__all__ = [
    "ExpertName",
    "ModelLayout",
    "find_layout",
    "fused_groups",
    "layer_linears",
    "router_linears",
    "uncompressed_matrices",
]

# Serving engines hold each of these as one matrix, so its parts must share one N:M.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")


class ExpertName(NamedTuple):
    """The name of a linear of a routed expert; those that differ in the number alone share the tokens of a layer."""

    experts: str  # "….mlp.experts"
    number: int
    projection: str  # "up_proj"

    @classmethod
    def parse(cls, name: str) -> "ExpertName | None":
        """None for any other linear."""
        found = _EXPERT.fullmatch(name)
        return cls(found[1], int(found[2]), found[3]) if found else None

    @property
    def pool(self) -> tuple[str, str]:
        """The same for all experts of a layer."""
        return self.experts, self.projection


@dataclass(frozen=True)
class ModelLayout:
    """Where the decoder layers of a model are: `<layers_prefix>.<index>`, e.g. "model.decoder.layers.0"."""

    layers_prefix: str
    num_layers: int

    def layer_name(self, index: int) -> str:
        """The dotted module path of decoder layer `index`."""
        return f"{self.layers_prefix}.{index}"

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of `model`, in order."""
        return cast(nn.ModuleList, model.get_submodule(self.layers_prefix))


def find_layout(model: PreTrainedModel) -> ModelLayout:
    """The decoder layers of `model`; a `UserError` if it has no list of `num_hidden_layers` modules.

    Where several lists have that length (a vision tower as deep as the decoder), the one with the most parameters wins.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    candidates = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not candidates or not num_layers:
        raise UserError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers (config.num_hidden_layers); "
            "subbit compresses only models built from such a list"
        )
    return ModelLayout(layers_prefix=max(candidates, key=candidates.__getitem__), num_layers=int(num_layers))


def layer_linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` inside a decoder layer by its dotted name relative to the layer, in module order."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def uncompressed_matrices(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of each parameter with two or more dimensions that is not the weight of an `nn.Linear`.

    These stay dense (routers that are bare parameters, convolutions, 3-D stacks of experts in a layout that
    `split_experts` does not know) and have to be listed.
    """
    weights = {id(linear.weight) for linear in layer_linears(layer).values()}
    return {
        name: tuple(parameter.shape)
        for name, parameter in layer.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in weights
    }


def router_linears(layer: nn.Module) -> set[str]:
    """Linears of a decoder layer that choose or weigh experts, and should stay dense: they are small and decisive.

    Those beside a module `experts` with a number for every expert, or a single one (the gate of a shared expert).
    """
    found = set()
    for path, block in layer.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        sizes = (1, len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", 1))
        for name, linear in layer_linears(block).items():
            leaf = name.rpartition(".")[2]
            if not name.startswith("experts.") and linear.out_features in sizes and leaf not in sum(_FUSED, ()):
                found.add(f"{path}.{name}" if path else name)
    return found


def fused_groups(names: list[str]) -> list[list[str]]:
    """Split linear names into the groups that serving engines fuse, e.g. `[[…q_proj, …k_proj, …v_proj], […o_proj], …]`.

    Members of a group have the same parent module; every other linear is alone. Groups stand in the order of their
    first member, and members in the order given.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((group for group in _FUSED if leaf in group), None)
        groups.setdefault((parent, fused[0] if fused else leaf), []).append(name)
    return list(groups.values())
