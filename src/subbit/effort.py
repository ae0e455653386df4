"""How much work a run may be: three sets of recipe values for ``codes``, from minutes to hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subbit.errors import UserError
from subbit.tuning.precision import Products, products_here

__all__ = ["EFFORTS", "with_effort"]

# Times are for a model of 135 million parameters, one core of a processor with matrix units for bfloat16 (AMX). They
# grow with the parameters, and a step of tuning takes twice to several times as long without such units.
EFFORTS: dict[str, dict[str, Any]] = {
    # no tuning: minutes
    "fast": {
        "options": {"sweeps": 2},
        "calibration": {"samples": 32, "seq_len": 512},
    },
    # every decoder layer tuned, then the whole model: 85 minutes, on two cores 50, counted from parts
    "standard": {
        "options": {"sweeps": 2, "column_scales": False},
        "calibration": {"samples": 256, "seq_len": 256},
        "reconstruction": {"steps": 384, "batch": 2},
        "distillation": {"steps": 1440, "batch": 2, "samples": 2888, "latent_rate": 1e-3, "held_out": 8},
    },
    # the same with three times the text and the steps of the whole model: four hours
    "best": {
        "options": {"sweeps": 3, "column_scales": False},
        "calibration": {"samples": 768, "seq_len": 256},
        "reconstruction": {"steps": 384, "batch": 2},
        "distillation": {"steps": 4000, "batch": 2, "samples": 8016, "latent_rate": 1e-3, "held_out": 16},
    },
}

# Within an hour on two cores that have no matrix units; that of float32 is counted from the arithmetic, not measured.
SHORTER: dict[Products, dict[str, dict[str, Any]]] = {
    "bfloat16": {"standard": {"distillation": {"steps": 840, "samples": 1688}}},
    "float32": {"standard": {"reconstruction": {"steps": 128}, "distillation": {"steps": 360, "samples": 728}}},
}


def with_effort(effort: str, values: Mapping[str, Any], products: Products | None = None) -> dict[str, Any]:
    """Recipe values, with those of an effort where ``values`` says nothing; UserError for an unknown effort.

    Args:
        products: what the hardware that the recipe is for multiplies matrices with; None: that of this machine.
    """
    if effort not in EFFORTS:
        raise UserError(f"there is no effort {effort!r}; choose {', '.join(EFFORTS)}")
    if values.get("method", "codes") != "codes":
        raise UserError(f"effort is for method codes, not {values['method']}")
    shorter = SHORTER.get(products or products_here(), {}).get(effort, {})
    return merge(merge(EFFORTS[effort], shorter), {"method": "codes", **values})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings; ``above`` wins."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge(inner, value)
        result[key] = value
    return result
