"""Places where others look for kernels. What runs them is in fewbits."""

from . import cpu, cuda, default, utils
