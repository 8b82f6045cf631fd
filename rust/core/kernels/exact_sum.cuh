// The sum of float32 magnitudes without rounding: in float64 as long as that holds it, else as LIMBS words of 32 bits, the lowest
// first, in units of 2^-149 (core/src/exact_sum.rs is the CPU's). What is exact depends on no order, so every grid of every device
// finds the same sum.
#pragma once
#include "element.cuh"

typedef unsigned long long u64;

constexpr int LIMBS = 10;        // 2^30 values below 2^128: 307 bits
constexpr int MAX_SUMS = 1024;   // blocks of a launch that sums

// A sum in float64, exact as long as it has at most 53 bits.
struct PlainSum {
    static constexpr int TOP = 200;           // no last bit is higher
    static constexpr unsigned UNKNOWN = 1000; // in the place of `low`, of a sum that is not exact anyway

    double value = 0.0;
    unsigned low = 0;  // every value is a multiple of 2^(TOP - low)

    __device__ __forceinline__ bool is_exact() const {
        return low <= TOP + 149 && value < __longlong_as_double((i64)(1023 + TOP + 53 - low) << 52);
    }
};

// The sum of a warp's, in every lane.
__device__ __forceinline__ PlainSum warp_sum(PlainSum sum) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum.value += __shfl_xor_sync(FULL_WARP, sum.value, distance);
    sum.low = warp_max(sum.low);
    return sum;
}

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

// Word `limb` of a float64 sum of float32 magnitudes.
__device__ __forceinline__ unsigned limb_of(double sum, int limb) {
    const u64 bits = __double_as_longlong(sum);
    const int position = (int)(bits >> 52) - 1023 - 52 + 149, shift = 32 * limb - position;
    const u64 digits = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    if (bits == 0 || shift >= 64 || shift <= -32) return 0;
    return (unsigned)(shift >= 0 ? digits >> shift : digits << -shift);
}

// The limbs of a sum of `values`: those of every gridDim.x-th unit of 2^log2_unit, from unit blockIdx.x on. Called by all threads of
// a block; `limbs` are shared.
//
// Block maxima differ little in exponent: a lane adds those inside a window of exponents in a register, and whatever lies outside
// to the limbs.
__device__ __noinline__ void sum_limbs(const float* values, i64 count, int log2_unit, unsigned* limbs) {
    constexpr unsigned SPAN = 16, BELOW = 9;  // exponents of the window, a power of two: room for 2^25 values a warp
    if (threadIdx.x < LIMBS) limbs[threadIdx.x] = 0;
    __syncthreads();
    u64 sum = 0;
    unsigned lowest = 255;  // the window's exponent, the warp's; here one that no value has
#pragma unroll 4
    for (i64 i = threadIdx.x;; i += blockDim.x) {
        const i64 unit = (i >> log2_unit) * gridDim.x + blockIdx.x, at = (unit << log2_unit) + (i & ((1 << log2_unit) - 1));
        if (!__any_sync(FULL_WARP, at < count)) break;
        const unsigned bits = at < count ? __float_as_uint(values[at]) : 0;
        if (lowest == 255) {
            const unsigned exponent = warp_max(bits) >> 23;
            if (exponent != 0) lowest = max(exponent, BELOW + 1) - BELOW;
        }
        const unsigned shift = (bits >> 23) - lowest;
        if (shift < SPAN)
            sum += (u64)significand(bits) << shift;
        else if (bits != 0)
            add_value(limbs, bits);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0 && sum != 0) add_shifted(limbs, lowest - 1, sum);
    __syncthreads();
}

// The total of `count` sums, a row of each limb's words, rounded once, ties to even; in the first warp's lanes alone. Called by all
// threads of a block of at least LIMBS warps.
__device__ __noinline__ double total_of_limbs(const unsigned (&sums)[LIMBS][MAX_SUMS], int count) {
    __shared__ u64 totals[LIMBS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (warp < LIMBS) {
        u64 total = 0;
        for (int i = lane; i < count; i += WARP) total += sums[warp][i];
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
