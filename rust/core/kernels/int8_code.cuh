// How elements of a row become int8 codes, and which are outliers. int8_rows.cu gives the formula.
#pragma once
#include "int8.cuh"

constexpr unsigned INFINITY_BITS = 0x7f800000u;

// What makes an element an outlier: a magnitude of at least the threshold, but no NaN.
struct Threshold {
    unsigned bits;  // of float32; no magnitude reaches what stands for none
    float value;

    __device__ __forceinline__ explicit Threshold(float value) : bits(value > 0.0f ? __float_as_uint(value) : 0xffffffffu), value(value) {}

    __device__ __forceinline__ bool is_outlier(unsigned magnitude) const { return magnitude >= bits && magnitude <= INFINITY_BITS; }
};

// The least 16 bits of a type that are no less than a positive float32.
__device__ __forceinline__ unsigned round_up(float x, BF16) { return (__float_as_uint(x) + 0xffff) >> 16; }
__device__ __forceinline__ unsigned round_up(float x, F16) { return __half_as_ushort(__float2half_ru(x)); }

// What turns elements of a row into codes.
struct RowCode {
    unsigned scale_bits;
    float factor;
    bool ordinary;  // the factor is finite and not 0

    __device__ __forceinline__ explicit RowCode(unsigned scale_bits) : scale_bits(scale_bits) {
        factor = __fdiv_rn(127.0f, __uint_as_float(scale_bits));
        ordinary = factor > 0.0f && magnitude(factor) < INFINITY_BITS;
    }

    // The low byte is the code: adding 1.5 * 2^23 rounds to an integer, ties to even.
    static __device__ __forceinline__ unsigned rounded(float product) { return __float_as_uint(__fadd_rn(product, 12582912.0f)); }

    // Any element of any row that is no outlier.
    __device__ __forceinline__ unsigned any(float x) const {
        const unsigned bits = magnitude(x);
        if (scale_bits == 0 || scale_bits > INFINITY_BITS || bits == 0) return 0;
        if (scale_bits == INFINITY_BITS && bits != INFINITY_BITS) return 0;
        const float product = scale_bits == INFINITY_BITS ? x : __fmul_rn(x, factor);
        return rounded(fminf(fmaxf(product, -127.0f), 127.0f));
    }
};

__device__ __forceinline__ unsigned pack_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return permute_bytes(permute_bytes(a, b, 0x0040), permute_bytes(c, d, 0x0040), 0x5410);
}

// Takes the first element off a vector. Where single elements matter they are taken in a loop that is not unrolled: it is rare.
template <class E>
__device__ __forceinline__ float take_element(uint4& v) {
    if (E::PER_VECTOR == 4) {
        const float x = __uint_as_float(v.x);
        v = make_uint4(v.y, v.z, v.w, 0);
        return x;
    }
    const unsigned short bits = (unsigned short)v.x;
    v = make_uint4(v.x >> 16 | v.y << 16, v.y >> 16 | v.z << 16, v.z >> 16 | v.w << 16, v.w >> 16);
    return E::widen(*reinterpret_cast<const typename E::storage*>(&bits));
}

// Bit i is set where the low (0) or high (1) of two packed elements reaches a threshold of 16 bits, given in both halves.
__device__ __forceinline__ unsigned reaching(unsigned pair, unsigned thresholds) {
    // No half borrows: a magnitude has 15 bits, and so has the threshold.
    const unsigned m = ((pair | 0x80008000u) - thresholds) & 0x80008000u;
    return (m >> 15 | m >> 30) & 3;
}

// Takes outliers out of a vector: they become 0, and bit i of `outliers` is set for element i. Returns the largest magnitude of the others.
template <class E>
__device__ __forceinline__ unsigned take_outliers(uint4& v, const Threshold& threshold, unsigned& outliers) {
    const unsigned largest = E::absmax(v);
    if (largest < threshold.bits) return largest;
    unsigned* const word = reinterpret_cast<unsigned*>(&v);
    if constexpr (E::PER_VECTOR == 8) {
        const unsigned bits = round_up(threshold.value, E()), limits[2] = {bits << 16 | bits, E::INFINITE << 16 | E::INFINITE};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned found = reaching(word[i], limits[0]) & ~reaching(word[i], limits[1] + 0x00010001u);
            outliers |= found << 2 * i;
            word[i] &= ~((found & 1) * 0xffffu | (found & 2) * 0x7fff8000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (threshold.is_outlier(word[i] & 0x7fffffffu)) outliers |= 1u << i, word[i] = 0;
    }
    return E::absmax(v);
}

// Codes of a vector without outliers.
template <class E>
__device__ __forceinline__ void write_codes(i8* to, const uint4& vector, const RowCode& row) {
    constexpr int N = E::PER_VECTOR;
    uint2 packed = make_uint2(0, 0);
    if (row.ordinary) {
        float f[N];
        E::unpack(vector, f);
        unsigned code[N];
#pragma unroll
        for (int i = 0; i < N; i++) code[i] = RowCode::rounded(__fmul_rn(f[i], row.factor));
        packed.x = pack_bytes(code[0], code[1], code[2], code[3]);
        if (N == 8) packed.y = pack_bytes(code[N - 4], code[N - 3], code[N - 2], code[N - 1]);
    } else {
        uint4 v = vector;
#pragma unroll 1
        for (int i = 0; i < N; i++) {
            if (N == 8) packed.x = packed.x >> 8 | packed.y << 24;
            unsigned& last = N == 8 ? packed.y : packed.x;
            last = last >> 8 | row.any(take_element<E>(v)) << 24;
        }
    }
    if (N == 8)
        *reinterpret_cast<uint2*>(to) = packed;
    else
        *reinterpret_cast<unsigned*>(to) = packed.x;
}
