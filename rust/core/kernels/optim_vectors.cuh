// Eight elements a lane: reading and writing them whatever their type and address, and the arithmetic that all rules share.
#pragma once
#include "element.cuh"

typedef unsigned long long u64;

constexpr int RUN = 8;  // elements a lane
typedef float Lanes[RUN];

// Which elements of a block of 256 a lane has: eight neighbours (V = 8), or four of each half (V = 4), which keeps accesses of
// four float32 whole.
template <int V>
__device__ __forceinline__ int place(int i) {
    const int lane = threadIdx.x % WARP;
    return V == 8 ? lane * 8 + i : i / 4 * 128 + lane * 4 + i % 4;
}

// Eight elements as they lie in memory; 16-bit ones fill half of it.
struct Raw {
    unsigned w[8];
};

// One type of element, known to the compiler.
template <class E>
struct Known {
    __device__ __forceinline__ explicit Known(int) {}

    template <int V>
    __device__ __forceinline__ Raw load(const void* x, unsigned block) const {
        Raw raw;
        const unsigned lane = threadIdx.x % WARP;
        if (sizeof(typename E::storage) == 4) {
            const uint4* from = static_cast<const uint4*>(x) + (block * 64 + (V == 8 ? 2 * lane : lane));
            const uint4 a = V == 8 ? from[0] : load_once(from);
            const uint4 b = V == 8 ? from[1] : load_once(from + 32);
            raw.w[0] = a.x, raw.w[1] = a.y, raw.w[2] = a.z, raw.w[3] = a.w;
            raw.w[4] = b.x, raw.w[5] = b.y, raw.w[6] = b.z, raw.w[7] = b.w;
        } else if (V == 8) {
            const uint4 a = load_once(static_cast<const uint4*>(x) + (block * 32 + lane));
            raw.w[0] = a.x, raw.w[1] = a.y, raw.w[2] = a.z, raw.w[3] = a.w;
        } else {
            const uint2* from = static_cast<const uint2*>(x) + (block * 64 + lane);
            const uint2 a = __ldcs(from), b = __ldcs(from + 32);
            raw.w[0] = a.x, raw.w[1] = a.y, raw.w[2] = b.x, raw.w[3] = b.y;
        }
        return raw;
    }

    template <int V>
    __device__ __forceinline__ void store(const Raw& raw, void* x, unsigned block) const {
        const unsigned lane = threadIdx.x % WARP;
        if (sizeof(typename E::storage) == 4) {
            uint4* to = static_cast<uint4*>(x) + (block * 64 + (V == 8 ? 2 * lane : lane));
            __stcs(to, make_uint4(raw.w[0], raw.w[1], raw.w[2], raw.w[3]));
            __stcs(to + (V == 8 ? 1 : 32), make_uint4(raw.w[4], raw.w[5], raw.w[6], raw.w[7]));
        } else if (V == 8) {
            __stcs(static_cast<uint4*>(x) + (block * 32 + lane), make_uint4(raw.w[0], raw.w[1], raw.w[2], raw.w[3]));
        } else {
            uint2* to = static_cast<uint2*>(x) + (block * 64 + lane);
            __stcs(to, make_uint2(raw.w[0], raw.w[1]));
            __stcs(to + 32, make_uint2(raw.w[2], raw.w[3]));
        }
    }

    __device__ __forceinline__ void unpack(const Raw& raw, Lanes& f) const {
        constexpr int N = E::PER_VECTOR;
#pragma unroll
        for (int k = 0; k < RUN / N; k++) {
            float part[N];
            E::unpack(make_uint4(raw.w[4 * k], raw.w[4 * k + 1], raw.w[4 * k + 2], raw.w[4 * k + 3]), part);
#pragma unroll
            for (int i = 0; i < N; i++) f[N * k + i] = part[i];
        }
    }

    __device__ __forceinline__ Raw pack(const Lanes& f) const {
        constexpr int N = E::PER_VECTOR;
        Raw raw;
#pragma unroll
        for (int k = 0; k < RUN / N; k++) {
            float part[N];
#pragma unroll
            for (int i = 0; i < N; i++) part[i] = f[N * k + i];
            const uint4 v = E::pack(part);
            raw.w[4 * k] = v.x, raw.w[4 * k + 1] = v.y, raw.w[4 * k + 2] = v.z, raw.w[4 * k + 3] = v.w;
        }
        return raw;
    }
    __device__ __forceinline__ int size() const { return sizeof(typename E::storage); }
    __device__ __forceinline__ bool is_bf16() const { return false; }
};
template <>
__device__ __forceinline__ bool Known<BF16>::is_bf16() const { return true; }

// A type that the launch names: 0 float32, 1 float16, 2 bfloat16.
struct Named {
    int dtype;

    __device__ __forceinline__ explicit Named(int dtype) : dtype(dtype) {}

    template <int V>
    __device__ __forceinline__ Raw load(const void* x, unsigned block) const {
        return dtype == 0 ? Known<F32>(0).load<V>(x, block) : Known<BF16>(0).load<V>(x, block);
    }
    template <int V>
    __device__ __forceinline__ void store(const Raw& raw, void* x, unsigned block) const {
        if (dtype == 0) {
            Known<F32>(0).store<V>(raw, x, block);
        } else {
            Known<BF16>(0).store<V>(raw, x, block);
        }
    }
    __device__ __forceinline__ void unpack(const Raw& raw, Lanes& f) const {
        if (dtype == 0) {
            Known<F32>(0).unpack(raw, f);
        } else if (dtype == 1) {
            Known<F16>(0).unpack(raw, f);
        } else {
            Known<BF16>(0).unpack(raw, f);
        }
    }
    __device__ __forceinline__ Raw pack(const Lanes& f) const {
        if (dtype == 0) return Known<F32>(0).pack(f);
        return dtype == 1 ? Known<F16>(0).pack(f) : Known<BF16>(0).pack(f);
    }
    __device__ __forceinline__ int size() const { return dtype == 0 ? 4 : 2; }
    __device__ __forceinline__ bool is_bf16() const { return dtype == 2; }
};

// As `load`, for any address and for a block that reaches past the end, where it reads zeros.
template <int V>
__device__ __noinline__ Raw load_some(const void* x, i64 first, i64 n, int size) {
    Raw raw = {};
#pragma unroll 1
    for (int i = 0; i < RUN; i++) {
        const i64 at = first + place<V>(i);
        if (at >= n) continue;
        if (size == 4) {
            raw.w[i] = static_cast<const unsigned*>(x)[at];
        } else {
            raw.w[i / 2] |= (unsigned)static_cast<const unsigned short*>(x)[at] << (16 * (i % 2));
        }
    }
    return raw;
}

template <int V>
__device__ __noinline__ void store_some(Raw raw, void* x, i64 first, i64 n, int size) {
#pragma unroll 1
    for (int i = 0; i < RUN; i++) {
        const i64 at = first + place<V>(i);
        if (at >= n) continue;
        if (size == 4) {
            static_cast<unsigned*>(x)[at] = raw.w[i];
        } else {
            static_cast<unsigned short*>(x)[at] = (unsigned short)(raw.w[i / 2] >> (16 * (i % 2)));
        }
    }
}

// Bits of the largest magnitude of a lane's elements; those of a NaN are larger than those of infinity.
__device__ __forceinline__ unsigned largest_magnitude(const Lanes& x) {
#if __CUDA_ARCH__ >= 800
    unsigned m[RUN / 2];
#pragma unroll
    for (int i = 0; i < RUN / 2; i++) m[i] = __float_as_uint(max_nan_f32(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
    return max(max(max(m[0], m[1]), m[2]), m[3]);
#else
    unsigned m = magnitude(x[0]);
#pragma unroll
    for (int i = 1; i < RUN; i++) m = max(m, magnitude(x[i]));
    return m;
#endif
}

// The same of elements that are not negative: a negative one counts as larger than any other. Comparing floats as integers,
// Hopper takes two at a time into a maximum or minimum.
__device__ __forceinline__ unsigned largest_bits(const Lanes& x) {
    unsigned m = __float_as_uint(x[0]);
#pragma unroll
    for (int i = 1; i < RUN; i++) m = max(m, __float_as_uint(x[i]));
    return m;
}

// The division of any numbers.
__device__ __noinline__ void divide_carefully(Lanes& a, const Lanes& v, float inverse, float eps) {
#pragma unroll 1
    for (int i = 0; i < RUN; i++) a[i] = __fdiv_rn(a[i], __fadd_rn(__fmul_rn(__fsqrt_rn(v[i]), inverse), eps));
}

constexpr float SMALLEST_PLAIN = 0x1p-100f, LARGEST_PLAIN = 0x1p28f;

// What `divide_by_roots` asks of a divisor's coefficients, as flags: `plain` if none of its steps can overflow or vanish, and
// `zeros` if 2^-126 under the root changes the divisor no more than 0.
__device__ __forceinline__ unsigned divisor_flags(float inverse, float eps, unsigned plain, unsigned zeros) {
    const bool fits = inverse >= 1.0f && inverse <= 0x1p10f && eps >= 0x1p-60f && eps <= 1.0f;
    return (fits ? plain : 0) | (fits && inverse * 0x1p-36f <= eps ? zeros : 0);
}

// a / (sqrt(v) * inverse + eps) of numbers for which no step can overflow or vanish.
__device__ __forceinline__ float divide_by_root(float a, float v, float inverse, float eps) {
    const float y = root_reciprocal_approx(v);
    const float s = __fmul_rn(v, y);
    const float root = __fmaf_rn(__fmaf_rn(-s, s, v), __fmul_rn(y, 0.5f), s);
    const float d = __fadd_rn(__fmul_rn(root, inverse), eps);
    const float z = reciprocal_approx(d);
    const float r = __fmaf_rn(z, __fmaf_rn(-d, z, 1.0f), z);
    const float q = __fmul_rn(a, r);
    return __fmaf_rn(-__fmaf_rn(d, q, -a), r, q);
}

// a / (sqrt(v) * inverse + eps), each operation correctly rounded, in place of a. `largest_a` is a's `largest_magnitude`,
// `largest_v` v's or its `largest_bits`. Says whether v is known to be finite and not negative.
//
// For ordinary numbers by the very steps of the compiler's own square root and division, but with one check for all lanes in
// place of two checks and branches an element: nonzero a and v are at least 2^-100 and at most 2^28, so the divisor is at most
// 2^25, the quotient at least 2^-125 and the remainders are exact. Gradients that are exactly 0 are common: they need one more
// look. A zero a needs nothing; the remainder is taken negated so that the quotient keeps its sign. A zero v is taken as
// 2^-126, which `zeros` allows.
__device__ __forceinline__ bool divide_by_roots(Lanes& a, const Lanes& v, unsigned largest_a, unsigned largest_v,
                                                float inverse, float eps, bool plain, bool zeros) {
    // As integers; a negative v is less than all others.
    int low = __float_as_int(v[0]);
#pragma unroll
    for (int i = 1; i < RUN; i++) low = min(low, __float_as_int(v[i]));
#pragma unroll
    for (int i = 0; i < RUN; i += 2) low = min(low, __float_as_int(fminf(fabsf(a[i]), fabsf(a[i + 1]))));
    const unsigned least = __float_as_uint(SMALLEST_PLAIN);
    const bool small = plain && max(largest_a, largest_v) <= __float_as_uint(LARGEST_PLAIN);
    if (!__all_sync(FULL_WARP, small && low >= (int)least)) {
        bool fits = small && zeros;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            fits &= 2 * __float_as_uint(a[i]) - 1 >= 2 * least - 1;
            fits &= __float_as_uint(v[i]) - 1 >= least - 1 && __float_as_int(v[i]) >= 0;
        }
        if (!__all_sync(FULL_WARP, fits)) {
            float b[RUN], w[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) b[i] = a[i], w[i] = v[i];
            divide_carefully(b, w, inverse, eps);
#pragma unroll
            for (int i = 0; i < RUN; i++) a[i] = b[i];
            return false;
        }
#pragma unroll
        for (int i = 0; i < RUN; i++) a[i] = divide_by_root(a[i], fmaxf(v[i], 0x1p-126f), inverse, eps);
        return true;
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) a[i] = divide_by_root(a[i], v[i], inverse, eps);
    return true;
}

// ---- stochastic rounding ----

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
__device__ __forceinline__ uint4 philox(uint4 counter, unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)0xd2511f53u * counter.x, b = (u64)0xcd9e8d57u * counter.z;
        counter = make_uint4((unsigned)(b >> 32) ^ counter.y ^ key0, (unsigned)b, (unsigned)(a >> 32) ^ counter.w ^ key1,
                             (unsigned)a);
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return counter;
}

// The bits of x, a result of arithmetic, plus 16 random ones: the bfloat16 in the upper half is a neighbour of x, with a chance
// that is the nearer it is the larger. Infinity stays. A NaN of arithmetic, 0x7fffffff, would overflow into the sign: it is
// smaller as a signed integer then, while every other sum is larger than what it came from.
__device__ __forceinline__ unsigned add_random(float x, unsigned random) {
    return (unsigned)max((int)(__float_as_uint(x) + random), __float_as_int(x));
}

// A lane's parameters as bfloat16. `block_start` is the block's place in its tensor, a multiple of 256; a counter serves eight
// neighbours, so that two lanes draw the same words where lanes have runs of four.
template <int V>
__device__ __forceinline__ Raw round_stochastically(const Lanes& p, u64 block_start, unsigned t, unsigned ordinal, u64 seed) {
    Raw raw;
    uint4 words;
#pragma unroll
    for (int k = 0; k < RUN / V; k++) {
        const u64 eighth = (block_start + place<V>(k * V)) / 8;
        const uint4 counter = make_uint4((unsigned)eighth, (unsigned)(eighth >> 32), t, ordinal);
        words = philox(counter, (unsigned)seed, (unsigned)(seed >> 32));
        const bool upper = V == 4 && threadIdx.x & 1;
        const unsigned w[4] = {upper ? words.z : words.x, upper ? words.w : words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            const unsigned low = add_random(p[k * V + i], w[i / 2] & 0xffffu);
            const unsigned high = add_random(p[k * V + i + 1], w[i / 2] >> 16);
            raw.w[(k * V + i) / 2] = __byte_perm(low, high, 0x7632);
        }
    }
    return raw;
}
