"""What the benches share: clocks, the copy rate, the peer, and the shape of a results file.

Absolute times hold for one machine. Every bench therefore measures its floor (bytes moved over the copy rate), the peer
and ours in one run, and says ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fewbits

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Call = Callable[[], object]


def bitsandbytes() -> ModuleType | None:
    """The peer, or None where it is not installed."""
    try:
        return import_module("bitsandbytes")
    except ImportError:
        return None


# ---- clocks --------------------------------------------------------------------------------------------------------


def cuda_us(calls: Sequence[Call], launches: int) -> float:
    """Device time of one call. The launches queue up behind a sleeping kernel, so that the host is not timed.

    Where the kernel woke up before the last launch was queued, all is done again behind one that sleeps twice as long;
    not for ever: a call that waits for the device itself always finds it awake, and its time is what passes.
    """
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for doublings in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(150_000 * launches << doublings)
        start.record()
        for i in range(launches):
            calls[i % len(calls)]()
        stop.record()
        overtaken = start.query()
        stop.synchronize()
        if not overtaken:
            break
    return start.elapsed_time(stop) * 1e3 / launches


def wall_us(calls: Sequence[Call], repeats: int) -> float:
    """Time of one call on the host's clock, from the first call to the end of all work."""
    synchronize()
    start = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    synchronize()
    return (time.perf_counter() - start) * 1e6 / repeats


def host_us(call: Call, repeats: int) -> float:
    """Time until the call returns; what it queued on the GPU is not waited for."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed * 1e6 / repeats


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of a step, which is warmed up before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def medians(timers: Sequence[Callable[[], float] | None], rounds: int = 7) -> list[float | None]:
    """Medians of several timers, taken in turn so that a drifting machine hits all alike; round one is dropped.

    The threads of an OpenMP library go on spinning for a while after its work is done and would take a core from
    whoever comes next, so on the CPU each timer starts after a pause.
    """
    pause = 0.0 if torch.cuda.is_initialized() else 0.02
    samples: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds + 1):
        for sample, timer in zip(samples, timers, strict=True):
            if timer is not None:
                time.sleep(pause)
                value = timer()
                if turn:
                    sample.append(value)
    return [statistics.median(sample) if sample else None for sample in samples]


def copy_rate(device: torch.device) -> float:
    """Bytes a microsecond, read and written, of a large ``copy_`` into memory that is already there."""
    count = 2**28 if device.type == "cuda" else 2**26
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)]
    timer = (lambda: cuda_us(calls, 20)) if device.type == "cuda" else (lambda: wall_us(calls, 3))
    (microseconds,) = medians([timer])
    assert microseconds is not None
    return 2 * count / microseconds


# ---- results -------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> Row:
    """Where and with what the rows were measured."""
    return {
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "fewbits": fewbits.__version__,
        "bitsandbytes": metadata.version("bitsandbytes") if bitsandbytes() else None,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _commit() -> str:
    """``FEWBITS_COMMIT``, else what git says; ``+`` marks a tree with uncommitted changes."""
    if commit := os.environ.get("FEWBITS_COMMIT"):
        return commit
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    run = subprocess.run(git, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def judge(row: Row, key: str, limit: float, unit: str, *, at_least: bool = False) -> Row:
    """Hold one figure of a row against its target. A row without the figure (no peer) has a target and no verdict."""
    value = row.get(key)
    row["target"] = f"{'≥' if at_least else '≤'} {limit:g} {unit}"
    row["met"] = None if value is None else bool(value >= limit if at_least else value <= limit)
    return row


def save(name: str, device: torch.device, rows: list[Row], **facts: object) -> Path:
    """Write ``results/<name>-<device type>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device.type}.json"
    content = {"environment": environment(device), **facts, "rows": [_rounded(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _rounded(row: Row) -> Row:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items() if v is not None}


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table; a missed target is red."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "met"))
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right" if column.endswith(("us", "floor")) else "left")
    for row in rows:
        style = "red" if row.get("met") is False else None
        table.add_row(*(cell(row.get(column)) for column in columns), style=style)
    Console(width=None if os.isatty(1) else 160).print(table)


def cell(value: object) -> str:
    """One figure as it is shown to a person: three digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)
