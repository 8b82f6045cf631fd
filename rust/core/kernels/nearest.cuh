// Nearest code of t in [-1, 1]: one read of a bucket table (core/src/codebook.rs builds it and says how it works).
#pragma once
#include "element.cuh"
#include "tables.cuh"  // written by build.rs from core/src/codebook.rs

// A bucket table in shared memory.
struct Nearest {
    const unsigned* entries;  // of the bucket of key 0
    float scale;
};

// The key of t, already scaled: its float as an integer that ascends with it.
__device__ __forceinline__ int ordered(float scaled) {
    const int bits = __float_as_int(scaled);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The rank of t, already scaled, in the word's highest byte.
__device__ __forceinline__ unsigned nearest_8bit(const Nearest& table, float scaled) {
    const int key = ordered(scaled);
    return table.entries[key >> SHIFT_8BIT] + ((unsigned)key << LIFT_8BIT);
}

// Four codes of the signed dynamic map, whose ranks are its codes, from scaled quotients; the first in the lowest byte.
__device__ __forceinline__ unsigned nearest_four(const Nearest& table, float a, float b, float c, float d) {
    const unsigned ab = __byte_perm(nearest_8bit(table, a), nearest_8bit(table, b), 0x0073);
    const unsigned cd = __byte_perm(nearest_8bit(table, c), nearest_8bit(table, d), 0x0073);
    return __byte_perm(ab, cd, 0x5410);
}

// Copies a bucket table, padded to 16 bytes, into shared memory; the caller synchronizes.
__device__ __forceinline__ void load_table(unsigned* shared, const unsigned* table, int length) {
    for (int i = threadIdx.x; i < (length + 3) / 4; i += blockDim.x)
        reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(table)[i];
}

// NaN reads as 0, infinities as the largest finite values.
__device__ __forceinline__ float finite(float x) {
    if (x != x) return 0.0f;
    const float largest = __uint_as_float(LARGEST_FINITE);
    return fminf(fmaxf(x, -largest), largest);
}

// A block's maximum for which `reciprocal` is exact: neither it nor its reciprocal is subnormal or infinite. 0 counts as plain.
__device__ __forceinline__ bool is_plain(unsigned absmax_bits) {
    const unsigned smallest = 0x00800000u, beyond = 0x7e800000u;  // 2^-126, 2^126
    return absmax_bits == 0 || absmax_bits - smallest < beyond - smallest;
}

// 1 / m correctly rounded, for plain m; 0 for 0. One Newton step from the approximation, as the division routine does in range.
__device__ __forceinline__ float reciprocal(float m) {
    const float r = reciprocal_approx(m);
    const float refined = __fmaf_rn(r, __fmaf_rn(-m, r, 1.0f), r);
    return m == 0.0f ? 0.0f : refined;
}

// x / m of any block: times the reciprocal, unless that overflows.
struct Divisor {
    float m, inverse;

    __device__ __forceinline__ explicit Divisor(float m) : m(m), inverse(m > 0.0f ? __frcp_rn(m) : 0.0f) {}
    __device__ __forceinline__ float quotient(float x) const {
        return __float_as_uint(inverse) > LARGEST_FINITE ? __fdiv_rn(x, m) : __fmul_rn(x, inverse);
    }
};
