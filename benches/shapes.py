"""Shapes on a command line. Imports no torch: benches parse their arguments before torch starts its threads."""

from __future__ import annotations


def weight_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``4096x4096,8192x8192`` as pairs."""
    pairs = (item.lower().split("x") for item in text.split(","))
    return tuple((int(n), int(k)) for n, k in pairs)


def counts(text: str) -> tuple[int, ...]:
    """``1,16,512`` as numbers."""
    return tuple(map(int, text.split(",")))
