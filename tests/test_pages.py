"""The code of README and documentation runs, and the commands that they and CONTRIBUTING name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from checkpoint_files import write_checkpoint, write_llama_8b
from pages import NEEDS, PAGES, ROOT, RUN, SHOWN, blocks, run_commands, run_python, runnable

HERE = ["cuda"] if torch.cuda.is_available() else []
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def with_blocks(*languages: str) -> list[str]:
    return [page for page in PAGES if runnable(page, languages, HERE)]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page: str, tmp_path: Path) -> None:
    run_python(page, HERE, tmp_path)


@pytest.mark.parametrize("page", with_blocks("sh", "console"))
def test_commands_run(page: str, tmp_path: Path, python: Path) -> None:
    write_checkpoint(tmp_path / "SRC")
    write_llama_8b(tmp_path / "llama-8b")
    run_commands(page, HERE, tmp_path, python)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_shown(page: str) -> None:
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN), block.language
        assert not block.needs or block.needs in NEEDS
    assert (ROOT / page).read_text().count("```") == 2 * len(blocks(page))


def test_pages_have_code() -> None:
    assert {"README.md", "docs/migration.md", "docs/memory.md"} <= set(with_blocks("python"))
    assert {"README.md", "docs/migration.md", "docs/memory.md"} <= set(with_blocks("sh", "console"))


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"(?:^|[ `])make ([a-z][a-z-]*)", (ROOT / page).read_text(), re.MULTILINE))
    assert named <= TARGETS


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        file = target.partition("#")[0]
        assert "://" in target or not file or (ROOT / page).parent.joinpath(file).exists(), f"{page} links to {target}"
