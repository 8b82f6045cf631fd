"""Time of blockwise quantization and dequantization, over its floor and beside bitsandbytes.

    python benches/bench_blockwise.py --device cuda
    python benches/bench_blockwise.py --device cpu --threads 2

On CUDA: events around queued launches, inputs and outputs rotated past the L2. On the CPU: the host's clock, into fresh
memory (as a plain call gives it) and into a reused ``out=``.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple


class Work(NamedTuple):
    """One operation. ``kind`` is nf4, fp4 or dynamic (8-bit)."""

    direction: str
    kind: str
    nested: bool = False

    @property
    def label(self) -> str:
        what = "8-bit" if self.kind == "dynamic" else self.kind.upper()
        return f"{self.direction} {what}{', double quantization' if self.nested else ''}"


WORKS = [
    Work(direction, kind, nested)
    for direction in ("quantize", "dequantize")
    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("dynamic", False))
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both libraries (default 2)")
    parser.add_argument("--log2n", type=int, help="elements of the large tensors (default 28 on cuda, 24 on cpu)")
    parser.add_argument("--quick", action="store_true", help="few rounds and the main rows alone; nothing is written")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before either library starts its pool

import torch  # noqa: E402

import fewbits.functional as ours  # noqa: E402
from common import Call, Row, bitsandbytes, copy_rate, cuda_us, judge, medians, save, show, wall_us  # noqa: E402
from products import shown  # noqa: E402

DEVICE = torch.device(ARGS.device)
PEER = bitsandbytes()
ROUNDS = 3 if ARGS.quick else 7
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def bytes_moved(work: Work, n: int, blocksize: int, dtype: torch.dtype) -> float:
    """The fewest bytes: each input read once, each output written once."""
    code = 1.0 if work.kind == "dynamic" else 0.5
    scale = (1 + 4 / 256) if work.nested else 4
    return n * (dtype.itemsize + code + scale / blocksize)


def bind(library: ModuleType, work: Work, x: torch.Tensor, blocksize: int, out: torch.Tensor | None = None) -> Call:
    """A call of ``work`` on ``x`` that returns its outputs. Both libraries answer the same signatures."""
    if work.kind == "dynamic":
        if work.direction == "quantize":
            return lambda: library.quantize_blockwise(x, blocksize=blocksize)
        codes, state = library.quantize_blockwise(x, blocksize=blocksize)
        return lambda: library.dequantize_blockwise(codes, state, out=out)
    if work.direction == "quantize":
        return lambda: library.quantize_4bit(
            x, blocksize=blocksize, quant_type=work.kind, compress_statistics=work.nested
        )
    packed, state = library.quantize_4bit(x, blocksize=blocksize, quant_type=work.kind, compress_statistics=work.nested)
    return lambda: library.dequantize_4bit(packed, state, out=out)


def row_of(work: Work, n: int, blocksize: int, dtype: torch.dtype, rate: float) -> Row:
    floor = bytes_moved(work, n, blocksize, dtype) / rate
    return {"work": work.label, "dtype": NAMES[dtype], "elements": n, "blocksize": blocksize, "floor_us": floor}


def conclude(row: Row, us: float | None, peer_us: float | None) -> Row:
    assert us is not None
    row |= {"us": us, "x_floor": us / row["floor_us"], "bitsandbytes_us": peer_us}
    row["times_faster"] = peer_us / us if peer_us else None
    return row


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def rotated(library: ModuleType, work: Work, inputs: list[torch.Tensor], blocksize: int) -> list[Call]:
    """One call an input; each keeps its last output, so that outputs move through memory too."""
    kept: list[object] = [None] * len(inputs)

    def keeping(i: int, call: Call) -> Call:
        def run() -> None:
            kept[i] = call()

        return run

    return [keeping(i, bind(library, work, x, blocksize)) for i, x in enumerate(inputs)]


def time_cuda(work: Work, n: int, blocksize: int, dtype: torch.dtype, rate: float, small: bool = False) -> Row:
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    row = row_of(work, n, blocksize, dtype, rate)
    copies = int(min(64, max(1, 3 * l2 // bytes_moved(work, n, blocksize, dtype))))
    inputs = [torch.randn(n, device=DEVICE).to(dtype) for _ in range(copies)]
    calls = rotated(ours, work, inputs, blocksize)
    peer_calls = rotated(PEER.functional, work, inputs, blocksize) if PEER else None
    launches = max(10, copies)
    us, peer_us = medians(
        [lambda: cuda_us(calls, launches), (lambda: cuda_us(peer_calls, launches)) if peer_calls else None], ROUNDS
    )
    conclude(row, us, peer_us)
    if small:
        row["wall_us"], row["bitsandbytes_wall_us"] = medians(
            [lambda: wall_us(calls, 200), (lambda: wall_us(peer_calls, 200)) if peer_calls else None], ROUNDS
        )
        if peer_us and row["bitsandbytes_wall_us"]:
            row["slower_by"] = max(row["us"] / peer_us, row["wall_us"] / row["bitsandbytes_wall_us"])
        judge(row, "slower_by", 1.0, "× bitsandbytes, device and wall")
    return row


def cuda_rows(rate: float) -> Iterator[Row]:
    n = 2 ** (ARGS.log2n or 28)
    dtypes = [torch.bfloat16, torch.float32] if ARGS.quick else [torch.bfloat16, torch.float16, torch.float32]
    for dtype in dtypes:
        plain: dict[tuple[str, str], float] = {}
        for work in WORKS:
            row = time_cuda(work, n, 256 if work.kind == "dynamic" else 64, dtype, rate)
            if work.nested:
                row["over_plain"] = row["us"] / plain[work.direction, work.kind]
                judge(row, "over_plain", 1.05, "× without double quantization")
            else:
                plain[work.direction, work.kind] = row["us"]
                limit = 1.12 if work.direction == "dequantize" else 1.2 if dtype == torch.float32 else 1.3
                judge(row, "x_floor", limit, "× floor")
            yield row
    if ARGS.quick:
        return
    for blocksize in (32, 128, 512, 1024, 2048, 4096):
        for work in (w for w in WORKS if w.kind != "fp4" and not w.nested):
            if work.kind != "dynamic" or blocksize != 32:  # the peer's 8-bit kernels start at 64
                yield time_cuda(work, n, blocksize, torch.bfloat16, rate)
    for small in (2**12, 2**14, 2**16, 2**18, 2**20):
        for work in (w for w in WORKS if w.kind != "fp4"):
            yield time_cuda(work, small, 256 if work.kind == "dynamic" else 64, torch.bfloat16, rate, small=True)


# ---- CPU -----------------------------------------------------------------------------------------------------------


def peer_into(work: Work, x: torch.Tensor, blocksize: int, out: torch.Tensor) -> Call:
    """Dequantize with bitsandbytes into memory that is there. On the CPU it has no ``out=``: call its C function."""
    assert PEER is not None
    lib, name = PEER.cextension.lib, NAMES[x.dtype]
    address = ctypes.c_void_p
    size, count = ctypes.c_longlong(blocksize), ctypes.c_longlong(x.numel())
    if work.kind == "dynamic":
        codes, state = PEER.functional.quantize_blockwise(x, blocksize=blocksize)
        function = getattr(lib, f"cdequantize_blockwise_cpu_{name}")
        pointers = [address(t.data_ptr()) for t in (state.code, codes, state.absmax, out)]
        return lambda: (function(*pointers, size, count), codes, state)
    packed, state = PEER.functional.quantize_4bit(x, blocksize=blocksize, quant_type=work.kind)
    function = getattr(lib, f"cdequantize_blockwise_cpu_{work.kind}_{name}")
    pointers = [address(t.data_ptr()) for t in (packed, state.absmax, out)]
    return lambda: (function(*pointers, size, ctypes.c_longlong(1), count), packed, state)


def time_cpu(work: Work, n: int, blocksize: int, dtype: torch.dtype, rate: float, reused: bool) -> Row:
    row = row_of(work, n, blocksize, dtype, rate)
    row["memory"] = "reused" if reused else "fresh"
    x = torch.randn(n).to(dtype)
    if reused:
        out = torch.zeros_like(x)
        calls = [bind(ours, work, x, blocksize, out)]
        peer_calls = [peer_into(work, x, blocksize, out)] if PEER and not work.nested else None
    else:
        calls = [bind(ours, work, x, blocksize)]
        peer_calls = [bind(PEER.functional, work, x, blocksize)] if PEER else None
    us, peer_us = medians(
        [lambda: wall_us(calls, 3), (lambda: wall_us(peer_calls, 1)) if peer_calls else None], min(ROUNDS, 5)
    )
    conclude(row, us, peer_us)
    if work.direction == "quantize":
        judge(row, "times_faster", 5 if work.kind == "dynamic" else 50, "× faster than bitsandbytes", at_least=True)
    elif peer_calls:
        judge(row, "times_faster", 1.0 if reused else 1.5, "× faster than bitsandbytes", at_least=True)
    return row


def cpu_rows(rate: float) -> Iterator[Row]:
    n = 2 ** (ARGS.log2n or 24)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for work in WORKS:
            if ARGS.quick and (work.kind == "fp4" or dtype == torch.float16):
                continue
            for reused in (False, True) if work.direction == "dequantize" else (False,):
                yield time_cpu(work, n, 256 if work.kind == "dynamic" else 64, dtype, rate, reused)


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    rate = copy_rate(DEVICE)
    rows = list(shown(cuda_rows(rate) if DEVICE.type == "cuda" else cpu_rows(rate), time.monotonic()))
    show(f"blockwise on {DEVICE.type}, copy rate {rate / 1e3:.1f} GB/s", rows)
    if not ARGS.quick:
        print("wrote", save("blockwise", DEVICE, rows, copy_gb_per_s=rate / 1e3).name)


if __name__ == "__main__":
    main()
