"""The README's code runs, and the commands that it and CONTRIBUTING name exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_python_runs() -> None:
    code = blocks("python")
    assert code
    # In a process of its own: one example lets fewbits stand in for bitsandbytes.
    program = "\n".join([*code, "assert x.grad is not None"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path for path in sys.path if path])}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr


def test_shell_commands_exist() -> None:
    commands = re.findall(r"^fewbits (\w+)((?: +[^#\n]*)?)", "\n".join(blocks("sh")), re.MULTILINE)
    assert commands
    for name, rest in commands:
        run = subprocess.run(
            [sys.executable, "-m", "fewbits", name, "--help"], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        for option in re.findall(r"--[\w-]+", rest):
            assert option in run.stdout, f"fewbits {name} has no {option}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|[ `])make ([a-z][a-z-]*)", (ROOT / page).read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (ROOT / target).exists(), f"{page} links to {target}"
