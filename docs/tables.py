"""The tables of the documentation that are made, not written: from the outcomes of the tests, and from one data file.

Called by ``conf.py``. A cell that ``tests/compatibility.py`` claims and no passed test proves raises `UnprovedError`,
which stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from compatibility import FEATURES, WORKFLOWS, Feature, Proof
from outcomes import DTYPES, Outcomes, count, read_report

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RECORD = ROOT / "benches" / "results" / "cuda-outcomes.json"
BY_HAND = "○"  # the test is there, and ran on a GPU by hand: no record of its own outcome is kept
TITLES = {
    "cpu": "CPU, native code",
    "cuda": "CUDA, native code",
    "portable": "Plain torch operations (any other device), run on the CPU",
}


class UnprovedError(Exception):
    """A claim of ``tests/compatibility.py`` without its proof."""


def load_outcomes(folder: Path) -> dict[str, Outcomes]:
    """Read the reports of a run of CI, and the record of the GPU where one is kept."""
    found: dict[str, Outcomes] = {}
    for name in ("cpu", "portable", "hf4", "hf5"):
        path = folder / f"{name}.xml"
        if not path.exists():
            raise UnprovedError(f"{path} is missing: run `make test test-portable test-hf` first")
        found[name] = read_report(path)
    if RECORD.exists():
        found["cuda"] = json.loads(RECORD.read_text())["outcomes"]
    return found


def _prove(outcomes: dict[str, Outcomes], proof: Proof, device: str, dtype: str | None) -> int | str:
    """Return how many tests passed."""
    if dtype is not None and proof.dtypes:
        if dtype not in proof.dtypes:
            raise UnprovedError(f"{proof.test} does not try {dtype}")
        dtype = None  # tried within the test: its ids do not name it
    # The portable run is on the CPU. A test for CUDA is skipped there, but has to be there.
    run, place = ("cpu", "cuda") if device == "cuda" and "cuda" not in outcomes else (device, device)
    passed, failed, skipped = count(outcomes[run], proof.test, "cpu" if device == "portable" else place, dtype)
    where = f"{proof.test} on {device}" + (f" in {dtype}" if dtype else "")
    if failed:
        raise UnprovedError(f"{where}: {failed} failed")
    if run != device:
        if not skipped:
            raise UnprovedError(f"{where}: no such test")
        return BY_HAND
    if not passed:
        raise UnprovedError(f"{where}: none passed, {skipped} were skipped")
    return passed


def _cell(outcomes: dict[str, Outcomes], wanted: Sequence[Proof], device: str, dtype: str | None = None) -> str:
    if not wanted:
        return ""
    results = [_prove(outcomes, proof, device, dtype) for proof in wanted]
    numbers = [result for result in results if isinstance(result, int)]
    return f"✓ {sum(numbers)}" if len(numbers) == len(results) else BY_HAND


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    headings = list(headings)
    return [
        "| " + " | ".join(headings) + " |",
        "|---|" + ":-:|" * (len(headings) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _row(outcomes: dict[str, Outcomes], feature: Feature, device: str) -> list[str]:
    values = [_cell(outcomes, feature.values, device, d) if d in feature.dtypes else "" for d in DTYPES]
    cells = [feature.name, *values, _cell(outcomes, feature.compiled, device)]
    return [*cells, _cell(outcomes, feature.captured, device)] if device == "cuda" else cells


def compatibility(outcomes: dict[str, Outcomes]) -> str:
    """Render the tables of features, and the list of the tests behind them."""
    lines = []
    for device, title in TITLES.items():
        lines += [f"### {title}", ""]
        if device == "cuda" and "cuda" in outcomes:
            lines += [f"Run by hand: {json.loads(RECORD.read_text())['where']}.", ""]
        graph = ["CUDA graph"] if device == "cuda" else []
        rows = [_row(outcomes, feature, device) for feature in FEATURES if device in feature.devices]
        lines += _table(["", *DTYPES, "torch.compile", *graph], rows)
    lines += ["### The tests behind each row", ""]
    for feature in FEATURES:
        tests = dict.fromkeys(p.test for p in (*feature.values, *feature.compiled, *feature.captured))
        lines.append(f"- {feature.name}: {', '.join(f'`{test}`' for test in tests)}")
    return "\n".join([*lines, ""])


def _versions(group: str) -> str:
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(rf"^{group} = \[(.*)\]$", text, re.MULTILINE)
    return ", ".join(re.sub("==", " ", name) for name in re.findall(r'"([^"]*)"', listed) if "datasets" not in name)


def workflows(outcomes: dict[str, Outcomes]) -> str:
    """Render the table of what runs with Hugging Face's libraries."""
    sets = ("hf4", "hf5")
    rows = []
    for name, test, where in WORKFLOWS:
        cells = []
        for group in sets:
            passed, failed, _ = count(outcomes[group], test, "cpu")
            if group in where and (failed or not passed):
                raise UnprovedError(f"{test} with {group}: {passed} passed, {failed} failed")
            cells.append(f"✓ {passed}" if group in where else "")
        rows.append([name, *cells])
    return "\n".join(_table(["", *map(_versions, sets)], rows))


def peer_tests() -> str:
    """Render how bitsandbytes' own tests fare, from ``bitsandbytes-tests.json``: passed and failed, by device."""
    data = json.loads((DOCS / "bitsandbytes-tests.json").read_text())
    runs = [data["cpu"], data["cuda"]]
    rows = [[f"`{name}`", *(str(count) for run in runs for count in run.get(name, ("", "")))] for name in data["cpu"]]
    totals = [str(sum(counts)) for run in runs for counts in zip(*run.values(), strict=True)]
    headings = ["file", "CPU: passed", "failed", "H200: passed", "failed"]
    return "\n".join([f"{data['what']}:", "", *_table(headings, [*rows, ["all", *totals]])])


def write_all(folder: Path, outcomes: dict[str, Outcomes] | None) -> None:
    """Write every table for the pages to include; without outcomes, say so in their place."""
    folder.mkdir(exist_ok=True)
    missing = "*This draft was built without the outcomes of the tests.*\n"
    (folder / "compatibility.md").write_text(missing if outcomes is None else compatibility(outcomes))
    (folder / "workflows.md").write_text(missing if outcomes is None else workflows(outcomes))
    (folder / "bitsandbytes-tests.md").write_text(peer_tests())
