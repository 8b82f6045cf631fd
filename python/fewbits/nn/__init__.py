"""Modules and parameters that hold their weights quantized."""

from fewbits.nn.linear import Linear4bit, LinearFP4, LinearNF4
from fewbits.nn.params import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]
