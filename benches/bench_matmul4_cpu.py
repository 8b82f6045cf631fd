"""Time of products with 4-bit weights on the CPU, beside torch's dense product and bitsandbytes' two ways.

    python benches/bench_matmul4_cpu.py --threads 2

bitsandbytes is timed as its users meet it: a ``Linear4bit`` in eval mode, which on processors with AVX-512 BF16 repacks
its weight in place and rounds scales and activations to bfloat16 whatever their dtype, and one in training mode, which
dequantizes the weight. Ours keeps the weight as it is and computes float32 in float32.
"""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple


class Shape(NamedTuple):
    n: int
    k: int
    tokens: tuple[int, ...]


SHAPES = [
    Shape(4096, 4096, (1, 2, 4, 8, 16, 32, 64, 128, 512)),
    Shape(14336, 4096, (1, 4, 16, 128)),
    Shape(4096, 14336, (1, 4, 16, 128)),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all libraries (default 2)")
    parser.add_argument("--quick", action="store_true", help="few rounds and the first shape alone; nothing is written")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before any library starts its pool

import torch  # noqa: E402

import fewbits.functional as ours  # noqa: E402
from common import Call, Row, bitsandbytes, copy_rate, judge, medians, save, show, wall_us  # noqa: E402
from fewbits.autograd import matmul_4bit  # noqa: E402

DEVICE = torch.device("cpu")
PEER = bitsandbytes()
ROUNDS = 3 if ARGS.quick else 7
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Of the named points of 4096 x 4096: (dtype, tokens) -> (figure, limit, what it says, whether more is better).
TARGETS = {
    **{(dtype, 1): ("over_peer", 1.0, "× bitsandbytes, its faster way", False) for dtype in NAMES.values()},
    ("bf16", 4): ("times_faster", 2.5, "× faster than bitsandbytes, its faster way", True),
    ("bf16", 16): ("times_faster", 2.5, "× faster than bitsandbytes, its faster way", True),
    ("bf16", 128): ("over_dense", 1.4, "× torch's dense product", False),
    ("fp32", 4): ("over_dense", 1 / 1.5, "× torch's dense product", False),
    ("fp32", 16): ("over_dense", 1.15, "× torch's dense product", False),
    ("fp32", 128): ("over_dense", 1.15, "× torch's dense product", False),
}


def peer_linear(weight: torch.Tensor, dtype: torch.dtype, training: bool) -> torch.nn.Module | None:
    if PEER is None:
        return None
    n, k = weight.shape
    kind = {"quant_type": "nf4", "compress_statistics": False}
    linear = PEER.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, **kind)
    linear.weight = PEER.nn.Params4bit(weight.clone(), requires_grad=False, **kind)
    module: torch.nn.Module = linear.to("cpu").train(training)
    return module


def times(calls: list[Call | None]) -> list[float | None]:
    """Medians; short calls are repeated within a sample."""
    first = next(call for call in calls if call is not None)
    repeats = max(1, int(20e3 / wall_us([first], 1)))
    return medians([call and (lambda call=call: wall_us([call], repeats)) for call in calls], ROUNDS)


def rows_of(shape: Shape, dtype: torch.dtype, rate: float) -> list[Row]:
    n, k, _ = shape
    weight = torch.randn(n, k) / k**0.5
    dense = weight.to(dtype)
    codes, state = ours.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    repacked, plain = peer_linear(weight, dtype, False), peer_linear(weight, dtype, True)
    found = []
    for m in shape.tokens:
        x = torch.randn(m, k).to(dtype)
        calls: list[Call | None] = [
            lambda x=x: matmul_4bit(x, codes, state),  # type: ignore[misc]
            lambda x=x: torch.nn.functional.linear(x, dense),  # type: ignore[misc]
            repacked and (lambda x=x: repacked(x)),
            plain and (lambda x=x: plain(x)),
        ]
        us, dense_us, repacked_us, plain_us = times(calls)
        assert us is not None
        assert dense_us is not None
        row: Row = {"work": f"NF4 linear {n}×{k}, M = {m}", "dtype": NAMES[dtype]}
        row["floor_us"] = (n * k * (0.5 + 4 / 64) + (n + k) * m * dtype.itemsize) / rate
        row |= {"us": us, "x_floor": us / row["floor_us"], "dense_us": dense_us, "over_dense": us / dense_us}
        row |= {"bitsandbytes_us": repacked_us, "bitsandbytes_plain_us": plain_us}
        peers = [peer for peer in (repacked_us, plain_us) if peer is not None]
        row["times_faster"] = min(peers) / us if peers else None
        row["over_peer"] = us / min(peers) if peers else None
        if (n, k) == (4096, 4096) and (target := TARGETS.get((NAMES[dtype], m))):
            figure, limit, unit, at_least = target
            judge(row, figure, limit, unit, at_least=at_least)
        found.append(row)
    return found


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    rate = copy_rate(DEVICE)
    rows: list[Row] = []
    with torch.no_grad():
        for shape in SHAPES[:1] if ARGS.quick else SHAPES:
            for dtype in NAMES:
                rows += rows_of(shape, dtype, rate)
    show(f"products with 4-bit weights on the CPU, copy rate {rate / 1e3:.1f} GB/s", rows)
    if not ARGS.quick:
        print("wrote", save("matmul4", DEVICE, rows, copy_gb_per_s=rate / 1e3).name)


if __name__ == "__main__":
    main()
