// Outlier columns on 16-bit tensor cores, with x itself:
//
//   y[i][j] = (sum over columns that are none of A[i][c] W[j][c]) * row[i] * col[j] / 127^2 + (sum over outlier columns of x[i][c] W[j][c]) * col[j] / 127
//
// It is int8.cuh's formula: what an outlier column's codes give and what they leave over add up to x. In both sums W's columns of the
// other kind become 0, in registers; an int8 is exact in 16 bits.
#pragma once
#include "int8.cuh"

struct ProductBF16;
struct ProductF16;

// In products of warpgroups outlier columns are many where there is one in every FEW: below, each by itself costs less than a second pass.
constexpr int FEW = 128;

template <class E>
struct SixteenBits {
    static constexpr bool HAS = false;
};
template <>
struct SixteenBits<BF16> {
    static constexpr bool HAS = true;
    typedef ProductBF16 Product;

    // The two int8 of the lower half, as two elements; 0 where `kept` is: 128 + the lower seven bits, less 256 or 128 for the sign.
    static __device__ __forceinline__ unsigned from_codes(unsigned two, unsigned kept) {
        const unsigned v = permute_bytes(two, 0x43434343u, 0x4140);
        return subtract_bf16x2(and3<0xff7fff7fu>(v, kept), and3<0xff80ff80u>(v, kept));
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_bf16(d, a, b0, b1); }
};
template <>
struct SixteenBits<F16> {
    static constexpr bool HAS = true;
    typedef ProductF16 Product;

    // 1024 + (code + 128), less 1152.
    static __device__ __forceinline__ unsigned from_codes(unsigned two, unsigned kept) {
        return subtract_f16x2(permute_bytes(two, 0x64646464u, 0x4140) ^ 0x00800080u, 0x64806480u) & kept;
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_f16(d, a, b0, b1); }
};

// Which columns are outliers, a word of 32 at a time.
struct ColumnKinds {
    const unsigned* mask;
    int k;

    __device__ __forceinline__ unsigned outliers(int word) const { return word * 32 < k ? mask[word] : 0; }
    // Columns past the last are of neither kind.
    __device__ __forceinline__ unsigned others(int word) const {
        const int columns = k - word * 32;
        const unsigned inside = columns >= 32 ? ~0u : columns > 0 ? (1u << columns) - 1 : 0;
        return inside & ~outliers(word);
    }
    // Of 128 columns, and of 64.
    __device__ __forceinline__ bool has_others(int slot) const {
        return (others(slot * 4) | others(slot * 4 + 1) | others(slot * 4 + 2) | others(slot * 4 + 3)) != 0;
    }
    __device__ __forceinline__ bool has_outliers(int half_slot) const { return (outliers(half_slot * 2) | outliers(half_slot * 2 + 1)) != 0; }

    // By a warp.
    __device__ __forceinline__ bool are_many() const {
        int count = 0;
#pragma unroll 8
        for (int word = threadIdx.x % WARP; word < (k + 31) / 32; word += WARP) count += __popc(mask[word]);
        return __reduce_add_sync(FULL_WARP, count) > k / FEW;
    }
};

// Byte i of the result is 0xff where bit i is set.
__device__ __forceinline__ unsigned byte_mask(unsigned bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) * 0xffu; }
// The lower half is 0xffff where bit 8 * place is set, the upper half where the next one is.
template <int PLACE>
__device__ __forceinline__ unsigned half_mask(unsigned bits) {
    // Bytes whose sign is the bit; what is taken is the sign, eight times.
    return permute_bytes(bits << 7, bits << 6, 0xcc88 + 0x1111 * PLACE);
}

// Fragments of a slot's codes: rows `row` and row + 8 of a swizzled box of 128 columns; `address` is where the row lies.
//
// Where `others` has bits, 32 columns a step.
__device__ __forceinline__ void other_fragments(unsigned address, int row, const unsigned (&others)[4], unsigned (&a)[4][4]) {
    const int t = threadIdx.x % 4 * 4;
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned kept = byte_mask(others[s] >> (half * 16 + t)), at = address + (((2 * s + half) ^ (row & 7)) << 4) + t;
            a[s][2 * half] = load_shared(at) & kept, a[s][2 * half + 1] = load_shared(at + 8 * 128) & kept;
        }
}

// Of half the slot, in 16 bits, where `outliers` has bits, 16 columns a step.
template <class E>
__device__ __forceinline__ void outlier_fragments(unsigned address, int row, int half_slot, const unsigned (&outliers)[2], unsigned (&a)[4][4]) {
    const int t = threadIdx.x % 4 * 2;
#pragma unroll
    for (int word = 0; word < 2; word++) {
        const unsigned bits = outliers[word] >> t;
        const unsigned kept[4] = {half_mask<0>(bits), half_mask<1>(bits), half_mask<2>(bits), half_mask<3>(bits)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int s = word * 2 + i / 2;
            const unsigned at = address + (((half_slot * 4 + s) ^ (row & 7)) << 4) + t + i % 2 * 8;
            a[s][i % 2 * 2] = SixteenBits<E>::from_codes(load_shared_u16(at), kept[i]);
            a[s][i % 2 * 2 + 1] = SixteenBits<E>::from_codes(load_shared_u16(at + 8 * 128), kept[i]);
        }
    }
}
