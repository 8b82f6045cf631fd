"""Modules and parameters that hold their weights quantized."""

from fewbits.nn.embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from fewbits.nn.embedding8bit import Embedding8bit
from fewbits.nn.int8_params import Int8Params
from fewbits.nn.linear import Linear4bit, LinearFP4, LinearNF4
from fewbits.nn.linear8bit import Linear8bitLt
from fewbits.nn.outlier_aware import OutlierAwareLinear
from fewbits.nn.params import Params4bit
from fewbits.nn.stable_embedding import Embedding, StableEmbedding

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
]
