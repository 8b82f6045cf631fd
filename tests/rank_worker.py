"""One rank: runs the functions that `ranks.Ranks` names, one line of JSON each."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
import traceback
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


def main(rank: int) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        try:
            outcome = (True, run(rank, job, pickle.loads((folder / "args").read_bytes())))
        except BaseException:
            outcome = (False, traceback.format_exc())
        waiting = folder / f"waiting-{rank}"
        waiting.write_bytes(pickle.dumps(outcome))
        waiting.rename(folder / f"result-{rank}")


def run(rank: int, job: dict[str, Any], args: tuple[Any, ...]) -> Any:
    function = attrgetter(job["function"])(load(Path(job["path"])))
    device = torch.device("cpu")
    if job["device"] == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{job['folder']}/store",
        rank=rank,
        world_size=job["world"],
        timeout=timedelta(seconds=job["timeout"]),
    )
    torch.manual_seed(0)
    try:
        return function(device, *args)
    finally:
        if sys.exc_info()[0] is None:
            dist.barrier()  # nobody's connections go while others use them
        dist.destroy_process_group()


def load(path: Path) -> ModuleType:
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(int(sys.argv[1]))
