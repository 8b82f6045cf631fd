"""Products with gradients."""

from fewbits._autograd_functions import GlobalOutlierPooler, MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from fewbits.autograd import MatmulLtState, matmul, matmul_4bit
