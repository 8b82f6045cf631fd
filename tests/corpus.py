"""A fixed set of inputs, and a digest of what every blockwise operation makes of each.

``python corpus.py`` prints the digests as JSON. It is run once for each SIMD path of the CPU (``FEWBITS_SIMD``), and
its digests on the GPU must be those of the CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch

import fewbits.functional as F
from arrays import BLOCKSIZES, DTYPES, as_numpy, dtype_name
from fewbits import _native
from strategies import RECIPES, fill


def inputs() -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, blocksize, tensor): every recipe in one tensor, tails of 0, 1 and blocksize - 1, odd addresses."""
    recipes = [*RECIPES, *RECIPES]
    for dtype in DTYPES:
        for seed, blocksize in enumerate(BLOCKSIZES):
            whole = len(recipes) * blocksize
            for n in (0, 1, 7, whole, whole + 1, whole + blocksize - 1):
                x = fill(recipes, n, blocksize, dtype, seed)
                yield f"{dtype_name(dtype)}-{blocksize}-{n}", blocksize, x
        shifted = fill(recipes, len(recipes) * 64 + 3, 64, dtype, 99)[3:]
        yield f"{dtype_name(dtype)}-64-misaligned", 64, shifted


def run(blocksize: int, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every tensor that any operation writes for ``x``."""
    codes, state = F.quantize_blockwise(x, blocksize=blocksize)
    yield from (codes, state.absmax, F.dequantize_blockwise(codes, state))
    for quant_type in ("nf4", "fp4"):
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        yield from (packed, state.absmax, F.dequantize_4bit(packed, state))
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=True)
        yield from (packed, state.absmax, state.state2.absmax, state.offset, F.dequantize_4bit(packed, state))


def digests(device: str | torch.device = "cpu") -> dict[str, str]:
    """SHA-256 of the bytes of ``run``, for each of ``inputs``."""
    out = {}
    for name, blocksize, x in inputs():
        digest = hashlib.sha256()
        moved = x.to(device)
        if x.storage_offset() % 4:  # .to() compacts: rebuild the odd address on the device
            moved = torch.cat([torch.zeros(3, dtype=x.dtype, device=device), moved])[3:]
        for tensor in run(blocksize, moved):
            if tensor.is_floating_point():  # NaN has many spellings
                tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
            digest.update(as_numpy(tensor).tobytes())
        out[name] = digest.hexdigest()
    return out


if __name__ == "__main__":
    print(json.dumps({"path": _native.cpu_info()["path"], "digests": digests()}))
