"""Time of an optimizer step, over its floor, beside bitsandbytes and beside torch's fused optimizers.

    python benches/bench_optim.py --device cuda --vs bitsandbytes,torch
    python benches/bench_optim.py --device cuda --only paged
    python benches/bench_optim.py --device cpu --vs bitsandbytes,torch

Floor: the bytes that a step must move (parameters and states read and written, gradients read) over the copy rate
measured in the same run; for states in host memory, their bytes over the rate of pinned copies in both directions at
once. All times are on the host's clock, steps one after another, from the first to the end of the work of the last.
Rows are printed as they are done; a complete run is written to ``results``.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

PEERS = ("bitsandbytes", "torch")


def peers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(PEERS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEERS)}, got {text}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--vs", type=peers, default=(), help="peers to measure beside ours: bitsandbytes,torch")
    parser.add_argument("--only", choices=("model", "small", "paged"), help="one part; nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is written")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before either library starts its pool

import torch  # noqa: E402

import fewbits.optim  # noqa: E402
from common import (  # noqa: E402
    Row,
    bitsandbytes,
    cell,
    copy_rate,
    host_us,
    judge,
    medians,
    save,
    show,
    wall_us,
)

DEVICE = torch.device(ARGS.device)
PEER = bitsandbytes() if "bitsandbytes" in ARGS.vs else None
ROUNDS = 3 if ARGS.quick else 5
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Shapes = list[tuple[int, ...]]

# 1.1 B parameters: 22 layers, 2048 wide, 4 of 32 heads for keys and values, 5632 in the middle, 32,000 words.
_LAYER: Shapes = [
    *((2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)),
    *((2048,), (2048,)),
]
LLAMA: Shapes = [(32000, 2048), *(_LAYER * 22), (2048,), (32000, 2048)]
SMALL: Shapes = [(160, 160)] * 200
LORA: Shapes = [(8, 4096), (4096, 8)] * 224
MATRIX: Shapes = [(4096, 4096)]

# Bytes of states a parameter: each read and written.
STATE_BYTES = {
    "AdamW8bit": 2 * (1 + 4 / 256),
    "Lion8bit": 1 + 4 / 256,
    "AdEMAMix8bit": 3 * (1 + 4 / 256),
    "AdamW32bit": 8,
}


class Work(NamedTuple):
    """A step of one optimizer over tensors of these shapes."""

    label: str
    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.bfloat16

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def floor_us(work: Work, rate: float) -> float:
    each = 3 * work.dtype.itemsize + 2 * STATE_BYTES[work.name.removeprefix("Paged")]
    return work.numel * each / rate


def tensors(work: Work) -> list[torch.nn.Parameter]:
    params = []
    for shape in work.shapes:
        p = torch.nn.Parameter((torch.randn(shape, device=DEVICE) * 0.02).to(work.dtype))
        p.grad = (torch.randn(shape, device=DEVICE) * 1e-3).to(work.dtype)
        params.append(p)
    return params


def measure(work: Work, repeats: int) -> Row:
    """Ours and the peers', in turn on the same parameters."""
    us, torch_us, peer_us = times(work, repeats)
    release()
    assert us is not None
    row: Row = {"work": f"{work.name}, {work.label}", "dtype": NAMES[work.dtype], "us": us}
    row |= {"torch_us": torch_us, "x_torch": us / torch_us if torch_us else None}
    row |= {"bitsandbytes_us": peer_us, "times_faster": peer_us / us if peer_us else None}
    return row


def times(work: Work, repeats: int) -> list[float | None]:
    params = tensors(work)
    optimizers = [
        getattr(fewbits.optim, work.name)(params, lr=1e-4),
        torch.optim.AdamW(params, lr=1e-4, fused=True) if "torch" in ARGS.vs else None,
        getattr(PEER.optim, work.name)(params, lr=1e-4) if PEER else None,
    ]
    for optimizer in optimizers:
        for _ in range(3 if optimizer is not None else 0):
            optimizer.step()
    return medians([partial(wall_us, [one.step], repeats) if one is not None else None for one in optimizers], ROUNDS)


def release() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def model_rows(rate: float) -> Iterator[Row]:
    limits = {"AdamW8bit": 1.3, "Lion8bit": 1.3, "AdEMAMix8bit": 1.3, "AdamW32bit": 1.2}
    for name, limit in limits.items():
        work = Work("1.1 B Llama", name, LLAMA)
        row = measure(work, 5)
        row["floor_us"] = floor_us(work, rate)
        row["x_floor"] = row["us"] / row["floor_us"]
        yield judge(row, "x_floor", limit, "× floor")


def small_rows() -> Iterator[Row]:
    for label, shapes, dtype, limit in (
        ("200 of 160×160", SMALL, torch.bfloat16, 350.0),
        ("448 of LoRA", LORA, torch.float32, 500.0),
    ):
        yield judge(measure(Work(label, "AdamW8bit", shapes, dtype), 20), "us", limit, "µs")
    work = Work("448 of LoRA, host", "AdamW8bit", LORA, torch.float32)
    params = tensors(work)
    optimizer = fewbits.optim.AdamW8bit(params, lr=1e-4)
    optimizer.step()

    def fresh() -> float:
        """Gradients at new addresses, as after every backward; making them is not timed."""
        total = 0.0
        for _ in range(10):
            for p in params:
                p.grad = torch.empty_like(p).copy_(p)
            total += host_us(optimizer.step, 1)
        return total / 10

    (us,) = medians([fresh], ROUNDS)
    yield judge({"work": f"{work.name}, {work.label}", "dtype": "fp32", "us": us}, "us", 500.0, "µs")


def pinned_rate() -> float:
    """Bytes a microsecond in one direction, while as many go in the other."""
    count = 2**28
    host = [torch.empty(count, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            device[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host[1].copy_(device[1], non_blocking=True)

    (us,) = medians([lambda: wall_us([both], 4)], ROUNDS)
    assert us is not None
    return count / us


def paged_rows() -> Iterator[Row]:
    rate = pinned_rate()
    for name in ("AdamW8bit", "AdamW32bit"):
        plain = own(Work("1.1 B Llama, unpaged", name, LLAMA))["us"]
        work = Work("1.1 B Llama, resident", f"Paged{name}", LLAMA)
        row = own(work, page_budget=1.0)
        row |= {"unpaged_us": plain, "x_unpaged": row["us"] / plain}
        yield judge(row, "x_unpaged", 1.05, "× unpaged")
        work = Work("1.1 B Llama, evicted", f"Paged{name}", LLAMA)
        row = own(work, page_budget=0)
        row["floor_us"] = work.numel * STATE_BYTES[name] / rate
        row["x_floor"] = row["us"] / row["floor_us"]
        yield judge(row, "x_floor", 1.3, "× PCIe floor")


def own(work: Work, **kwargs: Any) -> Row:
    """Ours alone: bitsandbytes has no way to say where its pages are."""
    us = own_us(work, **kwargs)
    release()
    return {"work": f"{work.name}, {work.label}", "dtype": NAMES[work.dtype], "us": us}


def own_us(work: Work, **kwargs: Any) -> float:
    params = tensors(work)
    optimizer = getattr(fewbits.optim, work.name)(params, lr=1e-4, **kwargs)
    for _ in range(3):
        optimizer.step()
    (us,) = medians([partial(wall_us, [optimizer.step], 5)], ROUNDS)
    assert us is not None
    return us


def cuda_rows(rate: float) -> Iterator[Row]:
    if ARGS.only in (None, "model"):
        yield from model_rows(rate)
    if ARGS.only in (None, "small"):
        yield from small_rows()
    if ARGS.only in (None, "paged"):
        yield from paged_rows()


# ---- CPU -----------------------------------------------------------------------------------------------------------


def cpu_rows(rate: float) -> Iterator[Row]:
    for name in STATE_BYTES:
        work = Work("16.8 M", name, MATRIX, torch.float32)
        row = measure(work, 3)
        row["floor_us"] = floor_us(work, rate)
        row["x_floor"] = row["us"] / row["floor_us"]
        if name == "AdamW8bit":
            judge(row, "times_faster", 6.0, "× faster than bitsandbytes", at_least=True)
            if row["x_torch"] is not None:
                row["target"] += " and ≤ 2.5 × torch fused"
                row["met"] = bool(row["met"] in (None, True) and row["x_torch"] <= 2.5)
        elif name == "AdamW32bit":
            judge(row, "x_torch", 1.0, "× torch fused")
        yield row


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    start = time.monotonic()
    rate = copy_rate(DEVICE)
    rows = []
    for row in cuda_rows(rate) if DEVICE.type == "cuda" else cpu_rows(rate):
        rows.append(row)
        verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        shown = [f"{k} {cell(v)}" for k, v in row.items() if v is not None and k not in ("work", "met")]
        print(f"[{time.monotonic() - start:4.0f} s] {row['work']}:", ", ".join(shown), verdict, flush=True)
    facts = {"copy_gb_per_s": rate / 1e3}
    show(f"Optimizer steps on {DEVICE.type}, " + ", ".join(f"{k} {cell(v)}" for k, v in facts.items()), rows)
    if not ARGS.quick and ARGS.only is None:
        print("wrote", save("optim", DEVICE, rows, **facts).name)


if __name__ == "__main__":
    main()
