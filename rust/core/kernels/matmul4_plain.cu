// y = x W^T + bias for few rows of x (tokens), on any GPU, for any type, size, block size and alignment.
//
//   x     m x k of E            codes  (n k + 1) / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E            scales one a block of 2^log2_blocksize elements of the flattened W, which may run across rows
//
// Work: a warp takes a row of W and TOKENS tokens at a time; a lane takes eight elements that start at a multiple of eight in the
// flattened W, so that they have whole bytes and one scale. Sums are float32, added over the lanes in a butterfly.
// Bytes a row: k / 2 of codes and its scales, from memory; the tokens from the caches.
#include "matmul4_problem.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int TOKENS = 4;
constexpr int RUN = 8;  // elements of a lane

// Four bytes of codes from element `first` of the flattened W on, a multiple of eight; what lies past the end is 0.
__device__ __forceinline__ unsigned load_codes(const Problem& p, i64 first, i64 bytes, bool aligned) {
    const i64 at = first / 2;
    if (aligned && at + 4 <= bytes) return __ldg(reinterpret_cast<const unsigned*>(p.codes + at));
    unsigned v = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at + i < bytes) v |= (unsigned)__ldg(p.codes + at + i) << (8 * i);
    return v;
}

template <class E, bool NESTED>
__device__ __forceinline__ void multiply(const Problem& p) {
    typedef typename E::storage storage;
    __shared__ float values[16], nested_code[256];
    if (threadIdx.x < 16) values[threadIdx.x] = (p.quant_type == QUANT_TYPE_FP4 ? FP4_VALUES : NF4_VALUES)[threadIdx.x];
    if (NESTED) load_nested_code(nested_code, p.nested.code);
    __syncthreads();
    const float offset = NESTED ? *p.nested.offset : 0.0f;
    const int lane = threadIdx.x % WARP;
    const i64 bytes = (p.n * p.k + 1) / 2;
    const bool aligned = is_aligned(p.codes, 4);

    for (i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / WARP; row < p.n; row += (i64)gridDim.x * WARPS) {
        const i64 start = row * p.k, end = start + p.k;
        for (i64 token = 0; token < p.m; token += TOKENS) {
            const int tokens = (int)min((i64)TOKENS, p.m - token);
            float sum[TOKENS] = {};
            for (i64 first = start / RUN * RUN + lane * RUN; first < end; first += WARP * RUN) {
                const unsigned packed = load_codes(p, first, bytes, aligned);
                const i64 block = first >> p.log2_blocksize;
                const float scale = NESTED ? nested_scale(nested_code[((const u8*)p.absmax)[block]], p.nested.absmax_of(block), offset)
                                           : ((const float*)p.absmax)[block];
                float weight[RUN];
#pragma unroll
                for (int i = 0; i < RUN; i++) weight[i] = values[packed >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15];
                const storage* x = (const storage*)p.x + (token * p.k + first - start);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    if (t >= tokens) break;
                    float part = 0.0f;
#pragma unroll
                    for (int i = 0; i < RUN; i++)
                        if (first + i >= start && first + i < end) part = __fmaf_rn(weight[i], E::widen(x[t * p.k + i]), part);
                    sum[t] = __fmaf_rn(part, scale, sum[t]);
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                for (int distance = WARP / 2; distance > 0; distance /= 2)
                    sum[t] += __shfl_xor_sync(FULL_WARP, sum[t], distance);
                if (lane == 0 && t < tokens) {
                    const float bias = p.bias ? E::widen(((const storage*)p.bias)[row]) : 0.0f;
                    ((storage*)p.y)[(token + t) * p.n + row] = E::narrow(sum[t] + bias);
                }
            }
        }
    }
}

#define PLAIN(DTYPE, E)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) matmul4_plain_##DTYPE##_plain(const __grid_constant__ Problem p) { \
        multiply<E, false>(p);                                                                                           \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) matmul4_plain_##DTYPE##_nested(const __grid_constant__ Problem p) { \
        multiply<E, true>(p);                                                                                            \
    }

PLAIN(f32, F32)
PLAIN(f16, F16)
PLAIN(bf16, BF16)
