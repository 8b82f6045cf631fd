"""What a call costs the host: tiny tensors, where nothing but overhead is left; import and first call.

python benches/bench_host.py --device cuda
python benches/bench_host.py --device cpu
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import torch

import fewbits
import fewbits.functional
import fewbits.nn
from common import Row, bitsandbytes, host_us, judge, medians, save, show

# Targets in microseconds on CUDA; the other calls are to be no slower than bitsandbytes.
CUDA_LIMITS = {"quantize_4bit": 14.0, "dequantize_4bit": 9.0}

IMPORT = "import time, torch; start = time.perf_counter(); import {library}; print(time.perf_counter() - start)"
FIRST_CALL = """
import time, torch, {library}
x = torch.randn(4096, device={device!r})
if x.is_cuda: torch.cuda.synchronize()
start = time.perf_counter()
{library}.functional.quantize_4bit(x, quant_type="nf4")
if x.is_cuda: torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def operations(library: ModuleType, device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls, on 64 × 64 bfloat16. Both libraries answer the same signatures."""
    functional = library.functional
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(x, quant_type="nf4")
    nested_packed, nested = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    codes, state8 = functional.quantize_blockwise(x, blocksize=256)
    linear = library.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear = linear.to(device).eval()
    if linear.weight.quant_state is None:  # the peer quantizes on the CPU only when told
        linear.weight = linear.weight._quantize(device)
    token = torch.randn(1, 64, device=device, dtype=torch.bfloat16)
    return {
        "quantize_4bit": lambda: functional.quantize_4bit(x, quant_type="nf4"),
        "quantize_4bit, double": lambda: functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True),
        "dequantize_4bit": lambda: functional.dequantize_4bit(packed, state),
        "dequantize_4bit, double": lambda: functional.dequantize_4bit(nested_packed, nested),
        "quantize_blockwise": lambda: functional.quantize_blockwise(x, blocksize=256),
        "dequantize_blockwise": lambda: functional.dequantize_blockwise(codes, state8),
        "Linear4bit": lambda: linear(token),
    }


def call_rows(device: torch.device, peer: ModuleType | None) -> list[Row]:
    mine = operations(fewbits, device)
    theirs = operations(peer, device) if peer else {}
    rows = []
    for name, call in mine.items():
        other = theirs.get(name)
        us, peer_us = medians([lambda c=call: host_us(c, 300), (lambda c=other: host_us(c, 300)) if other else None])
        row: Row = {"work": name, "us": us, "bitsandbytes_us": peer_us, "ratio": us / peer_us if peer_us else None}
        if device.type == "cuda" and name in CUDA_LIMITS:
            judge(row, "us", CUDA_LIMITS[name], "µs")
        else:
            judge(row, "ratio", 1.0, "× bitsandbytes")
        rows.append(row)
    weight, token = (torch.randn(m, 64, device=device, dtype=torch.bfloat16) for m in (64, 1))
    (us,) = medians([lambda: host_us(lambda: torch.nn.functional.linear(token, weight), 300)])
    return [*rows, {"work": "torch F.linear, for scale", "us": us}]


def process_us(program: str, warm: bool, runs: int = 2) -> float:
    """Median of what fresh processes print, seconds to microseconds; one more before warms the file cache, if asked."""
    command = [sys.executable, "-c", program]
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        for _ in range(runs + warm)
    ]
    return statistics.median(times[warm:]) * 1e6


def process_rows(device: torch.device, peer: ModuleType | None) -> list[Row]:
    rows = []
    for name, program, limit in (
        ("import, torch loaded", IMPORT, 150_000.0),
        ("first quantize_4bit", FIRST_CALL, 5_000.0),
    ):
        warm = program is IMPORT
        us = process_us(program.format(library="fewbits", device=device.type), warm)
        peer_us = process_us(program.format(library="bitsandbytes", device=device.type), warm) if peer else None
        row: Row = {"work": name, "us": us, "bitsandbytes_us": peer_us, "ratio": us / peer_us if peer_us else None}
        rows.append(judge(row, "us", limit, "µs"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    device = torch.device(parser.parse_args().device)
    peer = bitsandbytes()
    with torch.no_grad():
        rows = [*call_rows(device, peer), *process_rows(device, peer)]
    show(f"host time on {device.type}", rows)
    print("wrote", save("host", device, rows).name)


if __name__ == "__main__":
    main()
