"""Every tolerance of the tests, and where it comes from."""

from __future__ import annotations

import torch

# Largest relative error of one rounding to nearest.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Mean absolute error on N(0, 1), as published: (quant type, block size) -> error.
PUBLISHED_ERROR = {("nf4", 64): 0.0728, ("fp4", 64): 0.0965, ("dynamic", 256): 0.0085}

# Four standard errors of the mean at 2**20 elements, and half a unit of the published last digit.
PUBLISHED_SLACK = {("nf4", 64): 3e-4, ("fp4", 64): 4e-4, ("dynamic", 256): 1e-4}

# Relative error of a product against float64, over that of F.linear on the dequantized weight in the same dtype.
MATMUL_RATIO = 1.2

# Mean relative error of Adam's update from 8-bit states, dynamic maps in blocks of 256: 8-bit Optimizers via Block-wise
# Quantization (Dettmers et al. 2022). Linear quantization: 5.4. The figures hold for the states of a language model.
PUBLISHED_UPDATE_ERROR = {"dynamic": 0.017, "linear": 5.4}
UPDATE_ERROR_SLACK = 0.003

# Of the loss of a language model, between 8-bit and 32-bit states.
LOSS_RATIO = 0.01

# Of a product's outlier columns, relative to the sum of the magnitudes: on tensor cores both factors are rounded to the
# activation's dtype. float32 has a few hundred sums on the way.
INT8_OUTLIERS = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
