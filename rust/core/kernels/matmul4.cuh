// What the products with a 4-bit weight share: the table that turns a byte into two values, and the block scales.
#pragma once
#include "decode.cuh"
#include "tensor_map.cuh"

// (What a kernel that starts before the previous one has ended reads after its wait, it reads by ordinary loads: the read-only path
// need not see what was written meanwhile.)

// Where nested scales come from (see double_quant.cu): nested_code[codes[b]] * nested_absmax[b >> log2_nested] + *offset. The codes
// themselves, like plain float32 scales, are copied with the weight's.
struct NestedSource {
    const float* code;  // or null for the signed dynamic map
    const float* absmax;
    const float* offset;
    int log2_blocksize;

    __device__ __forceinline__ float absmax_of(i64 block) const { return absmax[block >> log2_blocksize]; }
};

// What depends on the type of the activations.
struct ProductBF16 : BF16 {
    static constexpr float NF4_FACTOR = NF4_BF16_FACTOR, FP4_FACTOR = FP4_BF16_FACTOR;
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_bf16(d, a, b0, b1);
    }
};

struct ProductF16 : F16 {
    static constexpr float NF4_FACTOR = NF4_F16_FACTOR, FP4_FACTOR = FP4_F16_FACTOR;
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_f16(d, a, b0, b1);
    }
};

template <class E>
__device__ __forceinline__ float product_factor(int quant_type) {
    return quant_type == QUANT_TYPE_FP4 ? E::FP4_FACTOR : E::NF4_FACTOR;
}

// The table byte -> (value of the high nibble, value of the low nibble) as a packed pair, the first in the low half: a copy for
// each of the 32 banks side by side, so that lane l always reads bank l. It starts at a multiple of its size.
// STRIDE is how many bytes an entry takes. With 128 the copies fill them. With 256 they take the first half (the other is free for
// other use), and one byte permutation makes an address instead of two operations: the byte is its second byte.
template <class E, int STRIDE>
struct PairTable {
    static_assert(STRIDE == 128 || STRIDE == 256, "32 copies of 4 bytes, or room for them twice");
    static constexpr int BYTES = 256 * STRIDE;

    // The caller synchronizes.
    static __device__ __forceinline__ void fill(unsigned address, int quant_type) {
        const int lane = threadIdx.x % WARP;
        const float* values = quant_type == QUANT_TYPE_FP4 ? FP4_VALUES : NF4_VALUES;
        const float own = values[lane & 15] * product_factor<E>(quant_type);
        // A thread writes 16 bytes: four copies of an entry. Eight threads share an entry, a warp takes four entries at a time.
        for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
            const int entry = i / 8;
            const float high = __shfl_sync(FULL_WARP, own, entry >> 4), low = __shfl_sync(FULL_WARP, own, entry & 15);
            const unsigned pair = E::pack2(high, low);
            store_shared4(address + entry * STRIDE + i % 8 * 16, make_uint4(pair, pair, pair, pair));
        }
    }

    // The entry of byte INDEX of a word. `lane_base` is the table's address plus four times the lane; with `start` less that of `start`,
    // so that a table may start where it likes.
    template <int INDEX>
    static __device__ __forceinline__ unsigned look_up(unsigned word, unsigned lane_base, unsigned start = 0) {
        if (STRIDE == 256) return load_shared(start + permute_bytes(word, lane_base, 0x7604 | INDEX << 4));
        constexpr int SHIFT = 8 * INDEX - 7;  // the byte comes to bits 7 ... 14
        const unsigned shifted = SHIFT < 0 ? word << (SHIFT < 0 ? -SHIFT : 0) : word >> (SHIFT < 0 ? 0 : SHIFT);
        return load_shared(start + ((shifted & 0x7f80u) | lane_base));
    }
};
