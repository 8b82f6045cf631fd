// The product of tokens with a 4-bit weight, for kernels that read memory themselves.
#pragma once
#include "matmul4.cuh"

struct Problem {
    const void* x;
    const u8* codes;
    const void* absmax;  // float32, or u8 where nested
    NestedSource nested;
    const void* bias;  // n of E, or null
    void* y;
    i64 m, n, k;
    int log2_blocksize, quant_type;
};
