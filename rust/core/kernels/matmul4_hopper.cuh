// What the two products by warpgroups share: the problem, rings between the copy engine and the warpgroups, the block scales of a
// thread's rows, and the way of the sums to memory.
#pragma once
#include "matmul4.cuh"
#include "wgmma.cuh"

constexpr int SLOT_COLUMNS = 256;  // of a slot of codes
constexpr int STEP = 64;           // columns of a slot of tokens
constexpr int SLOT_STEPS = SLOT_COLUMNS / STEP;

// One position of a ring, and the parity of its round.
template <int SLOTS>
struct Cursor {
    int slot = 0, round = 0;

    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, round ^= 1;
    }
};

struct Barriers {
    unsigned codes_here, codes_free, tokens_here, tokens_free;

    __device__ __forceinline__ explicit Barriers(unsigned base)
        : codes_here(base), codes_free(base + 64), tokens_here(base + 128), tokens_free(base + 256) {}
};

// Where results go: y is m x n, the bias n of E or null.
struct Output {
    const void* bias;
    void* y;
    int m, n;
};

struct Problem {
    TensorMap codes;   // bytes, n x k / 2; boxes of a block's rows x 128, swizzled by 128 bytes
    TensorMap scales;  // n x k / blocksize float32 or u8; boxes of a block's rows x 16 bytes
    TensorMap tokens;  // m x k of E; boxes of some tokens x 64, swizzled by 128 bytes
    NestedSource nested;
    Output out;
    int k, log2_blocksize, quant_type;

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

constexpr int WRITE_STAGING = 32 * 16 * 2;  // bytes of shared memory through which a warp writes, 32 tokens of 16 rows at a time

// Adds the bias, rounds, transposes through this warp's own shared memory and writes.
template <class E, int SUMS>
__device__ __forceinline__ void write_sums(const Output& p, unsigned staging, int token0, int row0, const float (&sum)[SUMS]) {
    constexpr int WRITE_TOKENS = SUMS * 2 < 32 ? SUMS * 2 : 32;
    const int lane = threadIdx.x % WARP, own = row0 + lane / 4;
    float upper = 0.0f, lower = 0.0f;
    if (p.bias) {
        upper = own < p.n ? E::widen(((const typename E::storage*)p.bias)[own]) : 0.0f;
        lower = own + 8 < p.n ? E::widen(((const typename E::storage*)p.bias)[own + 8]) : 0.0f;
    }
    const bool aligned = p.n % 8 == 0 && is_aligned(p.y, 16);
    // A token's 32 bytes are two pieces; every fourth token swaps them, so that eight tokens meet all banks.
    const int to_token = lane / 16 * 8 + lane % 8, to = to_token * 32 + (((lane / 8) ^ (lane / 4)) & 1) * 16;
    const int from_token = lane / 2, piece = lane & 1, from = from_token * 32 + ((piece ^ (from_token >> 2)) & 1) * 16;
    const int row = row0 + piece * 8;
#pragma unroll
    for (int o = 0; o < SUMS * 2 / WRITE_TOKENS; o++) {
        if (token0 + o * WRITE_TOKENS >= p.m) break;
        __syncwarp();  // the chunk before has been read
#pragma unroll
        for (int pair = 0; pair < WRITE_TOKENS / 16; pair++) {
            const float* v = &sum[(o * (WRITE_TOKENS / 8) + pair * 2) * 4];
            // Matrices: upper rows and lower rows of eight tokens, then of the next eight.
            store_transposed(staging + pair * 512 + to, E::pack2(v[0] + upper, v[1] + upper), E::pack2(v[2] + lower, v[3] + lower),
                             E::pack2(v[4] + upper, v[5] + upper), E::pack2(v[6] + lower, v[7] + lower));
        }
        __syncwarp();
#pragma unroll
        for (int pair = 0; pair < WRITE_TOKENS / 16; pair++) {
            const int token = token0 + o * WRITE_TOKENS + pair * 16 + from_token;
            const uint4 v = load_shared4(staging + pair * 512 + from);
            if (token >= p.m || row >= p.n) continue;
            typename E::storage* const y = (typename E::storage*)p.y + ((i64)token * p.n + row);
            if (aligned) {
                *reinterpret_cast<uint4*>(y) = v;
            } else {
                const typename E::storage* const values = reinterpret_cast<const typename E::storage*>(&v);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (row + i < p.n) y[i] = values[i];
            }
        }
    }
}

// The descriptor of tokens in shared memory for the tensor cores: rows of 128 bytes, swizzled; eight of them every 1024 bytes.
__device__ __forceinline__ unsigned long long token_descriptor(unsigned address) {
    return (unsigned long long)(address >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
