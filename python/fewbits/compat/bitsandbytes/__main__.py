"""``python -m bitsandbytes`` tells what ``fewbits info`` tells."""

import sys

from .diagnostics.main import main

if __name__ == "__main__":
    sys.exit(main())
