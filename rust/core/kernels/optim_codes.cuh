// 8-bit states: 256 codes and one float32 scale a block, decoded and encoded by the warp that updates the block.
//
// value = map[code] * scale. The maps stand in shared memory once for each bank (or each quarter of the lanes, where shared
// memory is small), a row a code, so that no two lanes meet. A new state's scale is its largest magnitude and its
// codes are quantize.cu's, one read of the bucket table each.
#pragma once
#include "nearest.cuh"
#include "optim_vectors.cuh"

// Copies of a map. What the launch asks for depends on it (core/src/cuda/kernel.rs).
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int COPIES = 32;
#else
constexpr int COPIES = 8;
#endif

constexpr int MAP = 256 * COPIES;  // values of a map

struct __align__(16) CodeTables {
    float values[2 * MAP];  // the signed map's, the unsigned map's
    unsigned of_signed[DYNAMIC_PADDED];
    unsigned of_unsigned[DYNAMIC_UNSIGNED_PADDED];  // from 0 on
};

// Fills the tables; the caller synchronizes. A thread has one value of one map, which a warp's threads write to different
// banks.
template <bool WITH_UNSIGNED>
__device__ __forceinline__ void load_code_tables(CodeTables& tables) {
    constexpr int CHUNKS = COPIES / 4;
    for (int i = threadIdx.x; i < (WITH_UNSIGNED ? 512 : 256); i += blockDim.x) {
        const int code = i % 256;
        const float value = i < 256 ? DYNAMIC_VALUES[code] : DYNAMIC_UNSIGNED_VALUES[code];
        float4* row = reinterpret_cast<float4*>(tables.values + i * COPIES);
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) row[(k + code) % CHUNKS] = make_float4(value, value, value, value);
    }
    load_table(tables.of_signed, DYNAMIC_ENTRIES, DYNAMIC_LENGTH);
    if (WITH_UNSIGNED) load_table(tables.of_unsigned, DYNAMIC_UNSIGNED_ENTRIES, DYNAMIC_UNSIGNED_LENGTH);
}

// Eight codes as they lie in memory. A block that reaches past the end, or an odd address, is read byte by byte; past the end
// are codes of 0.
template <int V>
__device__ __noinline__ uint2 load_some_codes(const u8* codes, i64 first, i64 n, unsigned zero) {
    unsigned w[2] = {};
#pragma unroll 1
    for (int i = 0; i < RUN; i++) {
        const i64 at = first + place<V>(i);
        w[i / 4] |= (at < n ? codes[at] : zero) << (8 * (i % 4));
    }
    return make_uint2(w[0], w[1]);
}

template <int V>
__device__ __noinline__ void store_some_codes(uint2 packed, u8* codes, i64 first, i64 n) {
#pragma unroll 1
    for (int i = 0; i < RUN; i++) {
        const i64 at = first + place<V>(i);
        if (at < n) codes[at] = (u8)((i < 4 ? packed.x : packed.y) >> (8 * (i % 4)));
    }
}

template <int V>
__device__ __forceinline__ uint2 load_codes(const u8* codes, unsigned block) {
    const unsigned lane = threadIdx.x % WARP;
    if (V == 8) return __ldcs(reinterpret_cast<const uint2*>(codes) + (block * 32 + lane));
    const unsigned* from = reinterpret_cast<const unsigned*>(codes) + (block * 64 + lane);
    return make_uint2(__ldcs(from), __ldcs(from + 32));
}

template <int V>
__device__ __forceinline__ void store_codes(uint2 packed, u8* codes, unsigned block) {
    const unsigned lane = threadIdx.x % WARP;
    if (V == 8) {
        __stcs(reinterpret_cast<uint2*>(codes) + (block * 32 + lane), packed);
    } else {
        unsigned* to = reinterpret_cast<unsigned*>(codes) + (block * 64 + lane);
        __stcs(to, packed.x);
        __stcs(to + 32, packed.y);
    }
}

// Where the tables lie, as a number that the compiler keeps: it would work it out anew for every table of every block. Called
// by whole warps.
__device__ __forceinline__ unsigned tables_address(const CodeTables& tables) {
    return __shfl_sync(FULL_WARP, shared_address(&tables), 0);
}

template <bool SIGNED>
__device__ __forceinline__ void decode(unsigned tables, uint2 packed, float scale, Lanes& s) {
    constexpr unsigned ROW = COPIES * 4;
    const unsigned own = tables + threadIdx.x % COPIES * 4;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        // One byte of the word times ROW, plus `own`.
        const unsigned at = __dp4a(i < 4 ? packed.x : packed.y, ROW << (8 * (i % 4)), own);
        s[i] = __fmul_rn(__uint_as_float(load_shared(at + (SIGNED ? 0 : 4 * MAP))), scale);
    }
}

// The rank of t, already scaled, in the word's highest byte; of t >= 0 for the unsigned map.
template <bool SIGNED>
__device__ __forceinline__ unsigned nearest_rank(unsigned tables, float scaled) {
    if (SIGNED) {
        const int key = ordered(scaled);
        const unsigned entry = tables + (key >> SHIFT_8BIT) * 4 + (2 * MAP + DYNAMIC_ORIGIN) * 4;
        return load_shared(entry) + ((unsigned)key << LIFT_8BIT);
    }
    static_assert(SHIFT_UNSIGNED == 16, "a bucket is the upper half of a key");
    const unsigned key = __float_as_uint(scaled);
    const unsigned entry = add_upper_half<4>(key, tables) + (2 * MAP + DYNAMIC_PADDED) * 4;
    return load_shared(entry) + (key << LIFT_UNSIGNED);
}

template <bool SIGNED>
__device__ __forceinline__ unsigned nearest_four(unsigned tables, float a, float b, float c, float d) {
    const unsigned ab = __byte_perm(nearest_rank<SIGNED>(tables, a), nearest_rank<SIGNED>(tables, b), 0x0073);
    const unsigned cd = __byte_perm(nearest_rank<SIGNED>(tables, c), nearest_rank<SIGNED>(tables, d), 0x0073);
    return __byte_perm(ab, cd, 0x5410);
}

// Any numbers: what is not finite is made so, the reciprocal may overflow.
template <bool SIGNED>
__device__ __noinline__ uint2 encode_carefully(unsigned tables, const Lanes& s, unsigned& largest) {
    unsigned m = 0;
#pragma unroll 1
    for (int i = 0; i < RUN; i++) m = max(m, magnitude(finite(s[i])));
    largest = warp_max(m);
    const Divisor divisor(__uint_as_float(largest));
    unsigned w[2] = {};
#pragma unroll 1
    for (int i = 0; i < RUN; i++) {
        const float t = divisor.quotient(finite(s[i]));
        const float scaled = SIGNED ? __fmul_rn(t, DYNAMIC_SCALE) : __fmul_rn(fmaxf(t, 0.0f), DYNAMIC_UNSIGNED_SCALE);
        const unsigned rank = nearest_rank<SIGNED>(tables, scaled);
        w[i / 4] |= rank >> 24 << (8 * (i % 4));
    }
    return make_uint2(w[0], w[1]);
}

// Codes of a block. `largest`: the lane's `largest_magnitude` comes in, the bits of the block's scale go out, in every lane.
// `plain`: states of the unsigned map are known to be not negative.
template <bool SIGNED>
__device__ __forceinline__ uint2 encode(unsigned tables, const Lanes& s, unsigned& largest, bool plain) {
    constexpr float SCALE = SIGNED ? DYNAMIC_SCALE : DYNAMIC_UNSIGNED_SCALE;
    largest = warp_max(largest);
    // From 2^-126, and up to where the reciprocal takes the scale in exactly.
    constexpr float BEYOND = SCALE * 0x1p126f;
    const unsigned smallest = 0x00800000u;
    const bool ordinary = largest == 0 || largest - smallest < __float_as_uint(BEYOND) - smallest;
    if (!(SIGNED || plain) || !ordinary) {
        float copy[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) copy[i] = s[i];
        unsigned found;
        const uint2 codes = encode_carefully<SIGNED>(tables, copy, found);
        largest = found;
        return codes;
    }
    const float inverse = __fmul_rn(reciprocal(__uint_as_float(largest)), SCALE);
    const auto t = [&](int i) { return __fmul_rn(s[i], inverse); };
    return make_uint2(nearest_four<SIGNED>(tables, t(0), t(1), t(2), t(3)),
                      nearest_four<SIGNED>(tables, t(4), t(5), t(6), t(7)));
}
