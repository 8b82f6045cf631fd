"""Render ``results/*.json`` as ``results/README.md``: every row at a glance, and every missed target by name.

python benches/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS, cell

HEADINGS = {
    "work": "work",
    "dtype": "dtype",
    "m": "M",
    "elements": "elements",
    "blocksize": "block size",
    "memory": "memory",
    "us": "µs",
    "value": "ours",
    "one_gpu": "one GPU",
    "bf16": "bf16",
    "bitsandbytes": "bitsandbytes",
    "floor_us": "floor µs",
    "x_floor": "× floor",
    "x_bf16": "× bf16",
    "dense_us": "F.linear µs",
    "x_dense": "× F.linear",
    "over_dense": "× dense",
    "torch_us": "torch fused µs",
    "x_torch": "× torch fused",
    "unpaged_us": "unpaged µs",
    "x_unpaged": "× unpaged",
    "bitsandbytes_us": "bitsandbytes µs",
    "bitsandbytes_plain_us": "bitsandbytes, dequantizing, µs",
    "times_faster": "× faster",
    "over_peer": "× bitsandbytes",
    "ratio": "ratio",
    "over_plain": "× plain",
    "wall_us": "wall µs",
    "bitsandbytes_wall_us": "bitsandbytes wall µs",
    "slower_by": "worst ratio",
    "target": "target",
    "met": "met",
}
NOTES = RESULTS / "notes.json"  # why a target is missed: {"blockwise-cuda": {"work, dtype, ..." or "work": "reason"}}
OUTCOMES = RESULTS / "cuda-outcomes.json"  # of tests, for the documentation


def elements(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else f"{n:,}"


def identity(row: dict[str, Any]) -> str:
    """What names a row: the work and its sizes."""
    parts = [row["work"], row.get("dtype"), f"M {row['m']}" if "m" in row else None, row.get("memory")]
    if "elements" in row:
        parts += [elements(row["elements"]), f"bs {row['blocksize']}"]
    return ", ".join(p for p in parts if p)


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = [key for key in HEADINGS if any(key in row for row in rows)]

    def text(row: dict[str, Any], key: str) -> str:
        if key == "met":
            return {True: "yes", False: "**no**", None: ""}[row.get("met")]
        if key == "elements":
            return elements(row[key])
        return cell(row.get(key))

    return [
        "| " + " | ".join(HEADINGS[c] for c in columns) + " |",
        "|" + "|".join("---" if c in ("work", "dtype", "memory", "target", "met") else "--:" for c in columns) + "|",
        *("| " + " | ".join(text(row, c) for c in columns) + " |" for row in rows),
    ]


def section(path: Path, reasons: dict[str, str]) -> list[str]:
    content = json.loads(path.read_text())
    facts = dict(content["environment"])
    facts |= {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in content.items()
        if key not in ("environment", "rows")
    }
    lines = [f"## {path.stem}", "", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in facts.items() if v), ""]
    misses = [row for row in content["rows"] if row.get("met") is False]
    judged = [row for row in content["rows"] if row.get("met") is not None]
    if judged:
        lines += [f"{len(judged) - len(misses)} of {len(judged)} targets met.", ""]
    for row in misses:
        reason = reasons.get(identity(row), reasons.get(row["work"]))
        lines.append(f"- missed: {identity(row)} (target {row['target']}){f': {reason}' if reason else ''}")
    return [*lines, *([""] if misses else []), *table(content["rows"]), ""]


def main() -> None:
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    files = sorted(path for path in RESULTS.glob("*.json") if path not in (NOTES, OUTCOMES))
    lines = [
        "# Bench results",
        "",
        "Written by `python benches/report.py` from the files beside it; the benches write those. Floor: the bytes",
        "that must move over the copy rate measured in the same run, or for products the flops over the matmul rate,",
        "whichever takes longer. Times hold for the machine named.",
        "",
    ]
    for path in files:
        lines += section(path, notes.get(path.stem, {}))
    for path in sorted(RESULTS.glob("*.md")):
        if path.name != "README.md":
            lines += [path.read_text()]
    if not files:
        lines += ["No results yet: run `make bench` (CPU) or `make bench DEVICE=cuda`.", ""]
    (RESULTS / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
