// What a block of int8_skinny.cu keeps in shared memory, and where.
#pragma once
#include "int8_code.cuh"
#include "int8_gather.cuh"
#include "tensor_map.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int BOX = 128;     // columns, and bytes, of a box
constexpr int LIST = 32;     // outlier columns that are few
constexpr int OWN_BYTES = 64 * 1024;

struct Problem {
    TensorMap weight;  // n x k bytes; boxes of 16 * RT x 128, swizzled by 128 bytes
    TensorMap codes;   // m x k bytes; boxes of 8 * NT x 128, swizzled by 128 bytes; where they are copied
    Operands o;        // codes and row_scale only where they are copied
    float threshold;   // where they are not
    // The previous kernel has quantized the rows as few ones: it lets this one start no sooner than W can be read, and each row has a
    // mask of its own.
    int after_rows;
};

enum Tokens { OWN, KEPT, COPIED };

template <class Type, Tokens HOW, int NT, int RT, int DEPTH>
struct SkinnyLayout {
    typedef Type E;
    static constexpr Tokens MODE = HOW;
    typedef typename E::storage storage;
    static constexpr int TOKENS = 8 * NT, ROWS = 16 * RT, BOXES = 2 / RT, STAGE = BOX * BOXES;
    static constexpr int WEIGHT = ROWS * STAGE, SLOT = WEIGHT + (MODE == COPIED ? TOKENS * STAGE : 0);
    static constexpr int ELEMENTS = (ROWS * TOKENS + THREADS - 1) / THREADS;  // results of a thread
    static constexpr int PITCH = ROWS + 8;  // of sums: the fragments' lanes meet all banks

    static constexpr int WORDS = STAGE / 32;  // of the mask, of a stage
    typedef ::Gather<E, NT, RT, WORDS> Gather;

    // What a tile has in outlier columns: where they are few, the four bytes around each of W.
    union Outliers {
        float gathered[TOKENS * PITCH];
        unsigned weight[LIST][ROWS];
    };
    // What is kept of tiles until their ends. Outliers are asked for a tile ahead, while the tile before may still be read.
    struct Tiles {
        int sum[2][TOKENS * PITCH];
        Outliers outliers[3];
    };
    // What the block knows of the tokens and their outliers.
    struct Known {
        unsigned absmax[TOKENS];  // bits of the row scales
        float residual[LIST][TOKENS];
        int columns[LIST];
        int counts[2][WARPS];
        int count;  // of outlier columns in the list: of all, or 0 where they are many
        bool many;
    };
    static constexpr int MASK_BYTES = OWN_BYTES / 8 / (MODE == OWN ? 1 : TOKENS);
    // From the bottom, after what the system takes: barriers, tiles, what is known, rings; own tokens, their mask.
    static constexpr int TILES = 512, KNOWN = TILES + sizeof(Tiles), RING = (KNOWN + sizeof(Known) + 1023) / 1024 * 1024;
    static constexpr int OWN_AT = RING + WARPS * DEPTH * SLOT, BYTES = OWN_AT + (MODE == COPIED ? 0 : OWN_BYTES + MASK_BYTES);
    static constexpr int TOKEN_BARRIERS = 256;
    static_assert(WARPS * DEPTH * 8 <= TOKEN_BARRIERS, "room for the barriers");

    static __device__ __forceinline__ int padded(const Operands& o) { return ((int)o.k + STAGE - 1) / STAGE * STAGE; }

    // Rows of tokens that are kept: of own ones, a power of two of at least m. Fragments take each more than once.
    static __device__ __forceinline__ int kept(const Operands& o) { return MODE != OWN ? TOKENS : o.m > 4 ? 8 : o.m > 2 ? 4 : (int)o.m; }

    // Where 16 own codes from a column on lie.
    static __device__ __forceinline__ int own_place(int token, int column, int rows) {
        return (column / BOX * rows + token) * BOX + (((column / 16 % 8) ^ token) << 4);
    }
};
