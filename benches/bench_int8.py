"""Time of LLM.int8() products over their floor, beside ``F.linear`` on a 16-bit weight, beside bitsandbytes.

    python benches/bench_int8.py --device cuda --vs bitsandbytes
    python benches/bench_int8.py --device cuda --shapes 4096x4096 --ms 1,16,512
    python benches/bench_int8.py --device cpu --vs bitsandbytes

A product is a ``Linear8bitLt`` without gradients: quantizing the rows is part of it. With a threshold, a column in a
thousand holds an outlier. Floor: the larger of bytes (each input read once, the output written once) over the copy
rate and operations over twice the rate of a large bf16 product, both measured in the same run. On CUDA: events around
queued launches, as many copies of a weight in turn as are three times the L2; bitsandbytes with a threshold, which
waits for the device, on the host's clock. On the CPU: the host's clock. A complete run is written to ``results``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

from shapes import counts, weight_shapes

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192))
MS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
FEW_MS = (1, 16, 128, 512, 2048)  # for float16, and with a threshold
CPU_SHAPES, CPU_MS = ((4096, 4096),), (1, 2, 4, 8, 16, 32, 64, 128)
THRESHOLD = 6.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--vs", choices=("bitsandbytes",), help="the peer to measure beside ours")
    parser.add_argument("--shapes", type=weight_shapes, help="weights NxK, separated by commas")
    parser.add_argument("--ms", type=counts, help="tokens, separated by commas")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is written")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before either library starts its pool

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import fewbits.functional  # noqa: E402
import fewbits.nn  # noqa: E402
from common import Call, Row, bitsandbytes, cell, cuda_us, host_us, judge, medians, save, show, wall_us  # noqa: E402
from products import NAMES, Rates, conclude, copies, measure_rates, shown  # noqa: E402

DEVICE = torch.device(ARGS.device)
PEER = bitsandbytes() if ARGS.vs else None
PARTIAL = ARGS.quick or ARGS.shapes is not None or ARGS.ms is not None
ROUNDS = 3 if ARGS.quick else 5


class Work(NamedTuple):
    """A product of an int8 weight of n × k with m tokens."""

    n: int
    k: int
    m: int
    dtype: torch.dtype = torch.bfloat16
    threshold: float = 0.0

    @property
    def label(self) -> str:
        return f"int8 linear {self.n}x{self.k}" + (f", threshold {self.threshold:g}" if self.threshold else "")


def floor_us(work: Work, rates: Rates) -> float:
    n, k, m = work.n, work.k, work.m
    moved = n * (k + 4) + work.dtype.itemsize * m * (n + k)
    return max(moved / rates.bytes, 2 * m * n * k / (2 * rates.flops))


def activations(work: Work) -> torch.Tensor:
    """Normal numbers below the threshold, and outliers in a column of a thousand."""
    x = torch.randn(work.m, work.k, device=DEVICE).clamp_(-5, 5)
    if work.threshold:
        columns = torch.randperm(work.k)[: max(1, round(work.k / 1000))]
        x[torch.randint(0, work.m, columns.shape), columns] = 30.0
    return x.to(work.dtype)


def layer(library: ModuleType, weight: torch.Tensor, threshold: float) -> torch.nn.Module:
    n, k = weight.shape
    module = library.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    # The peer quantizes on the CPU's side of a move alone.
    source = weight.cpu() if library is PEER else weight
    module.weight = library.nn.Int8Params(source, requires_grad=False, has_fp16_weights=False).to(DEVICE)
    return module.eval()


# ---- targets -------------------------------------------------------------------------------------------------------

SMALL = 4096 * 4096


def aim(work: Work, row: Row, plain: dict[Work, float]) -> Row:
    """Hold a row of CUDA against its target."""
    if work.threshold:
        row["over_plain"] = row["us"] / plain[work._replace(threshold=0.0)]
        return judge(row, "over_plain", 1.12, "× threshold 0")
    small = work.n * work.k <= SMALL
    if work.m <= 16:
        judge(row, "x_floor", 2.5 if small else 1.7, "× floor")
        row["target"] += " and < F.linear"
        row["met"] = row["met"] and row["x_dense"] < 1
        return row
    if work.m < 128:
        return row
    faster = 1.0 if work.m < 512 else 1.25 if work.m < 2048 else 1.35 if small else 1.5
    return judge(row, "x_dense", round(1 / faster, 3), "× F.linear")


def aim_cpu(work: Work, row: Row) -> Row:
    if work.dtype == torch.float16 or not work.threshold:
        return row
    return judge(row, "times_faster", 1.0, "× faster than bitsandbytes", at_least=True)


# ---- products ------------------------------------------------------------------------------------------------------


def bind(modules: list[object], x: torch.Tensor) -> list[Call]:
    return [partial(module, x) for module in modules]


def time_cuda(work: Work, ours: list[object], dense: list[object], peer: list[object], rates: Rates) -> Row:
    x, floor = activations(work), floor_us(work, rates)
    least = int(min(20, max(3, 2000 / floor)))

    def timer(calls: list[Call], clock: object = cuda_us) -> Call:
        return partial(clock, calls, max(least, len(calls)))  # type: ignore[arg-type]

    timers = [timer(bind(ours, x)), timer([partial(F.linear, x, weight) for weight in dense])]
    if peer:
        timers.append(timer(bind(peer, x), wall_us if work.threshold else cuda_us))
    us, dense_us, *peer_us = medians(timers, ROUNDS)
    return conclude(work, floor, us, dense_us, peer_us[0] if peer_us else None)


def cuda_rows(rates: Rates) -> Iterator[Row]:
    plain: dict[Work, float] = {}
    for n, k in ARGS.shapes or SHAPES:
        for dtype in (torch.bfloat16,) if ARGS.quick else (torch.bfloat16, torch.float16):
            weight = torch.randn(n, k, device=DEVICE, dtype=dtype) / k**0.5
            dense = copies(DEVICE, weight, weight.nbytes, torch.clone)
            for threshold in (0.0, THRESHOLD):
                main = dtype == torch.bfloat16 and not threshold
                ours, peer = (
                    copies(DEVICE, layer(library, weight, threshold), n * k, copy.deepcopy) if library else []
                    for library in (fewbits, PEER)
                )
                for m in ARGS.ms or (MS if main and not ARGS.quick else FEW_MS):
                    work = Work(n, k, m, dtype, threshold)
                    row = time_cuda(work, ours, dense, peer, rates)
                    plain[work] = row["us"]
                    yield aim(work, row, plain)
            del weight, dense, ours, peer
    if not ARGS.quick:
        yield from quantize_rows(rates)
        yield from host_rows()


def cpu_rows(rates: Rates) -> Iterator[Row]:
    for n, k in ARGS.shapes or CPU_SHAPES:
        weight = torch.randn(n, k) / k**0.5
        for threshold in (THRESHOLD,) if ARGS.quick else (0.0, THRESHOLD):
            mine, theirs = layer(fewbits, weight, threshold), layer(PEER, weight, threshold) if PEER else None
            for dtype in (torch.bfloat16, torch.float32) if ARGS.quick else NAMES:
                dense = weight.to(dtype)
                for m in ARGS.ms or CPU_MS:
                    work = Work(n, k, m, dtype, threshold)
                    x = activations(work)
                    sides = [partial(mine, x), partial(F.linear, x, dense)] + ([partial(theirs, x)] if theirs else [])
                    us, dense_us, *peer = medians([partial(wall_us, [call], 3) for call in sides], ROUNDS)
                    yield aim_cpu(work, conclude(work, floor_us(work, rates), us, dense_us, peer[0] if peer else None))
    if not ARGS.quick:
        yield from quantize_rows(rates)
        yield from host_rows()


# ---- rows alone, and the host ---------------------------------------------------------------------------------------


def quantize_rows(rates: Rates) -> Iterator[Row]:
    """`int8_vectorwise_quant` of a large matrix, whose list of outlier columns nobody asks for."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    for dtype in (torch.bfloat16, torch.float16):
        for threshold in (0.0, THRESHOLD):
            x = activations(Work(size, size, size, dtype, threshold))
            ours: Call = partial(fewbits.functional.int8_vectorwise_quant, x, threshold, return_outliers=False)
            timers = [partial(cuda_us if DEVICE.type == "cuda" else wall_us, [ours], 10)]
            if PEER and dtype == torch.float16:
                theirs: Call = partial(PEER.functional.int8_vectorwise_quant, x, threshold)
                timers.append(partial(wall_us if threshold or DEVICE.type == "cpu" else cuda_us, [theirs], 10))
            us, *peer = medians(timers, ROUNDS)
            assert us is not None
            floor = size * (size * (dtype.itemsize + 1) + 4) / rates.bytes
            kind = f", threshold {threshold:g}, no list" if threshold else ""
            row: Row = {"work": f"int8_vectorwise_quant {size}x{size}{kind}", "dtype": NAMES[dtype], "m": size}
            row |= {"floor_us": floor, "us": us, "x_floor": us / floor, "bitsandbytes_us": peer[0] if peer else None}
            row["times_faster"] = peer[0] / us if peer and peer[0] else None
            yield judge(row, "x_floor", 1.2, "× floor") if DEVICE.type == "cuda" else row


def host_rows() -> Iterator[Row]:
    """Host time of a call without gradients, on weights so small that nothing else is left."""
    x = torch.randn(1, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    for threshold in (0.0, THRESHOLD):
        calls = [partial(layer(fewbits, weight, threshold), x), partial(F.linear, x, weight)]
        if PEER:
            calls.append(partial(layer(PEER, weight, threshold), x))
        us, dense_us, *peer = medians([partial(host_us, call, 300) for call in calls], ROUNDS)
        assert us is not None
        assert dense_us is not None
        kind = f", threshold {threshold:g}" if threshold else ""
        row: Row = {"work": f"host time of Linear8bitLt{kind}", "dtype": "bf16", "m": 1, "us": us}
        row |= {"dense_us": dense_us, "x_dense": us / dense_us, "bitsandbytes_us": peer[0] if peer else None}
        row["times_faster"] = peer[0] / us if peer and peer[0] else None
        yield judge(row, "us", 15.0, "µs") if DEVICE.type == "cuda" else row


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says on every call that it casts
    start = time.monotonic()
    rates = measure_rates(DEVICE, ROUNDS)
    with torch.no_grad():
        rows = list(shown(cuda_rows(rates) if DEVICE.type == "cuda" else cpu_rows(rates), start))
    facts = {"copy_gb_per_s": rates.bytes / 1e3, "matmul_tflops": rates.flops / 1e6}
    show(f"LLM.int8() on {DEVICE.type}, " + ", ".join(f"{k} {cell(v)}" for k, v in facts.items()), rows)
    if not PARTIAL:
        print("wrote", save("int8", DEVICE, rows, **facts).name)


if __name__ == "__main__":
    main()
