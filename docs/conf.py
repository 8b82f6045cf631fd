"""The documentation site: ``make docs`` builds it with warnings as errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "tests")]

import fewbits
import tables

project = "fewbits"
author = "the authors of fewbits"
release = version = fewbits.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generated"]
html_theme = "furo"
html_title = f"fewbits {release}"
html_copy_source = False

myst_heading_anchors = 3

# Docstrings: NumPy style; single backticks name an argument or another object.
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
suppress_warnings = ["ref.python"]  # names that two modules offer, as `matmul_4bit`

# An empty folder name: a draft, without the tables that need outcomes.
_outcomes = os.environ.get("FEWBITS_OUTCOMES", "")
tables.write_all(DOCS / "generated", tables.load_outcomes(Path(_outcomes)) if _outcomes else None)
