// The outlier columns of one stage of the product for few rows: a warp gathers them, 16 at a time, for the 16-bit tensor cores. Their
// part of the result is the sum of x[i][c] W[j][c], times col[j] / 127; in the integer sums they are left out.
#pragma once
#include "int8_outliers.cuh"

// Bit number `rank` of those that are set, from 0.
__device__ __forceinline__ int nth_bit(unsigned bits, int rank) {
    int at = 0;
#pragma unroll
    for (int half = 16; half; half /= 2) {
        const int below = __popc(bits & ((1u << half) - 1));
        if (rank >= below) rank -= below, bits >>= half, at += half;
    }
    return at;
}

// Fragment row i is row interleaved(i) of eight, of both operands.
__device__ __forceinline__ int interleaved(int i) { return (i & 1) * 4 + (i >> 1); }

// NT groups of eight tokens, RT of 16 rows of W, stages of 32 * WORDS columns.
template <class E, int NT, int RT, int WORDS>
struct Gather {
    typedef typename E::storage storage;
    static constexpr bool TENSOR_CORES = SixteenBits<E>::HAS;
    static constexpr int STEP = 16;

    unsigned own;  // lane i's word of the stage's mask
    int before, total, step;
    int column;         // lane i < STEP: number i of the step, within the stage
    int element[4];     // the same of this lane's elements of fragments: 2 t, 2 t + 1, 2 t + 8, 2 t + 9
    unsigned x[NT][2];  // fragments of x
    float sum[RT][NT][4] = {};

    // Begins a stage. Returns whether it has outlier columns.
    __device__ __forceinline__ bool start(unsigned word) {
        own = word;
        if (!__any_sync(FULL_WARP, word != 0)) return false;
        const int lane = threadIdx.x % WARP;
        int up_to = __popc(word);
#pragma unroll
        for (int d = 1; d < WORDS; d *= 2) {
            const int other = __shfl_up_sync(FULL_WARP, up_to, d);
            if (lane >= d) up_to += other;
        }
        before = up_to - __popc(word);
        total = __shfl_sync(FULL_WARP, up_to, WORDS - 1);
        step = 0;
        return true;
    }

    // Columns of a step, and what x has there: asked for before W has come.
    __device__ __forceinline__ void ask(const Operands& o, int first_column) {
        const int lane = threadIdx.x % WARP, rank = min(step + lane % STEP, total - 1);
        int owner = 0, before_it = 0;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const int b = __shfl_sync(FULL_WARP, before, i);
            if (rank >= b) owner = i, before_it = b;
        }
        column = owner * 32 + nth_bit(__shfl_sync(FULL_WARP, own, owner), rank - before_it);
        if constexpr (TENSOR_CORES) {
            const int g = interleaved(lane / 4), t = lane % 4;
#pragma unroll
            for (int i = 0; i < 4; i++) element[i] = __shfl_sync(FULL_WARP, column, place(i, t));
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const int token = j * 8 + g;
                const unsigned short* const row = (const unsigned short*)o.x + token * o.k + first_column;
                unsigned v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = token < o.m && step + place(i, t) < total ? row[element[i]] : 0;
                x[j][0] = v[0] | v[1] << 16, x[j][1] = v[2] | v[3] << 16;
            }
        }
    }
    static __device__ __forceinline__ int place(int i, int t) { return i / 2 * 8 + 2 * t + i % 2; }

    // Adds the stage's columns, the first of which have been asked for. `weight(row, column)` is a code of the stage.
    template <class Weight>
    __device__ __forceinline__ void add(const Operands& o, int first_column, const Weight& weight) {
        while (true) {
            if constexpr (TENSOR_CORES)
                multiply(weight);
            else
                add_one_by_one(o, first_column, weight);
            step += STEP;
            if (step >= total) return;
            ask(o, first_column);
        }
    }

    template <class Weight>
    __device__ __forceinline__ void multiply(const Weight& weight) {
        const int g = interleaved(threadIdx.x % WARP / 4);
        unsigned a[RT][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = r * 16 + h * 8 + g;
                    a[r][2 * half + h] = SixteenBits<E>::from_codes(weight(row, element[2 * half]) | weight(row, element[2 * half + 1]) << 8, ~0u);
                }
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int j = 0; j < NT; j++) SixteenBits<E>::mma(sum[r][j], a[r], x[j][0], x[j][1]);
    }

    template <class Weight>
    __device__ __forceinline__ void add_one_by_one(const Operands& o, int first_column, const Weight& weight) {
        const int lane = threadIdx.x % WARP, g = interleaved(lane / 4), t = lane % 4;
        for (int i = 0; i < min(STEP, total - step); i++) {
            const int at = __shfl_sync(FULL_WARP, column, i);
            const storage* const from = (const storage*)o.x + first_column + at;
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    const int token = j * 8 + interleaved(t * 2 + q % 2);
                    const float v = token < o.m ? E::widen(from[token * o.k]) : 0.0f;
#pragma unroll
                    for (int r = 0; r < RT; r++) sum[r][j][q] = __fmaf_rn(v, (float)(i8)weight(r * 16 + q / 2 * 8 + g, at), sum[r][j][q]);
                }
        }
    }
};
