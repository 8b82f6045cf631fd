"""The compatibility table names tests that exist, and its makers notice when one does not prove what it should."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from compatibility import FEATURES, WORKFLOWS
from outcomes import count, read_report

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "docs"))

import tables  # noqa: E402

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x[cpu-3-float32]"/>
<testcase classname="tests.test_a" name="test_x[cpu-3-float16]"/>
<testcase classname="tests.test_a" name="test_x[cpu-float16-4]"><failure/></testcase>
<testcase classname="tests.test_a" name="test_x[cuda-3-float32]"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_y"/>
</testsuite></testsuites>"""


def test_tests_exist() -> None:
    named = {p.test for f in FEATURES for p in (*f.values, *f.compiled, *f.captured)} | {w[1] for w in WORKFLOWS}
    for test in named:
        file, _, function = test.partition("::")
        assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE), test


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(REPORT)
    found = read_report(tmp_path / "a.xml")
    assert count(found, "test_a.py::test_x", "cpu") == (2, 1, 0)
    assert count(found, "test_a.py::test_x", "cpu", "float32") == (1, 0, 0)
    assert count(found, "test_a.py::test_x", "cpu", "float16") == (1, 1, 0)
    assert count(found, "test_a.py::test_x", "cuda", "float32") == (0, 0, 1)
    assert count(found, "test_a.py::test_y", "cuda") == count(found, "test_a.py::test_y", "cpu") == (1, 0, 0)
    assert count(found, "test_a.py::test_x", "cpu", "bfloat16") == count(found, "test_b.py::z", "cpu") == (0, 0, 0)


@pytest.mark.parametrize(("change", "message"), [
    ({}, None),
    ({"cpu float32": (1, 1, 0)}, "1 failed"),
    ({"cpu float32": (0, 0, 3)}, "none passed, 3 were skipped"),
    ({"cuda float32": (0, 0, 0)}, "no such test"),
])  # fmt: skip
def test_a_claim_without_proof_is_refused(change: dict[str, tuple[int, int, int]], message: str | None) -> None:
    keys = {f"{d} {t}": (2, 0, 0) if d == "cpu" else (0, 0, 2) for d in ("cpu", "cuda") for t in ("float32", "float16")}
    outcomes = {"cpu": {"a": keys | change}}
    proof = tables.Proof("a")
    if message is None:
        assert tables._prove(outcomes, proof, "cpu", "float16") == 2
        assert tables._prove(outcomes, proof, "cuda", "float32") == tables.BY_HAND
    else:
        with pytest.raises(tables.UnprovedError, match=message):
            tables._prove(outcomes, proof, next(iter(change)).split()[0], "float32")


def test_missing_reports_are_named(tmp_path: Path) -> None:
    with pytest.raises(tables.UnprovedError, match=r"cpu\.xml is missing"):
        tables.load_outcomes(tmp_path)


def test_the_readme_has_the_numbers_of_the_peers_tests() -> None:
    files = json.loads((tables.DOCS / "bitsandbytes-tests.json").read_text())
    passed, failed = (sum(counts) for counts in zip(*files["cpu"].values(), strict=True))
    assert f"{passed} pass and {failed} do not" in (tables.ROOT / "README.md").read_text()
