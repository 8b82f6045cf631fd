// What the two 4-bit products by warpgroups share: the problem, rings between the copy engine and the warpgroups, and the block scales
// of a thread's rows.
#pragma once
#include "hopper.cuh"
#include "matmul4.cuh"

constexpr int SLOT_COLUMNS = 256;  // of a slot of codes
constexpr int STEP = 64;           // columns of a slot of tokens
constexpr int SLOT_STEPS = SLOT_COLUMNS / STEP;

struct Barriers {
    unsigned codes_here, codes_free, tokens_here, tokens_free;

    __device__ __forceinline__ explicit Barriers(unsigned base)
        : codes_here(base), codes_free(base + 64), tokens_here(base + 128), tokens_free(base + 256) {}
};

struct Problem {
    TensorMap codes;   // bytes, n x k / 2; boxes of a block's rows x 128, swizzled by 128 bytes
    TensorMap scales;  // n x k / blocksize float32 or u8; boxes of a block's rows x 16 bytes
    TensorMap tokens;  // m x k of E; boxes of some tokens x 64, swizzled by 128 bytes
    NestedSource nested;
    Output out;
    int k, log2_blocksize, quant_type;
    int settled;  // 0 where the kernel before may still write the codes or the scales

    // Whole slots of codes: what lies past the last column reads as 0.
    __device__ __forceinline__ int slot_count() const { return (k + SLOT_COLUMNS - 1) / SLOT_COLUMNS; }
    // The scales that are copied for a slot start at a multiple of 16 bytes.
    __device__ __forceinline__ int first_scale(int slot, bool is_nested) const {
        return (slot * SLOT_COLUMNS >> log2_blocksize) & (is_nested ? ~15 : ~3);
    }
};

// The scales of two rows of a thread, `row` and the one 8 below, counted from the block's first. The maxima of nested scales are read
// a slot ahead: rows have a multiple of 16 scales, which the copy engine asks for, so a slot's have one maximum.
template <bool NESTED>
struct RowScales {
    const float* code;  // 256 values in shared memory
    float offset, absmax[2], next[2];
    int row;

    __device__ __forceinline__ RowScales(const Problem& p, const float* code, int row) : code(code), row(row) {
        offset = NESTED ? *p.nested.offset : 0.0f;
    }

    // Before a tile's or a piece's first slot.
    __device__ __forceinline__ void start(const Problem& p, int row0, int slot) {
        if (!NESTED) return;
        next[0] = maximum(p, row0 + row, slot), next[1] = maximum(p, row0 + row + 8, slot);
    }
    // At the beginning of a slot.
    __device__ __forceinline__ void advance(const Problem& p, int row0, int slot) {
        if (!NESTED) return;
        absmax[0] = next[0], absmax[1] = next[1];
        start(p, row0, slot + 1);
    }
    static __device__ __forceinline__ float maximum(const Problem& p, int row, int slot) {
        const int pitch = p.k >> p.log2_blocksize;
        const int column = min(slot * SLOT_COLUMNS >> p.log2_blocksize, pitch - 1);
        return p.nested.absmax_of((i64)min(row, p.out.n - 1) * pitch + column);
    }

    // That of step q of a slot, whose scales are at `scales`.
    template <int LOWER>
    __device__ __forceinline__ float read(const Problem& p, unsigned scales, int slot, int q) const {
        const int within = ((slot * SLOT_COLUMNS + q * STEP) >> p.log2_blocksize) - p.first_scale(slot, NESTED);
        const unsigned at = scales + (row + 8 * LOWER) * 16;
        if (!NESTED) return __uint_as_float(load_shared(at + within * 4));
        return nested_scale(code[load_shared_u8(at + within)], absmax[LOWER], offset);
    }
};
