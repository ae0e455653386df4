"""How much work a run may be: three sets of recipe values for ``codes``, from minutes to hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subbit.errors import UserError
from subbit.tuning.precision import has_matrix_units

__all__ = ["EFFORTS", "with_effort"]

# Times are for a model of 135 million parameters, one core of a processor with matrix units for bfloat16 (AMX). They
# grow with the parameters, and without such units tuning takes several times as long.
EFFORTS: dict[str, dict[str, Any]] = {
    # no tuning: minutes
    "fast": {
        "options": {"sweeps": 2},
        "calibration": {"samples": 32, "seq_len": 512},
    },
    # every decoder layer tuned, then the whole model: 75 minutes, on two cores 44
    "standard": {
        "options": {"sweeps": 2, "column_scales": False},
        "calibration": {"samples": 256, "seq_len": 256},
        "reconstruction": {"steps": 128, "batch": 2},
        "distillation": {"steps": 1440, "batch": 2, "samples": 2888, "latent_rate": 1e-3, "held_out": 8},
    },
    # the same with three times the text and the steps: four hours
    "best": {
        "options": {"sweeps": 3, "column_scales": False},
        "calibration": {"samples": 768, "seq_len": 256},
        "reconstruction": {"steps": 384, "batch": 2},
        "distillation": {"steps": 4000, "batch": 2, "samples": 8016, "latent_rate": 1e-3, "held_out": 16},
    },
}

# Meant for an hour on two cores without matrix units; counted from the arithmetic, not measured.
WITHOUT_MATRIX_UNITS: dict[str, dict[str, Any]] = {"standard": {"distillation": {"steps": 360, "samples": 728}}}


def with_effort(effort: str, values: Mapping[str, Any], matrix_units: bool | None = None) -> dict[str, Any]:
    """Recipe values, with those of an effort where ``values`` says nothing; UserError for an unknown effort.

    Args:
        matrix_units: whether the recipe is for hardware that has them; None: for this machine.
    """
    if effort not in EFFORTS:
        raise UserError(f"there is no effort {effort!r}; choose {', '.join(EFFORTS)}")
    if values.get("method", "codes") != "codes":
        raise UserError(f"effort is for method codes, not {values['method']}")
    below = EFFORTS[effort]
    if not (has_matrix_units() if matrix_units is None else matrix_units):
        below = merge(below, WITHOUT_MATRIX_UNITS.get(effort, {}))
    return merge(below, {"method": "codes", **values})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings; ``above`` wins."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge(inner, value)
        result[key] = value
    return result
