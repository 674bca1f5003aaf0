"""Which device a command runs on."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """The device of that name, e.g. cpu, cuda, cuda:1; of "auto" the GPU where there is one.

    Raises ValueError for a name that torch does not know, or a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # A driver, an ordinal or a build without it is only known once something is put there.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"device {name!r} cannot be used ({reason}): give cpu, cuda or auto") from error
    return device
