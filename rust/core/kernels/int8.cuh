// What the int8 products share: y = (A W^T) * row * col / 127^2 + outliers + bias.
//
//   A  m x k int8, the codes of x's rows      row[i]  the scale of row i: what the code 127 stands for
//   W  n x k int8                             col[j]  the same of row j of W
//
//   y[i][j] = round(f32(acc) * row[i] * col[j] * (1 / 127^2) + sum over outlier columns c of r[i][c] * w[j][c] + bias[j])
//   w[j][c] = W[j][c] * col[j] * (1 / 127),  r[i][c] = x[i][c] - A[i][c] * (row[i] * (1 / 127))
//
// acc is the exact sum over all columns; r is what the codes leave over of x, so that codes of outlier columns may be anything.
#pragma once
#include "element.cuh"

typedef signed char i8;

constexpr float INVERSE_127 = 1.0f / 127.0f;
constexpr float INVERSE_16129 = 1.0f / 16129.0f;

// Sums themselves as the result: no scales, no bias.
struct I32 {
    typedef int storage;
    static __device__ __forceinline__ int narrow(int x) { return x; }
};

// What a product is made of besides its integer sums. All row-major and contiguous.
struct Operands {
    const void* x;          // m x k of E; read where there is a mask
    const i8* codes;        // m x k
    const float* row_scale;
    const i8* weight;       // n x k
    const float* col_scale;
    const unsigned* mask;   // bit j: column j is an outlier column; or null
    unsigned long long* ready;  // flags that the quantization of these rows has set for its own use and that are to be 0 again; or null
    const void* bias;       // n of E, or null
    void* out;              // m x n of E
    i64 m, n, k;
};

// Flags that say the same, in lines of their own: all blocks read them at once, and one line would make them queue.
constexpr int FLAGS = 16, FLAG_STRIDE = 16;

// What is to be done once by the launch, after the previous kernel has ended.
__device__ __forceinline__ void clear_ready(const Operands& o) {
    if (o.ready && blockIdx.x == 0 && threadIdx.x < FLAGS) o.ready[threadIdx.x * FLAG_STRIDE] = 0;
}

__device__ __forceinline__ float scaled_sum(int sum, float row, float col) {
    return __fmul_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), row), col), INVERSE_16129);
}

// r[i][c]
template <class E>
__device__ __forceinline__ float residual(const Operands& o, i64 row, i64 column, float row_scale) {
    const i64 at = row * o.k + column;
    const float x = E::widen(((const typename E::storage*)o.x)[at]);
    return __fsub_rn(x, __fmul_rn((float)o.codes[at], __fmul_rn(row_scale, INVERSE_127)));
}

// w[j][c]
__device__ __forceinline__ float outlier_weight(i8 code, float col_scale) {
    return __fmul_rn(__fmul_rn((float)code, col_scale), INVERSE_127);
}

constexpr int CHUNK = 8;  // outlier columns that are taken at a time

// Goes through the outlier columns, in ascending order, a warp together.
struct OutlierWalk {
    static constexpr int OWN = 4;  // words of a lane: 4096 columns are read at once

    const unsigned* mask;
    i64 words, base;
    unsigned long long low, high;  // of words base + OWN * lane ..., without those that were taken

    __device__ __forceinline__ OutlierWalk(const unsigned* mask, i64 k) : mask(mask), words(mask ? (k + 31) / 32 : 0), base(0) { load(); }

    __device__ __forceinline__ unsigned long long load2(i64 at) const {
        const unsigned first = at < words ? mask[at] : 0, second = at + 1 < words ? mask[at + 1] : 0;
        return (unsigned long long)second << 32 | first;
    }
    __device__ __forceinline__ void load() {
        const i64 at = base + threadIdx.x % WARP * OWN;
        low = load2(at), high = load2(at + 2);
    }

    // The next ones: lane i gets the i-th. Returns how many, fewer than CHUNK only at the end.
    __device__ __forceinline__ int next(i64& column) {
        const int lane = threadIdx.x % WARP;
        int count = 0;
        column = 0;
        while (true) {
            const unsigned any = __ballot_sync(FULL_WARP, (low | high) != 0);
            if (!any) {
                if (base + WARP * OWN >= words) return count;
                base += WARP * OWN;
                load();
                continue;
            }
            const int owner = __ffs(any) - 1;
            const int within = __shfl_sync(FULL_WARP, low ? __ffsll(low) - 1 : 63 + __ffsll(high), owner);
            if (lane == count) column = (base + owner * OWN) * 32 + within;
            if (lane == owner && low)
                low &= low - 1;
            else if (lane == owner)
                high &= high - 1;
            if (++count == CHUNK) return count;
        }
    }
};
