"""Products with gradients."""

from . import _functions
