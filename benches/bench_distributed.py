"""Several GPUs: a QLoRA step with FSDP2 and DDP, what travels and what is kept, decoding with tensor parallelism, 8-bit
AdamW on shards. Llama-8B's layers (70B's for decoding) with random weights in NF4 with double quantization, LoRA of
rank 16.

    torchrun --nproc-per-node 2 benches/bench_distributed.py
    torchrun --nproc-per-node 2 benches/bench_distributed.py --tiny --device cpu

Every figure of several GPUs stands beside that of one GPU, measured in the same run. Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fewbits.optim
from common import Row, captured, judge, medians, save, show, wall_us
from distributed_model import LLAMA_8B, LLAMA_70B, TINY, Model, packed_bytes
from fewbits.distributed import ColwiseParallel, RowwiseParallel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
parser.add_argument("--tiny", action="store_true", help="small models, to try the bench itself; nothing is written")
parser.add_argument("--layers", type=int, default=32, help="with fewer than 32, nothing is written")
parser.add_argument("--rounds", type=int, default=3)
ARGS = parser.parse_args()
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cpu") if ARGS.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
# Of each GPU. With few tokens a step is as long as what travels, or as the host's work; with many, as the products.
BATCHES, TOKENS = ((2,), 32) if ARGS.tiny else ((4, 16), 1024)
PLAN = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}


def milliseconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The slowest rank's time: everybody begins together."""

    def once() -> float:
        dist.barrier()
        return wall_us([call], repeats)

    (us,) = medians([once], ARGS.rounds)
    slowest = torch.tensor([us], dtype=torch.float64, device=DEVICE)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest) / 1e3


def peak(call: Callable[[], object]) -> float:
    """GB at the peak of a call."""
    if DEVICE.type == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def stepper(model: torch.nn.Module, batch: int) -> Callable[[], None]:
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = fewbits.optim.AdamW8bit(adapters, lr=1e-4)
    tokens = torch.randint(0, TINY.vocabulary, (batch, TOKENS), device=DEVICE)
    labels = tokens.roll(-1, 1)

    def step() -> None:
        model(tokens, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


class Traffic:
    """Counts the bytes that all-gathers deliver."""

    def __init__(self) -> None:
        self.bytes = 0
        self.originals: dict[str, Any] = {}

    def __enter__(self) -> Traffic:
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):
                self.originals[name] = getattr(dist, name)
                setattr(dist, name, self._counting(self.originals[name]))
        return self

    def _counting(self, original: Any) -> Any:
        def gather(*args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else kwargs.get("output_tensor", kwargs.get("output"))
            self.bytes += output.nbytes
            return original(*args, **kwargs)

        return gather

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def gathering(n: int) -> Row:
    """The rate at which an all-gather of n bytes delivers what other GPUs hold."""
    mine = torch.zeros(n // WORLD, dtype=torch.uint8, device=DEVICE)
    whole = torch.empty(mine.numel() * WORLD, dtype=torch.uint8, device=DEVICE)
    ms = milliseconds(lambda: dist.all_gather_into_tensor(whole, mine), 10)
    return {"work": f"all-gather of {n / 1e6:.0f} MB, GB/s from others", "value": mine.numel() * (WORLD - 1) / ms / 1e6}


def shard(model: Model) -> None:
    """FSDP2, a layer at a time."""
    for unit in (model.embedding, *model.layers):
        fully_shard(unit)
    fully_shard(model.head, reshard_after_forward=False)  # the backward pass begins with it
    fully_shard(model)
    # By default the first layer would fetch the embedding for a backward pass that the frozen table does not have.
    model.layers[0].set_modules_to_backward_prefetch([model.layers[0]])
    for layer, following in zip(model.layers, [*model.layers[1:], model.head], strict=True):
        layer.set_modules_to_forward_prefetch([following])
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def training() -> list[Row]:
    torch.manual_seed(0)
    shape = TINY if ARGS.tiny else LLAMA_8B
    if not ARGS.tiny and ARGS.layers != shape.layers:
        shape = type(shape)(**{**shape.__dict__, "layers": ARGS.layers})
    model = Model(shape, DEVICE)
    packed, everything = packed_bytes(model)
    rows = [gathering(packed // shape.layers)]
    whole_batch = {batch: milliseconds(stepper(model, batch * WORLD)) for batch in BATCHES}
    part = {batch: milliseconds(stepper(model, batch)) for batch in BATCHES}
    part_peak = peak(stepper(model, BATCHES[0]))

    ddp = DistributedDataParallel(model, device_ids=[DEVICE.index] if DEVICE.type == "cuda" else None)
    for batch in BATCHES:
        ms = milliseconds(stepper(ddp, batch))
        row: Row = {
            "work": f"{work_of(batch)}, DDP: ms",
            "value": ms,
            "one_gpu": part[batch],
            "ratio": part[batch] / ms,
        }
        rows.append(judge(row, "ratio", 0.95, "scaling", at_least=True))
    del ddp
    for p in model.parameters():
        p.grad = None

    shard(model)
    for batch in BATCHES:
        step = stepper(model, batch)
        ms = milliseconds(step)
        row = {"work": f"{work_of(batch)}, FSDP2: ms", "value": ms, "one_gpu": whole_batch[batch]}
        row["ratio"] = ms * WORLD / whole_batch[batch]
        rows.append(judge(row, "ratio", 1.15, "× one GPU's time / GPUs"))
        if batch == BATCHES[0]:
            limit = packed / WORLD / 1e9 + part_peak - packed / 1e9
            row = {"work": f"{work_of(batch)}, FSDP2: peak GB", "value": peak(step), "one_gpu": part_peak}
            rows.append(judge(row, "value", round(limit, 3), "GB") if DEVICE.type == "cuda" else row)
    with Traffic() as traffic, torch.no_grad():
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=DEVICE)
        model.reshard()  # type: ignore[operator]
        model(tokens, tokens)
    row = {"work": "bytes gathered for a forward pass, GB", "value": traffic.bytes / 1e9, "one_gpu": everything / 1e9}
    row["ratio"] = traffic.bytes / everything
    rows.append(judge(row, "ratio", 1.03, "× packed weights and scales"))
    return rows


def work_of(batch: int) -> str:
    return f"QLoRA step, {batch} x {TOKENS} tokens a GPU"


def decoding() -> list[Row]:
    """A token through some layers of 70B's shape, with a cache of 256 tokens: latencies, by CUDA graph and eager."""
    shape = TINY if ARGS.tiny else LLAMA_70B
    torch.manual_seed(0)
    model = Model(shape, DEVICE, rank=0)
    x = torch.randn(1, 1, shape.hidden, dtype=torch.bfloat16, device=DEVICE)

    def token(heads: int) -> Callable[[], None]:
        cache = torch.randn(2, 1, heads, 256, shape.head, dtype=torch.bfloat16, device=DEVICE)

        def run() -> None:
            h = x
            for layer in model.layers:
                h = layer(h, cache)

        return run

    figures: dict[str, list[float]] = {}
    for count in (1, WORLD):
        if count > 1:
            if shape.cached_heads % WORLD:
                return []
            mesh = init_device_mesh(DEVICE.type, (WORLD,))
            for layer in model.layers:
                styles = {f"{name}.base": (ColwiseParallel, RowwiseParallel)[dim]() for name, dim in PLAN.items()}
                parallelize_module(layer, mesh, styles)
        with torch.no_grad():
            run = token(shape.cached_heads // count)
            figures.setdefault("eager", []).append(milliseconds(run, 20))
            if DEVICE.type == "cuda":
                figures.setdefault("CUDA graph", []).append(milliseconds(captured(run), 50))
    rows = []
    for way, (alone, together) in figures.items():
        work = f"decode, batch 1, {shape.layers} layers, tensor parallel, {way}: ms"
        row: Row = {"work": work, "value": together, "one_gpu": alone, "ratio": together / alone}
        rows.append(judge(row, "ratio", 1.0, "× one GPU"))
    return rows


def optimizing() -> list[Row]:
    """8-bit AdamW: the time of as many elements in shards as in whole tensors."""
    n, k, count = (64, 256, 2) if ARGS.tiny else (14336, 4096, 8)
    mesh = init_device_mesh(DEVICE.type, (WORLD,))
    whole = [torch.nn.Parameter(torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)) for _ in range(count)]
    zeros = torch.zeros(n * WORLD, k, device=DEVICE, dtype=torch.bfloat16)
    shards = [torch.nn.Parameter(distribute_tensor(zeros.clone(), mesh, [Shard(0)])) for _ in range(count)]
    times = []
    for params in (whole, shards):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = fewbits.optim.AdamW8bit(params)
        optimizer.step()
        times.append(milliseconds(optimizer.step, 10))
        del optimizer
    row: Row = {"work": f"AdamW8bit, {count} x {n} x {k} elements a GPU, in shards: ms", "value": times[1]}
    row |= {"one_gpu": times[0], "ratio": times[1] / times[0]}
    return [judge(row, "ratio", 1.05, "× whole tensors")]


def main() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo" if DEVICE.type == "cpu" else "nccl")
    rows: list[Row] = []
    for part in (training, decoding, optimizing):
        rows += part()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        if RANK == 0:
            show(f"{WORLD} x {DEVICE.type}: {part.__name__}", rows)
    if RANK == 0 and not ARGS.tiny and ARGS.layers == 32:
        print("wrote", save(f"distributed-{WORLD}", DEVICE, rows).name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
