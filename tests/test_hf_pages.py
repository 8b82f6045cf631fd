"""The documentation's code that needs transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_models import make_llama
from pages import PAGES, blocks, run_python

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.needs == "transformers" for b in blocks(page))])
def test_python_runs(page: str, tmp_path: Path) -> None:
    make_llama(transformers, tmp_path / "path" / "to" / "model")
    run_python(page, ["transformers"], tmp_path)
