"""Constants."""

import sys
from pathlib import Path

import fewbits

DYNAMIC_LIBRARY_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
PACKAGE_DIR = Path(fewbits.__file__).parent
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = PACKAGE_GITHUB_URL
