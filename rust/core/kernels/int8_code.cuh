// How elements of a row become int8 codes, and which are outliers. int8_rows.cu gives the formula.
#pragma once
#include "int8.cuh"

// Bits of the threshold as those of magnitudes; no magnitude reaches what stands for none.
__device__ __forceinline__ unsigned threshold_bits(float threshold) { return threshold > 0.0f ? __float_as_uint(threshold) : 0xffffffffu; }

constexpr unsigned INFINITY_BITS = 0x7f800000u;

__device__ __forceinline__ bool is_outlier(unsigned bits, unsigned threshold) { return bits >= threshold && bits <= INFINITY_BITS; }

// What turns elements of a row into codes.
struct RowCode {
    unsigned scale_bits, threshold;
    float factor;
    bool ordinary;  // the factor is finite and not 0

    __device__ __forceinline__ RowCode(unsigned scale_bits, unsigned threshold) : scale_bits(scale_bits), threshold(threshold) {
        factor = __fdiv_rn(127.0f, __uint_as_float(scale_bits));
        ordinary = factor > 0.0f && magnitude(factor) < INFINITY_BITS;
    }

    // The low byte is the code: adding 1.5 * 2^23 rounds to an integer, ties to even.
    static __device__ __forceinline__ unsigned rounded(float product) { return __float_as_uint(__fadd_rn(product, 12582912.0f)); }

    // Any element of any row.
    __device__ __forceinline__ unsigned any(float x) const {
        const unsigned bits = magnitude(x);
        if (is_outlier(bits, threshold) || scale_bits == 0 || scale_bits > INFINITY_BITS || bits == 0) return 0;
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

// The largest magnitude of a vector's elements that are no outliers; bit i of `outliers` is set where element i is one.
template <class E>
__device__ __forceinline__ unsigned inner_absmax(uint4 v, unsigned threshold, unsigned& outliers) {
    const unsigned largest = E::absmax(v);
    if (largest < threshold) return largest;
    unsigned inner = 0;
#pragma unroll 1
    for (int i = 0; i < E::PER_VECTOR; i++) {
        const unsigned bits = magnitude(take_element<E>(v));
        if (is_outlier(bits, threshold))
            outliers |= 1u << i;
        else
            inner = max(inner, bits);
    }
    return inner;
}

// `ordinary`: the row is, and the vector has no outliers.
template <class E>
__device__ __forceinline__ void write_codes(i8* to, uint4 v, const RowCode& row, bool ordinary) {
    constexpr int N = E::PER_VECTOR;
    uint2 packed = make_uint2(0, 0);
    if (ordinary) {
        float f[N];
        E::unpack(v, f);
        unsigned code[N];
#pragma unroll
        for (int i = 0; i < N; i++) code[i] = RowCode::rounded(__fmul_rn(f[i], row.factor));
        packed.x = pack_bytes(code[0], code[1], code[2], code[3]);
        if (N == 8) packed.y = pack_bytes(code[N - 4], code[N - 3], code[N - 2], code[N - 1]);
    } else {
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
