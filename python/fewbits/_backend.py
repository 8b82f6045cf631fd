"""Who computes for a device: native code, or the plain torch operations of `fewbits.portable`.

Native code serves the CPU and NVIDIA GPUs. Every other device that torch knows gets the portable functions, among them
AMD GPUs, which torch calls "cuda" too. ``FEWBITS_BACKEND=portable``, read once at import, gives all devices those.
"""

from __future__ import annotations

import os

import torch

FORCED = os.environ.get("FEWBITS_BACKEND", "")
if FORCED not in ("", "portable"):
    raise ValueError(f"FEWBITS_BACKEND: expected 'portable' or nothing, got {FORCED!r}")

NATIVE_TYPES = frozenset(() if FORCED else ("cpu",) if torch.version.hip else ("cpu", "cuda"))
# Whether the question is the same for all tensors that say `is_cpu` or `is_cuda`: what the fastest calls ask anyway.
IS_NATIVE_EVERYWHERE = len(NATIVE_TYPES) == 2

# In the place of a CUDA ordinal (-1 is the CPU): where native code has nothing to say.
PORTABLE = -2


def is_portable(device: torch.device) -> bool:
    """Return whether the portable functions serve a device."""
    return device.type not in NATIVE_TYPES


def device_types() -> list[str]:
    """Return the types of the devices that torch sees here, the CPU first."""
    others = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return ["cpu", *(kind for kind, module in others.items() if module.is_available())]


def describe() -> dict[str, str]:
    """Return, for each type of device that torch sees here, who serves it."""
    return {kind: "native" if kind in NATIVE_TYPES else "portable" for kind in device_types()}
