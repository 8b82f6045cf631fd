// The three floating-point types as 16-byte vectors: load, unpack to float32, largest magnitude, round and store.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

typedef long long i64;
typedef unsigned char u8;

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr unsigned LARGEST_FINITE = 0x7f7fffffu;  // bits of FLT_MAX

// Bits of the float32 absolute value.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct F32 {
    typedef float storage;
    static constexpr int PER_VECTOR = 4;

    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[4]) {
        f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y);
        f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
    }
    static __device__ __forceinline__ uint4 pack(const float (&f)[4]) {
        return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
    }
    // Bits of the largest |x|; those of a NaN are larger than those of infinity.
    static __device__ __forceinline__ unsigned absmax(const uint4& v) {
#if __CUDA_ARCH__ >= 800
        const float xy = max_nan_f32(fabsf(__uint_as_float(v.x)), fabsf(__uint_as_float(v.y)));
        const float zw = max_nan_f32(fabsf(__uint_as_float(v.z)), fabsf(__uint_as_float(v.w)));
        return __float_as_uint(max_nan_f32(xy, zw));
#else
        const unsigned mask = 0x7fffffffu;
        return max(max(v.x & mask, v.y & mask), max(v.z & mask, v.w & mask));
#endif
    }
    // All ones in the nibble of each negative element, two elements a byte, the first in the high nibble.
    static __device__ __forceinline__ unsigned negative_nibbles(const uint4& v) {
        const unsigned first = permute_bytes(v.x, v.z, 0x00fb), second = permute_bytes(v.y, v.w, 0x00fb);
        return (first & 0xf0f0f0f0u) | (second & 0x0f0f0f0fu);
    }
};

// As F32::negative_nibbles, for two elements a word.
__device__ __forceinline__ unsigned negative_nibbles_16bit(const uint4& v) {
    const unsigned p = permute_bytes(v.x, v.y, 0x7351), q = permute_bytes(v.z, v.w, 0x7351);
    const unsigned first = permute_bytes(p, q, 0xdc98), second = permute_bytes(p, q, 0xfeba);
    return (first & 0xf0f0f0f0u) | (second & 0x0f0f0f0fu);
}

struct BF16 {
    typedef __nv_bfloat16 storage;
    static constexpr int PER_VECTOR = 8;
    static constexpr unsigned INFINITE = 0x7f80;  // its bits

    static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
        const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            f[2 * i] = __uint_as_float(w[i] << 16);
            f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ unsigned pack2(float low, float high) {
#if __CUDA_ARCH__ >= 800
        return pack_bf16x2(low, high);
#else
        return __bfloat16_as_ushort(narrow(low)) | (unsigned)__bfloat16_as_ushort(narrow(high)) << 16;
#endif
    }
    static __device__ __forceinline__ uint4 pack(const float (&f)[8]) {
        return make_uint4(pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7]));
    }
    static __device__ __forceinline__ unsigned absmax(const uint4& v) {
        const unsigned mask = 0x7fff7fffu;
#if __CUDA_ARCH__ >= 800
        unsigned m = max_nan_bf16x2(max_nan_bf16x2(v.x & mask, v.y & mask), max_nan_bf16x2(v.z & mask, v.w & mask));
        return max(m << 16, m & 0xffff0000u);
#else
        const unsigned w[4] = {v.x & mask, v.y & mask, v.z & mask, v.w & mask};
        unsigned m = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) m = max(m, max(w[i] << 16, w[i] & 0xffff0000u));
        return m;
#endif
    }
    static __device__ __forceinline__ unsigned negative_nibbles(const uint4& v) { return negative_nibbles_16bit(v); }
};

struct F16 {
    typedef __half storage;
    static constexpr int PER_VECTOR = 8;
    static constexpr unsigned INFINITE = 0x7c00;  // its bits

    static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
    static __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ float2 unpack2(unsigned w) {
        return make_float2(__half2float(__ushort_as_half((unsigned short)w)),
                           __half2float(__ushort_as_half((unsigned short)(w >> 16))));
    }
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
        const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 p = unpack2(w[i]);
            f[2 * i] = p.x, f[2 * i + 1] = p.y;
        }
    }
    static __device__ __forceinline__ unsigned pack2(float low, float high) {
        __half2 h = __floats2half2_rn(low, high);
        return *reinterpret_cast<unsigned*>(&h);
    }
    static __device__ __forceinline__ uint4 pack(const float (&f)[8]) {
        return make_uint4(pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7]));
    }
    static __device__ __forceinline__ unsigned absmax(const uint4& v) {
        const unsigned mask = 0x7fff7fffu;
#if __CUDA_ARCH__ >= 800
        unsigned m = max_nan_f16x2(max_nan_f16x2(v.x & mask, v.y & mask), max_nan_f16x2(v.z & mask, v.w & mask));
        float2 p = unpack2(m);
        return max(magnitude(p.x), magnitude(p.y));
#else
        float f[8];
        unpack(v, f);
        unsigned m = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) m = max(m, magnitude(f[i]));
        return m;
#endif
    }
    static __device__ __forceinline__ unsigned negative_nibbles(const uint4& v) { return negative_nibbles_16bit(v); }
};

// Vector `index` of a tensor of n elements; elements past the end read as 0. `aligned`: the tensor starts on 16 bytes.
template <class E>
__device__ __forceinline__ uint4 load_vector(const typename E::storage* x, i64 index, i64 n, bool aligned) {
    const i64 first = index * E::PER_VECTOR;
    if (aligned && first + E::PER_VECTOR <= n) return load_once(reinterpret_cast<const uint4*>(x) + index);
    float f[E::PER_VECTOR];
#pragma unroll
    for (int i = 0; i < E::PER_VECTOR; i++) f[i] = first + i < n ? E::widen(x[first + i]) : 0.0f;
    return E::pack(f);
}

__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
    return (reinterpret_cast<unsigned long long>(p) & (bytes - 1)) == 0;
}

// The largest value among `lanes` (a power of two) neighbouring lanes, in each of them.
__device__ __forceinline__ unsigned max_over_lanes(unsigned m, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) m = max(m, __shfl_xor_sync(FULL_WARP, m, distance));
    return m;
}

// The largest value of a warp, in every lane.
__device__ __forceinline__ unsigned warp_max(unsigned m) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_WARP, m);
#else
    return max_over_lanes(m, WARP);
#endif
}
