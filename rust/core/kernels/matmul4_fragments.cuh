// What the two kernels for few tokens share: 16 rows of W as fragments of the tensor cores, 256 columns a stage.
//
// Operand A is 16 rows of W, operand B eight tokens. The sum over k may take any order, so within 64 columns lane t of a row's four
// takes the 16 columns of 8 packed bytes: bytes 2 s and 2 s + 1 are the two halves of step s of A's fragment, and B's fragment is
// taken in the same order. Fragment rows g and g + 8 are rows 2 g and 2 g + 1 of the tile, which makes the reads of the swizzled
// codes free of bank conflicts. A byte becomes two values through a table in shared memory; they are unscaled, and the sum over 64
// columns is multiplied by the block's scale in float32.
#pragma once
#include "matmul4.cuh"

constexpr int STAGE = 256;              // columns
constexpr int STAGE_BYTES = STAGE / 2;  // of a row's codes
constexpr int STEP = 64;                // columns of one scale at most
constexpr int TILE = 16;                // rows of a fragment

// This lane's codes of a stage: of rows 2 g and 2 g + 1 of a fragment tile, 8 bytes of each 64 columns.
__device__ __forceinline__ void fetch_codes(unsigned from, uint2 (&packed)[2][4]) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = 2 * g + h;
#pragma unroll
        for (int b = 0; b < 4; b++)
            packed[h][b] = load_shared2(from + row * STAGE_BYTES + (((b * 2 + t / 2) ^ (row & 7)) << 4) + t % 2 * 8);
    }
}

// One fragment tile and one stage: sum += codes * tokens, scaled.
template <class E, class Table, int NT>
__device__ __forceinline__ void multiply_stage(const uint2 (&packed)[2][4], unsigned lane_base, const float (&scale)[2][4],
                                                const unsigned (&tokens)[NT][4][8], float (&sum)[NT][4]) {
#pragma unroll
    for (int b = 0; b < 4; b++) {
        float part[NT][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const unsigned u = s < 2 ? packed[0][b].x : packed[0][b].y, v = s < 2 ? packed[1][b].x : packed[1][b].y;
            unsigned a[4];
            if (s % 2 == 0) {
                a[0] = Table::template look_up<0>(u, lane_base), a[1] = Table::template look_up<0>(v, lane_base);
                a[2] = Table::template look_up<1>(u, lane_base), a[3] = Table::template look_up<1>(v, lane_base);
            } else {
                a[0] = Table::template look_up<2>(u, lane_base), a[1] = Table::template look_up<2>(v, lane_base);
                a[2] = Table::template look_up<3>(u, lane_base), a[3] = Table::template look_up<3>(v, lane_base);
            }
#pragma unroll
            for (int i = 0; i < NT; i++) E::mma(part[i], a, tokens[i][b][2 * s], tokens[i][b][2 * s + 1]);
        }
        const float first = scale[0][b], second = scale[1][b];
#pragma unroll
        for (int i = 0; i < NT; i++) {
            sum[i][0] = __fmaf_rn(part[i][0], first, sum[i][0]), sum[i][1] = __fmaf_rn(part[i][1], first, sum[i][1]);
            sum[i][2] = __fmaf_rn(part[i][2], second, sum[i][2]), sum[i][3] = __fmaf_rn(part[i][3], second, sum[i][3]);
        }
    }
}
