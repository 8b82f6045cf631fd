"""Every tolerance of the tests, and where it comes from."""

from __future__ import annotations

import torch

# Largest relative error of one rounding to nearest.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Mean absolute error on N(0, 1), as published: (quant type, block size) -> error.
PUBLISHED_ERROR = {("nf4", 64): 0.0728, ("fp4", 64): 0.0965, ("dynamic", 256): 0.0085}

# Four standard errors of the mean at 2**20 elements, and half a unit of the published last digit.
PUBLISHED_SLACK = {("nf4", 64): 3e-4, ("fp4", 64): 4e-4, ("dynamic", 256): 1e-4}

# The relative error of a product with 4-bit weights, over that of F.linear on weights dequantized to the activations'
# dtype.
MATMUL4_OVER_LINEAR = 1.2
