"""What ``fewbits info`` tells: the build, the machine, and whether the two work together."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import _backend, _native, shim
from . import functional as F

# Elements of the self-test: enough for every code and for the loops of every SIMD path, small enough for a second on
# one core. Odd, so that a short block and a half byte are part of it.
_ELEMENTS = (1 << 20) + 33

# Mean absolute error on N(0, 1), published for these codes and block sizes, with the spread of a million samples.
_EXPECTED = {"nf4": (0.0728, 0.001), "fp4": (0.0965, 0.001), "8-bit": (0.0085, 0.0005)}


@dataclass(frozen=True)
class Check:
    """Outcome of one part of the self-test.

    Attributes
    ----------
    name : str
    passed : bool
    detail : str
        What was measured, or the error's words.
    """

    name: str
    passed: bool
    detail: str


def collect() -> dict[str, Any]:
    """Describe the build and the machine.

    Initializes no CUDA context in torch.

    Returns
    -------
    dict
        ``version``, ``python``, ``platform``, ``torch`` (with the CUDA version that it was built for), ``backend``
        (for each type of device that torch sees, ``"native"`` or ``"portable"``: plain torch operations), ``build``
        (``cuda``, ``images``), ``driver`` (see ``_native.driver_info``), ``cpu`` (``features``, ``path``,
        ``threads``), ``bitsandbytes`` (what an import of that name gives).

    Examples
    --------
    >>> sorted(collect())
    ['backend', 'bitsandbytes', 'build', 'cpu', 'driver', 'platform', 'python', 'torch', 'version']
    """
    forced = os.environ.get("FEWBITS_SIMD")
    cpu = dict(_native.cpu_info()) | {"threads": torch.get_num_threads()}
    if forced:
        cpu["forced_by"] = f"FEWBITS_SIMD={forced}"
    return {
        "version": _native.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "backend": _backend.describe(),
        "build": {"cuda": bool(_native.built_with_cuda), "images": list(_native.images())},
        "driver": dict(_native.driver_info()),
        "cpu": cpu,
        "bitsandbytes": shim.describe(),
    }


def _sample() -> torch.Tensor:
    generator = torch.Generator().manual_seed(20)
    return torch.randn(_ELEMENTS, generator=generator)


def _check_error(
    name: str, where: str, x: torch.Tensor, back: torch.Tensor, largest_gap: float, blocksize: int
) -> Check:
    """Compare a round trip with the bound (half the widest gap of the code, times the block's largest magnitude)."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1, keepdim=True).expand_as(padded).reshape(-1)[: x.numel()]
    error = (x - back).abs()
    # Double quantization moves absmax itself, so the mean decides there (largest_gap is infinite).
    bound = absmax * (largest_gap / 2 + torch.finfo(torch.float32).eps)  # the product is rounded too
    mean = float(error.mean())
    expected, spread = _EXPECTED[name.split(" ")[0]]
    within = bool((error <= bound).all())
    passed = within and math.isclose(mean, expected, abs_tol=spread)
    detail = f"mean absolute error {mean:.4f} (expected {expected} +- {spread})"
    return Check(f"{name}, {where} round trip", passed, detail if within else f"{detail}; an element misses its bound")


def _widest_gap(state: F.QuantState) -> float:
    """Largest distance between neighbours of a state's code."""
    assert state.code is not None  # every quantizer's state has its table
    return float(state.code.sort().values.diff().max())


def _round_trips(x: torch.Tensor, device: torch.device) -> list[Check]:
    checks = []
    where = "CPU" if device.type == "cpu" else str(device)
    there = x.to(device)
    for quant_type in ("nf4", "fp4"):
        for double_quant in (False, True):
            codes, state = F.quantize_4bit(there, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
            back = F.dequantize_4bit(codes, state).cpu()
            # The widest gap between neighbours of the code: 0.304 in nf4 (-1 to -0.696), 1/3 in fp4.
            gap = math.inf if double_quant else _widest_gap(state)
            checks.append(_check_error(f"{quant_type}{' nested' if double_quant else ''}", where, x, back, gap, 64))
    codes, state = F.quantize_blockwise(there, blocksize=256)
    back = F.dequantize_blockwise(codes, state).cpu()
    # The 8-bit code ends at -0.993: below it lies half a gap of 0.007, less than half of the widest one.
    checks.append(_check_error("8-bit", where, x, back, _widest_gap(state), 256))
    return checks


def _cuda_check(x: torch.Tensor, device: torch.device) -> Check:
    """Run the same operations on a GPU and compare every byte with the CPU's."""
    name = f"{device}, kernels against the CPU"
    x = x[: 1 << 16 | 33]
    different = []
    try:
        for quant_type in ("nf4", "fp4"):
            for double_quant in (False, True):
                (here, state), (there, remote) = (
                    F.quantize_4bit(place, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
                    for place in (x, x.to(device))
                )
                values = F.dequantize_4bit(here, state), F.dequantize_4bit(there, remote)
                pairs = [(here, there), (state.absmax, remote.absmax), values]
                if not all(torch.equal(a, b.cpu()) for a, b in pairs):
                    different.append(f"{quant_type}{' nested' if double_quant else ''}")
        here, state = F.quantize_blockwise(x, blocksize=256)
        there, remote = F.quantize_blockwise(x.to(device), blocksize=256)
        values = F.dequantize_blockwise(here, state), F.dequantize_blockwise(there, remote)
        if not all(torch.equal(a, b.cpu()) for a, b in [(here, there), (state.absmax, remote.absmax), values]):
            different.append("8-bit")
    except (RuntimeError, ValueError, TypeError) as error:
        return Check(name, False, " ".join(str(error).split()))
    return Check(name, not different, f"differs: {', '.join(different)}" if different else "the same bytes")


def self_test() -> list[Check]:
    """Quantize and dequantize on the CPU, and on every accelerator that torch sees; takes about a second.

    Returns
    -------
    list of Check
        The CPU: every element within half the widest gap of the code times its block's absmax, and the mean error the
        published one; so on ``xpu`` and ``mps``, whose arithmetic may differ in the last place. A GPU that torch calls
        ``cuda``: codes, scales and values equal to the CPU's bit for bit.

    Examples
    --------
    >>> all(check.passed for check in self_test())
    True
    """
    x = _sample()
    checks = []
    for kind in _backend.device_types():
        if kind != "cuda":
            try:
                checks += _round_trips(x, torch.device(kind))
            except (RuntimeError, ValueError, TypeError) as error:
                where = "CPU" if kind == "cpu" else kind
                checks.append(Check(f"{where} round trip", False, " ".join(str(error).split())))
    if torch.cuda.is_available():
        checks += [_cuda_check(x, torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return checks


def report() -> dict[str, Any]:
    """Everything that ``fewbits info --json`` prints: :func:`collect` plus ``self_test`` and its ``seconds``."""
    facts = collect()
    began = time.monotonic()
    checks = self_test()
    tested = {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "seconds": round(time.monotonic() - began, 3),
    }
    return facts | {"self_test": tested}
