"""Functions run on several ranks: processes that stay for the session, and a process group for each call.

``ranks(2, function, ...)`` runs a function of a test module on two processes, each of which gets its rank, and returns
what they returned. A rank that fails is reported with its traceback; one that hangs or dies takes the others with it,
and the next call begins with fresh ones.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 120.0
_GRACE = 3.0  # for the others, when one has failed: they may be about to say why


class RankError(AssertionError):
    """What went wrong on which rank."""


class Ranks:
    """Processes that wait for functions to run, on one kind of device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.processes: list[subprocess.Popen[str]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.calls = 0

    def __call__(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Return what the ranks returned, in order.

        Raises
        ------
        RankError
            With the traceback of each rank that failed.
        """
        __tracebackhide__ = True
        results = self.outcomes(world, function, *args, timeout=timeout)
        failures = [f"rank {rank}: {what}" for rank, (good, what) in enumerate(results) if not good]
        if failures:
            raise RankError("\n".join(failures))
        return [what for _, what in results]

    def outcomes(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[tuple[bool, Any]]:
        """Return for each rank whether it succeeded, and its result or its traceback."""
        if self.device == "cuda" and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs")
        self._start(world)
        self.calls += 1
        folder = self.folder / str(self.calls)
        folder.mkdir()
        job = {"folder": str(folder), "world": world, "device": self.device, "timeout": timeout}
        job |= {"path": sys.modules[function.__module__].__file__, "function": function.__qualname__}
        (folder / "args").write_bytes(pickle.dumps(args))
        for process in self.processes[:world]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        return self._collect(world, folder, time.monotonic() + timeout)

    def _start(self, world: int) -> None:
        if any(process.poll() is not None for process in self.processes):
            self.stop()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        for rank in range(len(self.processes), world):
            log = (self.folder / f"log-{rank}").open("w")
            command = [sys.executable, str(Path(__file__).with_name("rank_worker.py")), str(rank)]
            with log:
                self.processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, text=True)
                )

    def _collect(self, world: int, folder: Path, deadline: float) -> list[tuple[bool, Any]]:
        results: dict[int, tuple[bool, Any]] = {}
        while len(results) < world:
            for rank in set(range(world)) - set(results):
                path = folder / f"result-{rank}"
                if path.exists():
                    results[rank] = pickle.loads(path.read_bytes())
                elif (code := self.processes[rank].poll()) is not None:
                    log = (self.folder / f"log-{rank}").read_text()[-3000:]
                    results[rank] = (False, f"exited with {code}\n{log}")
                else:
                    continue
                if not results[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
            if len(results) < world and time.monotonic() > deadline:
                for rank in set(range(world)) - set(results):
                    results[rank] = (False, "did not come back")
            time.sleep(0.005)
        if not all(good for good, _ in results.values()):
            self.stop()  # collectives that never end, groups in disorder
        return [results[rank] for rank in range(world)]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self.processes = []

    def close(self) -> None:
        """End the processes and remove their files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
