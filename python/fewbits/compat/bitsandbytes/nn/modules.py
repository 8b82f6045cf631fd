"""Modules and parameters."""

from fewbits._cpu_layout import (
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from fewbits.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
    StableEmbedding,
)
from fewbits.nn.repair import fix_4bit_weight_quant_state_from_module, maybe_rearrange_weight
from fewbits.optim.manager import GlobalOptimManager
from fewbits.quant_state import QuantState
from fewbits.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer
