"""The examples of the docstrings, which the documentation shows, run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkpoint_files import write_checkpoint
from pages import environment

# In a process of its own: one example lets fewbits stand in for bitsandbytes. Public modules come first, since one
# of them writes the checkpoint that others read.
PROGRAM = """
import doctest, importlib, pkgutil, sys
import torch
import fewbits

names = [found.name for found in pkgutil.walk_packages(fewbits.__path__, "fewbits.")]
skipped = ("fewbits.compat.bitsandbytes", "fewbits.__main__", "fewbits._native")
attempted = failed = 0
for name in sorted(names, key=lambda name: ("._" in name, name)):
    if not name.startswith(skipped):
        result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
        attempted, failed = attempted + result.attempted, failed + result.failed
assert attempted > 150, attempted
sys.exit(failed)
"""


def test_examples(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
