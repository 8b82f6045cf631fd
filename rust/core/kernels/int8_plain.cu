// The int8 product on any GPU, for any size and alignment. int8.cuh gives the formula; the sums alone are a result too (I32).
//
// Work: a warp takes a row of W and ROWS rows of A at a time; lanes take four columns each where rows start on four bytes, else one.
#include "int8.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 4;

__device__ __forceinline__ int warp_sum(int v) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(FULL_WARP, v, distance);
    return v;
}

template <class E>
__device__ __forceinline__ void finish(const Operands& o, i64 row, i64 col, int sum) {
    const float row_scale = o.row_scale[row], col_scale = o.col_scale[col];
    float value = scaled_sum(sum, row_scale, col_scale);
    if (o.mask) {
        OutlierWalk walk(o.mask, o.k);
        i64 own;
        int count;
        do {
            count = walk.next(own);
            for (int c = 0; c < count; c++) {
                const i64 column = __shfl_sync(FULL_WARP, own, c);
                value = __fmaf_rn(residual<E>(o, row, column, row_scale), outlier_weight(o.weight[col * o.k + column], col_scale), value);
            }
        } while (count == CHUNK);
    }
    const typename E::storage* const bias = (const typename E::storage*)o.bias;
    if (bias) value = __fadd_rn(value, E::widen(bias[col]));
    if (threadIdx.x % WARP == 0) ((typename E::storage*)o.out)[row * o.n + col] = E::narrow(value);
}

template <>
__device__ __forceinline__ void finish<I32>(const Operands& o, i64 row, i64 col, int sum) {
    if (threadIdx.x % WARP == 0) ((int*)o.out)[row * o.n + col] = sum;
}

template <class E>
__device__ __forceinline__ void multiply(const Operands& o) {
    const int lane = threadIdx.x % WARP;
    const bool aligned = o.k % 4 == 0 && is_aligned(o.codes, 4) && is_aligned(o.weight, 4);
    wait_for_previous_kernel();
    let_next_kernel_start();
    clear_ready(o);
    for (i64 col = (i64)blockIdx.x * WARPS + threadIdx.x / WARP; col < o.n; col += (i64)gridDim.x * WARPS) {
        const i8* const w = o.weight + col * o.k;
        for (i64 row = 0; row < o.m; row += ROWS) {
            const int rows = (int)min((i64)ROWS, o.m - row);
            int sum[ROWS] = {};
            for (i64 c = lane * (aligned ? 4 : 1); c < o.k; c += WARP * (aligned ? 4 : 1)) {
                const int own = aligned ? *reinterpret_cast<const int*>(w + c) : w[c];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (r >= rows) break;
                    const i8* const a = o.codes + (row + r) * o.k + c;
                    sum[r] = aligned ? __dp4a(own, *reinterpret_cast<const int*>(a), sum[r]) : sum[r] + own * *a;
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r < rows) finish<E>(o, row + r, col, warp_sum(sum[r]));
        }
    }
}

#define PLAIN(DTYPE, E) \
    extern "C" __global__ void __launch_bounds__(THREADS) int8_plain_##DTYPE(const __grid_constant__ Operands o) { multiply<E>(o); }
PLAIN(f32, F32)
PLAIN(f16, F16)
PLAIN(bf16, BF16)
PLAIN(i32, I32)
