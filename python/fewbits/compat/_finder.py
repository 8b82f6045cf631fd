"""Where Python finds a package and a distribution called bitsandbytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from fewbits._native import __version__

NAME = "bitsandbytes"
# Newer than every floor that downstream libraries ask for; the part after the plus says who it is.
VERSION = f"0.50.2+fewbits{re.sub('[^a-z0-9.]', '.', __version__.lower())}"
ROOT = Path(__file__).parent / NAME

METADATA = f"""Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: fewbits under the name of bitsandbytes
Requires-Dist: fewbits
"""


def spec() -> ModuleSpec:
    """Return the spec of the package. Its submodules are found in its directory by Python's own finder."""
    found = spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert found is not None
    return found


class _Distribution(Distribution):
    """The metadata of the package."""

    def read_text(self, filename: Any) -> str | None:
        texts = {"METADATA": METADATA, "top_level.txt": f"{NAME}\n", "INSTALLER": "fewbits\n"}
        return texts.get(str(filename))

    def locate_file(self, path: Any) -> Any:
        return ROOT.parent / path


class _Finder(MetaPathFinder):
    """Answers to the name of the package alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec() if fullname == NAME else None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        name = None if context is None else context.name
        if name is None or re.sub("[-_.]+", "-", name).lower() == NAME:
            return [_Distribution()]
        return []


_finder = _Finder()


def register() -> None:
    """Put the finder before all others, once."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
