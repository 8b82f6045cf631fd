"""The pages of the documentation as what they are: programs and commands that must run.

Every ``python`` block of a page runs, all in one process and in order. Of ``sh`` and ``console`` blocks every command
runs; ``console`` shows its output too, which must be what comes. A comment before a block, ``<!-- needs: cuda -->`` or
``<!-- needs: transformers -->``, says where it can run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts),
]
NEEDS = ("cuda", "transformers")
RUN = ("python", "sh", "console")
SHOWN = ("text", "{include}", "{toctree}", "{eval-rst}")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what it needs, or an empty string."""

    language: str
    text: str
    needs: str

    @property
    def commands(self) -> list[tuple[list[str], str | None]]:
        """The words of each command, and the output that it is shown with."""
        if self.language == "sh":
            return [(shlex.split(line, comments=True), None) for line in self.text.splitlines() if line]
        parts = re.split(r"^\$ (.*)\n", self.text, flags=re.MULTILINE)
        assert not parts[0], f"a console block begins with a command, got {parts[0]!r}"
        return [(shlex.split(command), output) for command, output in zip(parts[1::2], parts[2::2], strict=True)]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found = re.findall(
        r"(?:^<!-- needs: (\w+) -->\n)?^```(\S*)[^\n]*\n(.*?)^```$",
        (ROOT / page).read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(language, text, needs) for needs, language, text in found]


def runnable(page: str, languages: Collection[str], available: Collection[str]) -> list[Block]:
    """Return the blocks of a page that run with what is available."""
    return [b for b in blocks(page) if b.language in languages and (not b.needs or b.needs in available)]


def environment() -> dict[str, str]:
    """Return variables for a process that imports what this one does; a terminal of 100 columns."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "100"}


def run_python(page: str, available: Collection[str], folder: Path) -> None:
    """Run the page's program in a process of its own: some of it lets fewbits stand in for bitsandbytes."""
    program = "\n".join(block.text for block in runnable(page, ["python"], available))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment(), cwd=folder
    )
    assert done.returncode == 0, f"{page}\n{done.stderr}"


def _check_script(script: str, options: list[str]) -> None:
    """Check that an example exists and has these options: ``make examples`` runs it."""
    sources = [ROOT / script, ROOT / "examples" / "support.py"]
    for option in options:
        if option.startswith("--"):
            assert any(f'"{option}"' in source.read_text() for source in sources), f"{script} has no {option}"


def run_commands(page: str, available: Collection[str], folder: Path, python: Path) -> None:
    """Run the page's commands with an interpreter whose environment they may change."""
    for block in runnable(page, ["sh", "console"], available):
        for words, output in block.commands:
            script = next((i for i, word in enumerate(words) if word.startswith("examples/")), None)
            if words[0] in ("python", "torchrun") and script is not None:
                _check_script(words[script], words[script + 1 :])
                continue
            assert words[0] == "fewbits" or words[:2] == ["python", "-m"], f"{page}: nobody knows how to run {words}"
            arguments = ["-m", *words] if words[0] == "fewbits" else words[1:]
            env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
            done = subprocess.run(
                [python, *arguments], capture_output=True, text=True, check=False, env=env, cwd=folder
            )
            assert done.returncode == 0, f"{page}: {words}\n{done.stdout}{done.stderr}"
            if output is not None:
                shown = [line.rstrip() for line in done.stdout.splitlines()]
                assert shown == [line.rstrip() for line in output.splitlines()], f"{page}: {words}\n{done.stdout}"
