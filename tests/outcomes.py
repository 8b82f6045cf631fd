"""What became of the tests: read from the reports of pytest, and kept for a device that CI does not have.

``make test``, ``make test-portable`` and ``make test-hf`` leave ``cpu.xml``, ``portable.xml``, ``hf4.xml`` and
``hf5.xml`` in ``dist/outcomes``. On a GPU::

    cd tests && python -m pytest -m cuda --junit-xml=cuda.xml
    python outcomes.py cuda.xml "NVIDIA H200, torch 2.11.0, commit 1234567" > ../benches/results/cuda-outcomes.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")

# By test function ("test_matmul4.py::test_gemv"), by the devices and dtypes that the ids name ("cpu float32"):
# how many passed, failed and were skipped.
Outcomes = Mapping[str, Mapping[str, tuple[int, int, int]]]


def read_report(path: Path) -> Outcomes:
    """Read a report that ``pytest --junit-xml`` wrote."""
    found: dict[str, dict[str, list[int]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        function, _, parameters = case.get("name", "").partition("[")
        # Modules that could not be imported, or were skipped as a whole, are cases without a class.
        module = case.get("classname", "").rpartition(".")[2] or "collection"
        words = set(re.split(r"[-\]]", parameters))
        key = " ".join(word for word in (*DEVICES, *DTYPES) if word in words)
        counts = found.setdefault(f"{module}.py::{function}", {}).setdefault(key, [0, 0, 0])
        states = {child.tag for child in case}
        counts[1 if states & {"failure", "error"} else 2 if "skipped" in states else 0] += 1
    return {test: {key: (c[0], c[1], c[2]) for key, c in keys.items()} for test, keys in found.items()}


def count(outcomes: Outcomes, test: str, device: str, dtype: str | None = None) -> tuple[int, int, int]:
    """Add up a test's outcomes on a device, where ids name one, and with a dtype, if one is asked for."""
    total = [0, 0, 0]
    for key, counts in outcomes.get(test, {}).items():
        words = key.split()
        on_device = device in words or not set(words) & set(DEVICES)
        if on_device and (dtype is None or dtype in words):
            total = [a + b for a, b in zip(total, counts, strict=True)]
    return total[0], total[1], total[2]


def main() -> None:
    """Print a report as the record that is kept in the repository."""
    path, where = sys.argv[1:]
    # A line a test: changes can be read.
    lines = (f"  {json.dumps(test)}: {json.dumps(counts)}" for test, counts in sorted(read_report(Path(path)).items()))
    print(f'{{"where": {json.dumps(where)}, "outcomes": {{\n' + ",\n".join(lines) + "\n}}")


if __name__ == "__main__":
    main()
