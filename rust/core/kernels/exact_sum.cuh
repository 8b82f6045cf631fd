// The sum of float32 magnitudes without rounding: LIMBS words of 32 bits, the lowest first, in units of 2^-149
// (core/src/exact_sum.rs is the CPU's). What is exact depends on no order, so every grid of every device finds the same sum.
#pragma once
#include "element.cuh"

typedef unsigned long long u64;

constexpr int LIMBS = 10;        // 2^30 values below 2^128: 307 bits
constexpr int MAX_SUMS = 1024;   // blocks of a launch that sums
constexpr int SUMS_HEADER = 4;   // words before the sums: how many there are, and three to keep 16 bytes aligned

// The sum of a warp's values, in every lane.
__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

// Adds word << (32 * limb) to a number in shared memory that other threads add to as well. The carries they meet arrive in the end.
__device__ __forceinline__ void add_word(unsigned* limbs, int limb, unsigned word) {
    bool carry = word != 0 && atomicAdd(limbs + limb, word) > ~word;
    while (carry) carry = atomicAdd(limbs + ++limb, 1u) == ~0u;
}

// Adds value << position.
__device__ __forceinline__ void add_shifted(unsigned* limbs, int position, u64 value) {
    const int limb = position / 32, shift = position % 32;
    const u64 low = (value & 0xffffffffu) << shift, high = (value >> 32) << shift;
    add_word(limbs, limb, (unsigned)low);
    add_word(limbs, limb + 1, (unsigned)(low >> 32));
    add_word(limbs, limb + 1, (unsigned)high);
    add_word(limbs, limb + 2, (unsigned)(high >> 32));
}

// Adds a float32, as its bits.
__device__ __noinline__ void add_value(unsigned* limbs, unsigned bits) {
    const unsigned exponent = bits >> 23, fraction = bits & 0x7fffffu;
    add_shifted(limbs, max(exponent, 1u) - 1, exponent > 0 ? fraction | 0x800000u : fraction);
}

// A float32 in units of its own last bit.
__device__ __forceinline__ unsigned significand(unsigned bits) { return (bits & 0x7fffffu) | 0x800000u; }

// Writes the sum of the maxima that this block of quantize.cu wrote, for the next launch: the maxima of every gridDim.x-th piece of
// PIECE elements. They are read again, out of the L2 cache: to add them up on the way takes every tile 15 instructions, which cost
// twice as much. Called by all threads.
//
// Block maxima differ little in exponent: a lane adds those inside a window of exponents in a register, and whatever lies outside
// to the limbs.
template <int PIECE, int THREADS>
__device__ __forceinline__ void store_block_sum(const float* absmax, i64 n, int log2_blocksize, unsigned* sums) {
    constexpr int VALUES = 16;                // a lane at a time, in pairs: a piece has two maxima at least
    constexpr int STRIDE = 2 * THREADS;       // maxima of a pair a lane: whole pieces
    constexpr unsigned SPAN = 16, BELOW = 9;  // exponents of the window, a power of two: room for 2^25 values a warp
    static_assert(STRIDE % (PIECE / 32) == 0, "whole pieces");
    __shared__ unsigned limbs[LIMBS];
    if (threadIdx.x < LIMBS) limbs[threadIdx.x] = 0;
    __syncthreads();  // also: all maxima are written

    const i64 count = (n + (1 << log2_blocksize) - 1) >> log2_blocksize;
    const unsigned per_piece = PIECE >> log2_blocksize, log2_per_piece = 31 - __clz(per_piece);
    const unsigned last_piece = (unsigned)((count - 1) >> log2_per_piece);
    const unsigned steps = (last_piece - blockIdx.x) / gridDim.x;
    const bool has_last = blockIdx.x + steps * gridDim.x == last_piece;
    const unsigned own = (steps << log2_per_piece) +
                         (has_last ? (unsigned)(count - ((i64)last_piece << log2_per_piece)) : per_piece);
    // Where maximum i of this block's lies.
    const auto address = [&](unsigned i) {
        const unsigned piece = blockIdx.x + (i >> log2_per_piece) * gridDim.x;
        return absmax + ((i64)piece << log2_per_piece) + (i & (per_piece - 1));
    };
    if (own % 2 != 0 && threadIdx.x == 0) add_value(limbs, __float_as_uint(*address(own - 1)));

    u64 sum = 0;
    unsigned lowest = 255;  // the window's exponent, the warp's; here one that no value has
    const float* at = address(2 * threadIdx.x);
    int left = (int)own - 1 - 2 * (int)threadIdx.x;  // a pair is there while this is positive
#pragma unroll 1
    for (unsigned first = 0; first + 1 < own; first += VALUES / 2 * STRIDE) {
        unsigned bits[VALUES];
#pragma unroll
        for (int k = 0; k < VALUES / 2; k++) {
            const uint2* pair = reinterpret_cast<const uint2*>(at + (u64)k * (STRIDE * gridDim.x));
            const uint2 v = left > k * STRIDE ? *pair : make_uint2(0, 0);
            bits[2 * k] = v.x, bits[2 * k + 1] = v.y;
        }
        if (lowest == 255) {
            unsigned largest = 0;
#pragma unroll
            for (int k = 0; k < VALUES; k++) largest = max(largest, bits[k]);
            const unsigned exponent = warp_max(largest) >> 23;
            if (exponent != 0) lowest = max(exponent, BELOW + 1) - BELOW;
        }
        unsigned shifts = 0;
        u64 inside = 0;
#pragma unroll
        for (int k = 0; k < VALUES; k++) {
            const unsigned shift = (bits[k] >> 23) - lowest;
            if (left > k / 2 * STRIDE) shifts |= shift;
            inside += (u64)significand(bits[k]) * shift_left(1, shift);  // 0 for zeros, whose shift is negative
        }
        if (shifts >= SPAN) {
            shifts = 0;
#pragma unroll
            for (int k = 0; k < VALUES; k++)
                if (bits[k] != 0) shifts |= (bits[k] >> 23) - lowest;
        }
        if (shifts < SPAN) {
            sum += inside;
        } else {
#pragma unroll 1
            for (int k = 0; k < VALUES; k++) {
                const unsigned shift = (bits[0] >> 23) - lowest;
                if (shift < SPAN)
                    sum += (u64)significand(bits[0]) << shift;
                else if (bits[0] != 0)
                    add_value(limbs, bits[0]);
                // Registers have no index.
#pragma unroll
                for (int i = 1; i < VALUES; i++) bits[i - 1] = bits[i];
            }
        }
        at += (u64)(VALUES / 2) * (STRIDE * gridDim.x);
        left -= VALUES / 2 * STRIDE;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0 && sum != 0) add_shifted(limbs, lowest - 1, sum);
    __syncthreads();
    if (threadIdx.x < LIMBS) sums[SUMS_HEADER + threadIdx.x * MAX_SUMS + blockIdx.x] = limbs[threadIdx.x];
    if (blockIdx.x == 0 && threadIdx.x == 0) sums[0] = gridDim.x;
}

// The total of those sums, rounded once, ties to even; in the first warp's lanes alone. Called by all threads of a block of at least
// LIMBS warps.
__device__ __forceinline__ double load_total(const unsigned* sums) {
    __shared__ u64 totals[LIMBS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (warp < LIMBS) {
        constexpr int LOADS = 8;
        const uint2* row = reinterpret_cast<const uint2*>(sums + SUMS_HEADER + warp * MAX_SUMS);
        const int count = sums[0];
        // The first words are asked for together with their number; what lies past it was never written.
        u64 total = 0;
        int first = 2 * lane;
        do {
            uint2 v[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) v[i] = row[first / 2 + i * WARP];
#pragma unroll
            for (int i = 0; i < LOADS; i++, first += 2 * WARP) {
                total += first < count ? v[i].x : 0;
                total += first + 1 < count ? v[i].y : 0;
            }
        } while (first - 2 * lane < count);
        total = warp_sum(total);
        if (lane == 0) totals[warp] = total;
    }
    __syncthreads();
    if (warp != 0) return 0.0;

    // A limb a lane. First the carries.
    u64 word = lane < LIMBS ? totals[lane] : 0;
    while (__any_sync(FULL_WARP, word >> 32 != 0)) {
        const unsigned carry = __shfl_up_sync(FULL_WARP, (unsigned)(word >> 32), 1);
        word = (word & 0xffffffffu) + (lane > 0 ? carry : 0);
    }
    const unsigned digits = (unsigned)word, set = __ballot_sync(FULL_WARP, digits != 0);
    if (set == 0) return 0.0;
    // The highest 64 bits, the lowest of which tells whether anything lies below.
    const int top = 31 - __clz(set);
    const unsigned a = __shfl_sync(FULL_WARP, digits, top);
    const unsigned b = top >= 1 ? __shfl_sync(FULL_WARP, digits, top - 1) : 0;
    const unsigned c = top >= 2 ? __shfl_sync(FULL_WARP, digits, top - 2) : 0;
    const int zeros = __clz(a);
    const u64 bits = (u64)__funnelshift_l(b, a, zeros) << 32 | __funnelshift_l(c, b, zeros);
    const bool more = c << zeros != 0 || (top >= 3 && (set & ((1u << (top - 2)) - 1)) != 0);
    const int exponent = 32 * (top - 1) - zeros - 149;
    return __ull2double_rn(bits | more) * __longlong_as_double((i64)(exponent + 1023) << 52);
}
