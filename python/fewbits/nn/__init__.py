"""Modules and parameters that hold their weights quantized."""

from fewbits.nn.embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from fewbits.nn.linear import Linear4bit, LinearFP4, LinearNF4
from fewbits.nn.params import Params4bit

__all__ = [
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]
