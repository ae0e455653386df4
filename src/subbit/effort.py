"""How much work a run may be: three sets of recipe values for ``codes``, from minutes to a night."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subbit.errors import UserError

__all__ = ["EFFORTS", "with_effort"]

# Times are for a model of 135 million parameters and grow with the parameters; one core of a processor with bfloat16
# instructions (AMX). Without them tuning takes several times as long.
EFFORTS: dict[str, dict[str, Any]] = {
    # no tuning: minutes
    "fast": {
        "options": {"sweeps": 2},
        "calibration": {"samples": 32, "seq_len": 512},
    },
    # every decoder layer tuned, then the whole model: 75 minutes
    "standard": {
        "options": {"sweeps": 2, "column_scales": False},
        "calibration": {"samples": 256, "seq_len": 256, "clip_norm": 0.0},
        "reconstruction": {"steps": 128, "batch": 2},
        "distillation": {"steps": 1440, "batch": 2, "samples": 2888, "latent_rate": 1e-3, "held_out": 8},
    },
    # the same with more text and more steps: a night
    "best": {
        "options": {"sweeps": 3, "column_scales": False},
        "calibration": {"samples": 768, "seq_len": 256, "clip_norm": 0.0},
        "reconstruction": {"steps": 384, "batch": 2},
        "distillation": {"steps": 4000, "batch": 2, "samples": 8016, "latent_rate": 1e-3, "held_out": 16},
    },
}


def with_effort(effort: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe values, with those of an effort where ``values`` says nothing; UserError for an unknown effort."""
    if effort not in EFFORTS:
        raise UserError(f"there is no effort {effort!r}; choose {', '.join(EFFORTS)}")
    if values.get("method", "codes") != "codes":
        raise UserError(f"effort is for method codes, not {values['method']}")
    return merge(EFFORTS[effort], {"method": "codes", **values})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings; ``above`` wins."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge(inner, value)
        result[key] = value
    return result
