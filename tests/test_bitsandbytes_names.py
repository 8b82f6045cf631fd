"""Every public name of bitsandbytes, with its arguments."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from test_install_as_bitsandbytes import run

# The package under fewbits' name: what it holds without any effect on the process.
_WHERE = "fewbits.compat.bitsandbytes"


def read_table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    module = ""
    for line in (Path(__file__).parent / "bitsandbytes_api.txt").read_text().splitlines():
        if line.startswith("    "):
            name, _, arguments = line.strip().partition(" ")
            table[module][name] = arguments
        elif not line.startswith("#"):
            module = line
            table[module] = {}
    return table


TABLE = read_table()


def arguments(function: Any) -> str:
    """Return the arguments that bitsandbytes has too: fewbits may add some by keyword."""
    text, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            text.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        text.append(stars + p.name + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"({', '.join(text)})"


def is_extension(expected: str, got: str) -> bool:
    """Return whether `got` takes all calls that `expected` takes: the same arguments, and more after them."""
    if got == expected:
        return True
    known, more = expected.strip("()"), got.strip("()")
    if known.endswith("**kwargs"):
        return False
    rest = more.removeprefix(f"{known}, " if known else "")
    # What comes after has a default, or is by keyword.
    return rest != more and all("=" in part or part.startswith("*") for part in rest.split(", "))


@pytest.mark.parametrize("module", TABLE)
def test_names(module: str) -> None:
    found: Any = importlib.import_module(module.replace("bitsandbytes", _WHERE, 1))
    wrong = []
    for name, expected in TABLE[module].items():
        value = found
        try:
            for part in name.split("."):
                value = getattr(value, part)
        except AttributeError:
            wrong.append(f"{name}: missing")
            continue
        if expected and not is_extension(expected, got := arguments(value)):
            wrong.append(f"{name}: expected {expected}, got {got}")
    assert not wrong, "\n".join(wrong)


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 20
    assert sum(map(len, TABLE.values())) > 330
    assert "compress_statistics=True" in TABLE["bitsandbytes.nn.modules"]["Linear4bit"]


def test_is_extension() -> None:
    assert is_extension("(a, b=1)", "(a, b=1, c=2)")
    assert is_extension("(a)", "(a, *, c=2)")
    assert is_extension("(a)", "(a, **options)")
    assert not is_extension("(a, b=1)", "(a, b=2)")
    assert not is_extension("(a)", "(a, c)")
    assert not is_extension("(a, **kwargs)", "(a, b=1, **kwargs)")


def test_looking_at_the_names_has_no_effect() -> None:
    run(
        f"""
        import importlib, sys, torch
        import fewbits.optim
        importlib.import_module({_WHERE!r})
        assert "bitsandbytes" not in sys.modules
        assert str(fewbits.optim.AdamW) == "<class 'fewbits.optim.adamw.AdamW'>"
        assert not hasattr(torch.ops.bitsandbytes, "gemm_4bit")
        """
    )
