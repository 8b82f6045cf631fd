// y = x W^T + bias for few rows of x (tokens), on tensor cores without Hopper's copy engine: compute capability 8.0 and later, and rows
// that the copy engine cannot read.
//
//   x     m x k of E, m <= 8 * NT          codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//   k is a multiple of 64; x and codes start on 16 bytes
//
// Fragments, their order and the table: matmul4_fragments.cuh. As in matmul4_skinny.cu WARPS warps share a tile along k and add their
// sums in a fixed order; here every lane copies its part of the ring asynchronously, and lane (g, t) loads the scales of rows 2 g and 2 g + 1 of 64-block t
// and hands them on by shuffles.
#include "matmul4_direct.cuh"

constexpr int WARPS = 8;
constexpr int DEPTH = 3;  // stages of a warp's ring: with the table that fits 99 KB of shared memory
constexpr int SLOT = TILE * STAGE_BYTES;

template <class E, class Scales, int NT>
struct Few {
    typedef typename E::storage storage;
    typedef PairTable<E, 128> Table;
    static constexpr int SUMS = WARPS * TILE * 8 * NT;  // floats of a tile's partial sums
    // Partial sums and the nested code lie below the table, which starts at a multiple of its size, and so do rings that find room.
    static constexpr int SYSTEM = 1024, LOW = 4 * SUMS + 1024, RING = DEPTH * SLOT;
    static constexpr int BELOW = (Table::BYTES - SYSTEM - LOW) / RING;
    static constexpr int BYTES = 2 * Table::BYTES + (WARPS - BELOW) * RING;

    // Where a warp is: a tile of rows and a stage of columns, and what follows.
    struct Place {
        i64 row0;
        int stage;

        __device__ __forceinline__ void next(int warp, int per) {
            stage += WARPS;
            if (stage >= per * WARPS) stage = warp, row0 += gridDim.x * TILE;
        }
    };

    // Asks for a stage of codes: a lane copies 16 bytes of every fourth row. What lies outside of W reads as 0.
    static __device__ __forceinline__ void copy_codes(const Problem& p, const Place& at, unsigned slot) {
        const int lane = threadIdx.x % WARP, chunk = lane % 8;
        const i64 pitch = p.k / 2, column = at.stage * STAGE_BYTES + chunk * 16;
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            const int row = lane / 8 + 4 * i;
            const bool inside = column < pitch && at.row0 + row < p.n;
            const u8* from = inside ? p.codes + ((at.row0 + row) * pitch + column) : p.codes;
            copy_async(slot + row * STAGE_BYTES + ((chunk ^ (row & 7)) << 4), from, inside ? 16 : 0);
        }
    }

    static __device__ __forceinline__ void load_scales(const Problem& p, const Scales& scales, const Place& at,
                                                       typename Scales::Raw (&raw)[2]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        const i64 column = at.stage * STAGE + t * STEP, pitch = p.k >> p.log2_blocksize;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const i64 row = at.row0 + 2 * g + h;
            raw[h] = column < p.k && row < p.n ? scales.load(row * pitch + (column >> p.log2_blocksize)) : scales.none();
        }
    }

    // This lane's part of a stage of tokens, in the order of the codes' fragments; 0 past the last column. Past the last token it reads
    // that one again: sums of tokens that are not there are not written.
    static __device__ __forceinline__ void load_tokens(const Problem& p, int stage, unsigned (&tokens)[NT][4][8]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < NT; i++) {
            const i64 first = min((i64)(i * 8 + g), p.m - 1) * p.k + stage * STAGE + t * 16;
            const uint4* from = reinterpret_cast<const uint4*>((const storage*)p.x + first);
#pragma unroll
            for (int b = 0; b < 4; b++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const bool inside = stage * STAGE + b * STEP < p.k;
                    const uint4 v = inside ? __ldg(from + b * 8 + half) : make_uint4(0, 0, 0, 0);
                    tokens[i][b][4 * half] = v.x, tokens[i][b][4 * half + 1] = v.y;
                    tokens[i][b][4 * half + 2] = v.z, tokens[i][b][4 * half + 3] = v.w;
                }
        }
    }

    // Adds the warps' sums of a tile, rounds them and writes them out.
    static __device__ __forceinline__ void reduce(const Problem& p, float* sums, i64 row0, const float (&sum)[NT][4]) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
        __syncthreads();  // the sums before these have been read
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                *reinterpret_cast<float2*>(sums + (warp * 8 * NT + i * 8 + t * 2 + j) * TILE + 2 * g) =
                    make_float2(sum[i][j], sum[i][2 + j]);
        __syncthreads();
        const int count = (int)min(p.m, (i64)(8 * NT)) * TILE;
        for (int e = threadIdx.x; e < count; e += WARPS * WARP) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += sums[w * 8 * NT * TILE + e];
            const i64 token = e / TILE, row = row0 + e % TILE;
            if (row >= p.n) continue;
            if (p.bias) total += E::widen(((const storage*)p.bias)[row]);
            ((storage*)p.y)[token * p.n + row] = E::narrow(total);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(16) unsigned char shared[];
        const unsigned bottom = shared_address(shared);
        const unsigned table = (bottom + LOW + Table::BYTES - 1) & ~(Table::BYTES - 1);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const unsigned ring = warp < BELOW ? table - (warp + 1) * RING : table + Table::BYTES + (warp - BELOW) * RING;
        float* const sums = reinterpret_cast<float*>(shared);
        float* const nested = sums + SUMS;

        const int per = (int)((p.k + STAGE * WARPS - 1) / (STAGE * WARPS));  // stages of a warp in a tile
        const i64 tiles = (p.n + TILE - 1) / TILE, own = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
        Table::fill(table, p.quant_type);
        if (Scales::NESTED) load_nested_code(nested, p.nested.code);
        const Scales scales(p, nested, 1.0f / product_factor<E>(p.quant_type));

        Place asked{(i64)blockIdx.x * TILE, warp}, scaled = asked;
        i64 left = own * per;
        auto ask = [&](int slot) {
            if (left > 0) copy_codes(p, asked, ring + slot * SLOT);
            asked.next(warp, per);
            left--;
            commit_copies();
        };
#pragma unroll
        for (int d = 0; d < DEPTH; d++) ask(d);
        // The scales come two stages ahead.
        typename Scales::Raw raw[2][2];
        auto next_scales = [&](typename Scales::Raw (&to)[2]) {
            load_scales(p, scales, scaled, to);
            scaled.next(warp, per);
        };
        next_scales(raw[0]);
        next_scales(raw[1]);
        __syncthreads();

        const unsigned lane_base = table | (lane * 4);
        int slot = 0;
        for (i64 tile = 0; tile < own; tile++) {
            float sum[NT][4] = {};
#pragma unroll 1
            for (int i = 0; i < per; i++) {
                unsigned tokens[NT][4][8];
                load_tokens(p, i * WARPS + warp, tokens);
                wait_for_copies<DEPTH - 1>();
                __syncwarp();  // the other lanes' copies have arrived too
                uint2 packed[2][4];
                fetch_codes(ring + slot * SLOT, packed);
                __syncwarp();  // everybody has read the slot
                ask(slot);
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
                float scale[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float own_scale = scales.value(raw[0][h]);
#pragma unroll
                    for (int b = 0; b < 4; b++) scale[h][b] = __shfl_sync(FULL_WARP, own_scale, (lane & ~3) | b);
                    raw[0][h] = raw[1][h];
                }
                next_scales(raw[1]);
                multiply_stage<E, Table>(packed, lane_base, scale, tokens, sum);
            }
            reduce(p, sums, (blockIdx.x + tile * gridDim.x) * TILE, sum);
        }
        wait_for_copies<0>();
    }
};

#define FEW(DTYPE, E, SCALE, SCALES, NT)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
        matmul4_mma_##NT##_##DTYPE##_##SCALE(const __grid_constant__ Problem p) {                                        \
        typedef Few<Product##E, SCALES, NT> Instance;                                                                    \
        static_assert(Instance::BYTES <= 99 * 1024, "shared memory");                                                    \
        Instance::run(p);                                                                                                \
    }
FEW(f16, F16, plain, PlainScales, 1)
FEW(f16, F16, plain, PlainScales, 2)
FEW(f16, F16, nested, NestedScales, 1)
FEW(f16, F16, nested, NestedScales, 2)
FEW(bf16, BF16, plain, PlainScales, 1)
FEW(bf16, BF16, plain, PlainScales, 2)
FEW(bf16, BF16, nested, NestedScales, 1)
FEW(bf16, BF16, nested, NestedScales, 2)
