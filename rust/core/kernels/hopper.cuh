// What products by warpgroups share: rings between the copy engine and the warpgroups, and the way of the sums to memory.
#pragma once
#include "element.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

// One position of a ring, and the parity of its round.
template <int SLOTS>
struct Cursor {
    int slot = 0, round = 0;

    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, round ^= 1;
    }
};

// Where results go: y is m x n, the bias n of E or null.
struct Output {
    const void* bias;
    void* y;
    int m, n;
};

constexpr int WRITE_STAGING = 32 * 16 * 2;  // bytes of shared memory through which a warp writes, 32 tokens of 16 rows at a time

// Adds the bias, rounds, transposes through this warp's own shared memory and writes.
template <class E, int SUMS>
__device__ __forceinline__ void write_sums(const Output& p, unsigned staging, int token0, int row0, const float (&sum)[SUMS]) {
    constexpr int WRITE_TOKENS = SUMS * 2 < 32 ? SUMS * 2 : 32;
    const int lane = threadIdx.x % WARP, own = row0 + lane / 4;
    float upper = 0.0f, lower = 0.0f;
    if (p.bias) {
        upper = own < p.n ? E::widen(((const typename E::storage*)p.bias)[own]) : 0.0f;
        lower = own + 8 < p.n ? E::widen(((const typename E::storage*)p.bias)[own + 8]) : 0.0f;
    }
    const bool aligned = p.n % 8 == 0 && is_aligned(p.y, 16);
    // A token's 32 bytes are two pieces; every fourth token swaps them, so that eight tokens meet all banks.
    const int to_token = lane / 16 * 8 + lane % 8, to = to_token * 32 + (((lane / 8) ^ (lane / 4)) & 1) * 16;
    const int from_token = lane / 2, piece = lane & 1, from = from_token * 32 + ((piece ^ (from_token >> 2)) & 1) * 16;
    const int row = row0 + piece * 8;
#pragma unroll
    for (int o = 0; o < SUMS * 2 / WRITE_TOKENS; o++) {
        if (token0 + o * WRITE_TOKENS >= p.m) break;
        __syncwarp();  // the chunk before has been read
#pragma unroll
        for (int pair = 0; pair < WRITE_TOKENS / 16; pair++) {
            const float* v = &sum[(o * (WRITE_TOKENS / 8) + pair * 2) * 4];
            // Matrices: upper rows and lower rows of eight tokens, then of the next eight.
            store_transposed(staging + pair * 512 + to, E::pack2(v[0] + upper, v[1] + upper), E::pack2(v[2] + lower, v[3] + lower),
                             E::pack2(v[4] + upper, v[5] + upper), E::pack2(v[6] + lower, v[7] + lower));
        }
        __syncwarp();
#pragma unroll
        for (int pair = 0; pair < WRITE_TOKENS / 16; pair++) {
            const int token = token0 + o * WRITE_TOKENS + pair * 16 + from_token;
            const uint4 v = load_shared4(staging + pair * 512 + from);
            if (token >= p.m || row >= p.n) continue;
            typename E::storage* const y = (typename E::storage*)p.y + ((i64)token * p.n + row);
            if (aligned) {
                *reinterpret_cast<uint4*>(y) = v;
            } else {
                const typename E::storage* const values = reinterpret_cast<const typename E::storage*>(&v);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (row + i < p.n) y[i] = values[i];
            }
        }
    }
}

// The descriptor of a matrix in shared memory for the tensor cores: rows of 128 bytes, swizzled; eight of them every 1024 bytes.
__device__ __forceinline__ unsigned long long swizzled_descriptor(unsigned address) {
    return (unsigned long long)(address >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
