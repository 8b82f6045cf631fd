"""Inputs of the golden files, made the same way every time, and the list of cases."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One blockwise call. ``quant_type`` None is 8-bit with the dynamic map."""

    quant_type: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocksize: int
    nested: bool = False
    storage: torch.dtype = torch.uint8


class LinearCase(NamedTuple):
    quant_type: str
    dtype: torch.dtype
    nested: bool
    storage: torch.dtype
    in_features: int = 64
    out_features: int = 48
    bias: bool = True


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES_4BIT = [
    *(Case(q, d, (16, 64), 64, nested) for q in ("nf4", "fp4") for d in (F32, F16, BF16) for nested in (False, True)),
    Case("nf4", BF16, (257, 32), 32, True),
    *(Case("nf4", F16, (2, b), b) for b in (128, 256, 512, 1024, 2048, 4096)),
    *(Case("nf4", BF16, (16, 64), 64, True, s) for s in (F32, F16, BF16)),
]

CASES_8BIT = [
    *(Case(None, d, (4, 256), 256) for d in (F32, F16, BF16)),
    *(Case(None, BF16, (4096,), b) for b in (64, 128, 512, 4096)),
    Case(None, BF16, (1000,), 256),
]

LINEARS = [
    LinearCase("nf4", BF16, nested=True, storage=torch.uint8),
    LinearCase("nf4", F16, nested=False, storage=BF16),
    LinearCase("fp4", BF16, nested=True, storage=BF16),
    LinearCase("fp4", F32, nested=False, storage=torch.uint8, bias=False),
]

# Linear8bitLt: threshold and bias.
LINEARS_8BIT = [(0.0, True), (6.0, True), (6.0, False)]


def activations_8bit() -> torch.Tensor:
    """Rows with outliers: two in one column, one in another, and a row of zeros."""
    x = ordinary((6, 64), torch.float16)
    x[1, 5], x[3, 5], x[4, 40] = 9.5, -60.0, 6.0
    x[2] = 0
    return x


# Optimizers whose checkpoints are kept, with their arguments. Shapes: 8-bit states with a ragged last block, and one
# that is too small for 8 bits.
OPTIMIZERS: dict[str, dict[str, object]] = {
    "Adam": {},
    "AdamW8bit": {},
    "AdEMAMix8bit": {"t_alpha": 10, "t_beta3": 10},
    "Lion8bit": {},
    "SGD8bit": {"lr": 0.1, "momentum": 0.9},
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "LAMB8bit": {},
    "LARS8bit": {"lr": 0.1, "momentum": 0.9},
    "PagedAdamW8bit": {},
}
OPTIMIZER_SHAPES = [(64, 81), (33,)]
OPTIMIZER_STEPS = 3


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    return ordinary(shape, torch.float32).flatten().roll(1 + 7 * step).view(shape) * (1 + 0.1 * step)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def case_name(case: Case) -> str:
    shape = "x".join(map(str, case.shape))
    nested = "-nested" if case.nested else ""
    return (
        f"{case.quant_type or 'dynamic'}-{_short(case.dtype)}-{shape}-{case.blocksize}{nested}-{_short(case.storage)}"
    )


def linear_name(case: LinearCase) -> str:
    nested = "-nested" if case.nested else ""
    return f"linear-{case.quant_type}-{_short(case.dtype)}{nested}-{_short(case.storage)}"


def linear_8bit_name(threshold: float, bias: bool) -> str:
    return f"linear8bit-{threshold:g}{'-bias' if bias else ''}"


def ordinary(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Bell-shaped numbers from integer arithmetic alone, so that no library's random generator can change them."""
    n = 1
    for size in shape:
        n *= size
    i = torch.arange(n, dtype=torch.int64)
    total = torch.zeros(n, dtype=torch.int64)
    for multiplier in (1103515245, 22695477, 134775813, 1664525):
        word = (i * multiplier + 12345) % 2**32
        word = (word ^ (word >> 15)) * 2246822519 % 2**32
        total += (word ^ (word >> 13)) >> 16
    return ((total - 4 * 32768).to(torch.float32) / 37837.0).view(shape).to(dtype)


def all_bytes(blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte value, four times, under block maxima from 1e-3 to 1e3: (codes, absmax) for ``blocksize``."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(4)
    blocks = codes.numel() * 2 // blocksize
    absmax = (torch.arange(blocks, dtype=torch.float64) * 0.4316 - 6.9).exp().to(torch.float32)
    return codes, absmax
