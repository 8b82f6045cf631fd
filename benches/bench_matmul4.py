"""Time of products with a 4-bit weight, over their floor, beside ``F.linear`` on a dense weight, beside bitsandbytes.

    python benches/bench_matmul4.py --device cuda --vs bitsandbytes
    python benches/bench_matmul4.py --device cuda --shapes 4096x4096,8192x8192 --ms 1,16,512
    python benches/bench_matmul4.py --device cpu --vs bitsandbytes

Floor: the larger of bytes (each input read once, the output written once) over the copy rate and flops over the rate of
a large bf16 product, both measured in the same run. On CUDA: events around queued launches, as many copies of a weight
in turn as are three times the L2. On the CPU: modules, on the host's clock. Rows are printed as they are done; a
complete run is written to ``results``.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

from shapes import counts, weight_shapes

SHAPES = ((28672, 8192), (8192, 28672), (8192, 8192), (14336, 4096), (4096, 14336), (4096, 4096))
MS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 4096)
CPU_SHAPES, CPU_MS = ((4096, 4096),), (1, 4, 16, 128)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--vs", choices=("bitsandbytes",), help="the peer to measure beside ours")
    parser.add_argument("--shapes", type=weight_shapes, help="weights NxK, separated by commas")
    parser.add_argument("--ms", type=counts, help="tokens, separated by commas")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="few rounds, the main table alone; nothing is written")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before either library starts its pool

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import fewbits  # noqa: E402
import fewbits.nn  # noqa: E402
from common import (  # noqa: E402
    Call,
    Row,
    bitsandbytes,
    cell,
    cuda_us,
    host_us,
    judge,
    medians,
    save,
    show,
    wall_us,
)
from products import NAMES, Rates, conclude, copies, measure_rates, shown  # noqa: E402

DEVICE = torch.device(ARGS.device)
PEER = bitsandbytes() if ARGS.vs else None
PARTIAL = ARGS.quick or ARGS.shapes is not None or ARGS.ms is not None
ROUNDS = 3 if ARGS.quick else 5


class Work(NamedTuple):
    """A product of a weight of n × k with m tokens."""

    n: int
    k: int
    m: int
    dtype: torch.dtype = torch.bfloat16
    quant_type: str = "nf4"
    nested: bool = False
    backward: bool = False

    @property
    def label(self) -> str:
        kind = self.quant_type.upper() + (" double" if self.nested else "")
        return f"{'forward + grad' if self.backward else 'forward'} {kind} {self.n}x{self.k}"


def floor_us(work: Work, rates: Rates) -> float:
    n, k, m = work.n, work.k, work.m
    scales = (1 + 4 / 256) / 64 if work.nested else 4 / 64
    passes = 2 if work.backward else 1
    moved = n * k * (0.5 + scales) + work.dtype.itemsize * m * (n + k)
    return passes * max(moved / rates.bytes, 2 * m * n * k / rates.flops)


# ---- targets -------------------------------------------------------------------------------------------------------

LARGE, SMALL = 28672 * 8192, 4096 * 4096
# Up to so many tokens: times the floor for large, middle and small weights.
FLOOR_LIMITS = {1: (1.25, 1.6, 2.4), 8: (1.35, 1.7, 2.6), 16: (1.6, 1.9, 3.0), 64: (2.0, 2.3, 3.4)}
# Up to so many tokens: times the time of F.linear.
DENSE_LIMITS = {128: (1 / 1.15, 1 / 1.1, 1.0), 512: (1.0, 1.0, 1.08), 1 << 30: (1.05, 1.05, 1.08)}
BACKWARD_LIMITS = {512: 1.4, 4096: 1.08}


def aim(work: Work, row: Row) -> Row:
    """Hold a row of the main table, or of forward and gradient, against its target."""
    size = 0 if work.n * work.k >= LARGE else 2 if work.n * work.k <= SMALL else 1
    if work.backward:
        return judge(row, "x_dense", BACKWARD_LIMITS[work.m], "× F.linear") if work.m in BACKWARD_LIMITS else row
    for most, limits in FLOOR_LIMITS.items():
        if work.m <= most:
            judge(row, "x_floor", limits[size], "× floor")
            if size == 0 and 8 < work.m <= 16:
                row["target"] += " and ≤ 1/2.2 × F.linear"
                row["met"] = row["met"] and row["x_dense"] <= 1 / 2.2
            return row
    limit = next(limits[size] for most, limits in DENSE_LIMITS.items() if work.m <= most)
    return judge(row, "x_dense", round(limit, 3), "× F.linear")


# ---- CUDA ----------------------------------------------------------------------------------------------------------


class Weights:
    """A weight as each side holds it, in enough copies that none is in the L2 when its turn comes."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
        dense = torch.randn(n, k, device=DEVICE, dtype=dtype) / k**0.5
        kwargs = {"quant_type": quant_type, "compress_statistics": nested}
        self.dense = copies(DEVICE, dense, dense.nbytes, torch.clone)
        self.ours = self._quantized(fewbits.functional, dense, kwargs)
        self.peer = self._quantized(PEER.functional, dense, kwargs) if PEER else []

    def _quantized(self, library: ModuleType, dense: torch.Tensor, kwargs: dict[str, object]) -> list[object]:
        codes, state = library.quantize_4bit(dense, **kwargs)

        def duplicate(pair: tuple[torch.Tensor, object]) -> tuple[torch.Tensor, object]:
            other = copy.copy(pair[1])
            other.absmax = other.absmax.clone()
            return pair[0].clone(), other

        return copies(DEVICE, (codes, state), codes.nbytes + state.absmax.nbytes, duplicate)


def bind(work: Work, product: Callable[..., torch.Tensor], weights: list[object], x: torch.Tensor) -> list[Call]:
    """One call a copy of the weight."""
    if not work.backward:
        return [partial(product, x, w) for w in weights]
    x = x.detach().requires_grad_()
    grad = torch.randn(work.m, work.n, device=DEVICE, dtype=work.dtype)
    return [lambda w=w: torch.autograd.grad(product(x, w), x, grad) for w in weights]


def time_cuda(work: Work, weights: Weights, rates: Rates) -> Row:
    x = torch.randn(work.m, work.k, device=DEVICE, dtype=work.dtype)
    floor = floor_us(work, rates)
    sides: list[list[Call]] = [
        bind(work, lambda x, w: fewbits.matmul_4bit(x, *w), weights.ours, x),
        bind(work, F.linear, weights.dense, x),
    ]
    if PEER:
        sides.append(bind(work, lambda x, w: PEER.matmul_4bit(x, w[0].t(), w[1]), weights.peer, x))
    least = int(min(20, max(3, 2000 / floor)))
    with torch.set_grad_enabled(work.backward):
        timers = [partial(cuda_us, calls, max(least, len(calls))) for calls in sides]
        us, dense_us, *peer = medians(timers, ROUNDS)
    return conclude(work, floor, us, dense_us, peer[0] if peer else None)


def cuda_rows(rates: Rates) -> Iterator[Row]:
    ms = ARGS.ms or ((1, 8, 16, 64, 128, 512, 4096) if ARGS.quick else MS)
    plain: dict[tuple[int, int, int], float] = {}
    for n, k in ARGS.shapes or SHAPES:
        weights = Weights(n, k, torch.bfloat16, "nf4", nested=False)
        for m in ms:
            work = Work(n, k, m)
            row = time_cuda(work, weights, rates)
            plain[n, k, m] = row["us"]
            yield aim(work, row)
        for m in () if ARGS.quick else sorted({512, 4096} & set(ms)):
            work = Work(n, k, m, backward=True)
            yield aim(work, time_cuda(work, weights, rates))
        del weights
    if ARGS.quick:
        return
    kinds = ((torch.bfloat16, "nf4", True), (torch.bfloat16, "fp4", False), (torch.float16, "nf4", False))
    for n, k in ARGS.shapes or ((28672, 8192), (14336, 4096), (4096, 4096)):
        for dtype, quant_type, nested in kinds:
            weights = Weights(n, k, dtype, quant_type, nested)
            for m in sorted({1, 8, 16, 512} & set(ms)):
                row = time_cuda(Work(n, k, m, dtype, quant_type, nested), weights, rates)
                row["over_plain"] = row["us"] / plain[n, k, m]
                yield judge(row, "over_plain", 1.05, "× bf16 NF4") if nested else row
            del weights
    yield from host_rows()


# ---- modules -------------------------------------------------------------------------------------------------------


def layer(library: ModuleType, n: int, k: int, dtype: torch.dtype, nested: bool = False) -> torch.nn.Module:
    module = library.nn.Linear4bit(
        k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested
    ).to(dtype)
    module = module.to(DEVICE).eval()
    if module.weight.quant_state is None:  # the peer quantizes on the CPU only when told
        module.weight = module.weight._quantize(DEVICE)
    return module


def host_rows() -> Iterator[Row]:
    """Host time of a call without gradients, on weights so small that nothing else is left."""
    x = torch.randn(1, 64, device=DEVICE, dtype=torch.bfloat16)
    dense = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        for nested in (False, True):
            calls = [partial(layer(fewbits, 64, 64, torch.bfloat16, nested), x), partial(F.linear, x, dense)]
            if PEER:
                calls.append(partial(layer(PEER, 64, 64, torch.bfloat16, nested), x))
            timers = [partial(host_us, call, 300) for call in calls]
            us, dense_us, *peer = medians(timers, ROUNDS)
            assert us is not None
            assert dense_us is not None
            peer_us = peer[0] if peer else None
            row: Row = {"work": f"host time of Linear4bit{', double' if nested else ''}", "dtype": "bf16", "m": 1}
            row |= {"us": us, "dense_us": dense_us, "x_dense": us / dense_us, "bitsandbytes_us": peer_us}
            row["times_faster"] = peer_us / us if peer_us else None
            yield judge(row, "x_dense", 1.0, "× F.linear") if DEVICE.type == "cuda" else row


def aim_cpu(work: Work, row: Row) -> Row:
    if work.m == 1:
        return judge(row, "times_faster", 1.0, "× faster than bitsandbytes", at_least=True)
    if work.dtype == torch.float32:
        return judge(row, "x_dense", 1 / 1.5 if work.m <= 4 else 1.15, "× F.linear")
    if work.dtype == torch.bfloat16:
        judge(row, "times_faster", 2.5, "× faster than bitsandbytes", at_least=True)
        if work.m == 128:
            row["target"] += " and ≤ 1.4 × F.linear"
            row["met"] = row["met"] and row["x_dense"] <= 1.4
    return row


def cpu_rows(rates: Rates) -> Iterator[Row]:
    for n, k in ARGS.shapes or CPU_SHAPES:
        for dtype in (torch.bfloat16,) if ARGS.quick else NAMES:
            dense = torch.randn(n, k).to(dtype)
            mine, theirs = layer(fewbits, n, k, dtype), layer(PEER, n, k, dtype) if PEER else None
            for m in ARGS.ms or CPU_MS:
                work, x = Work(n, k, m, dtype), torch.randn(m, k).to(dtype)
                sides = [partial(mine, x), partial(F.linear, x, dense)] + ([partial(theirs, x)] if theirs else [])
                with torch.no_grad():
                    us, dense_us, *peer = medians([partial(wall_us, [call], 3) for call in sides], ROUNDS)
                row = conclude(work, floor_us(work, rates), us, dense_us, peer[0] if peer else None)
                yield aim_cpu(work, row)
    if not ARGS.quick:
        yield from host_rows()


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    start = time.monotonic()
    rates = measure_rates(DEVICE, ROUNDS)
    rows = list(shown(cuda_rows(rates) if DEVICE.type == "cuda" else cpu_rows(rates), start))
    facts = {"copy_gb_per_s": rates.bytes / 1e3, "matmul_tflops": rates.flops / 1e6}
    if forced := os.environ.get("FEWBITS_MATMUL4"):
        facts["forced_path"] = forced
    show(f"4-bit products on {DEVICE.type}, " + ", ".join(f"{k} {cell(v)}" for k, v in facts.items()), rows)
    if not PARTIAL:
        print("wrote", save("matmul4", DEVICE, rows, **facts).name)


if __name__ == "__main__":
    main()
