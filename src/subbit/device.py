"""The device that work runs on."""

from __future__ import annotations

import torch

from subbit.errors import UserError

__all__ = ["pick_device"]


def pick_device(name: str) -> torch.device:
    """UserError for a device that this machine does not have."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not available here; use --device cpu") from None
    return device
