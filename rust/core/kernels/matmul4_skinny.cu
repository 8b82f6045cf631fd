// y = x W^T + bias for few rows of x (tokens) on compute capability 9.0 and later: the time is that of reading W once.
//
//   x     m x k of E, m <= 8 * NT          codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//
// Fragments, their order and the table: matmul4_fragments.cuh.
//
// Work: WK warps share a tile of 16 * RT rows; each takes every WK-th stage of 256 columns, through a ring of DEPTH stages of its
// own in shared memory, filled by the copy engine: codes, scales and, where they do not stay in registers, tokens. They do where
// WK * NPER stages make up a row (NPER > 0). The warps' sums meet in shared memory and are added in a fixed order. Blocks of the
// grid are persistent.
//
// Bytes: k n / 2 of codes, 4 k n / blocksize of scales; x comes from the L2 cache. What bounds it besides memory is the pipe of
// shared memory: for 1024 weights 16 table reads, 4 of codes, 4 that the copy engine writes. Instructions, the same: 16 table reads
// and their addresses, 4 mma, 4 FMA, 4 reads of codes.
#include "matmul4_fragments.cuh"
#include "matmul4_instances.cuh"

struct Problem {
    TensorMap codes;   // bytes, n x k / 2; boxes of 16 * RT x 128, swizzled by 128 bytes
    TensorMap scales;  // n x k / blocksize float32 or u8; boxes of 16 * RT x 16 bytes
    TensorMap tokens;  // m x k of E; boxes of 8 * NT x 64, swizzled by 128 bytes
    const void* x;
    NestedSource nested;
    const void* bias;  // n of E, or null
    void* y;
    int m, n, k;
    int log2_blocksize, quant_type;
    int settled;  // 0 where the previous kernel may still write the codes or the scales
};

// HELD: the tokens of a warp's NPER stages stay in registers. READ: they are read again for each tile. COPIED: they come with the
// codes, through the ring.
enum Tokens { HELD, READ, COPIED };

template <class E, bool NESTED, int WARPS, int WK, int DEPTH, int NT, int RT, Tokens TOKENS, int NPER, int STRIDE>
struct Skinny {
    typedef typename E::storage storage;
    static constexpr int GROUPS = WARPS / WK;  // tiles in hand
    static constexpr int ROWS = RT * TILE;
    static constexpr int SUMS = WK * TILE * 8 * NT;  // floats of one fragment tile's partial sums
    typedef PairTable<E, STRIDE> Table;
    static constexpr bool IN_TABLE = STRIDE == 256;  // the partial sums lie in the unused halves of the table's entries
    static constexpr int BUFFERS = IN_TABLE && GROUPS * SUMS * 2 <= 8192 ? 2 : 1;
    static_assert(!IN_TABLE || GROUPS * SUMS * BUFFERS <= 8192, "room for the partial sums");
    static constexpr int KEPT = TOKENS == HELD ? NPER : 1;  // stages of tokens in registers
    // Whether the weight is read before the previous kernel has ended. With tokens in the ring it measured slower.
    static constexpr bool EARLY = TOKENS != COPIED || NESTED;
    // A slot: codes and tokens; scales apart, so that slots start on 1024 bytes.
    static constexpr int CODES = ROWS * STAGE_BYTES, TOKEN_BYTES = TOKENS == COPIED ? 8 * NT * STAGE * 2 : 0;
    static constexpr int SLOT = CODES + TOKEN_BYTES, SCALES = ROWS * 16, RING = DEPTH * SLOT;
    // From the bottom: what the system takes, barriers, the nested code, scales, partial sums; rings that find room; the table;
    // the other rings.
    static constexpr int SYSTEM = 1024, SCALE_RING = 2048, DECODED = SCALE_RING + WARPS * DEPTH * SCALES;
    static constexpr int SUM_AT = DECODED + (NESTED ? WARPS * TILE * 16 : 0);
    static constexpr int BOTTOM = SUM_AT + (IN_TABLE ? 0 : 4 * GROUPS * SUMS * BUFFERS);
    static constexpr int RINGS_BELOW = (Table::BYTES - SYSTEM - BOTTOM) / RING;
    static constexpr int BYTES = 2 * Table::BYTES - SYSTEM + (WARPS > RINGS_BELOW ? WARPS - RINGS_BELOW : 0) * RING;
    static_assert(WARPS * DEPTH * 8 <= 1024, "room for the barriers");

    // Where a warp is: a tile of rows and a stage of columns, and what follows.
    struct Place {
        int row0, stage;

        __device__ __forceinline__ void next(int wk, int per, int rows_in_hand) {
            stage += WK;
            if (stage >= per * WK) stage = wk, row0 += rows_in_hand;
        }
    };

    // One lane asks for a stage: for the weight's part, then for the tokens.
    static __device__ __forceinline__ void ask_weight(const Problem& p, const Place& at, unsigned slot, unsigned scales, unsigned barrier) {
        expect_bytes(barrier, SLOT + SCALES);
        copy_box(slot, &p.codes, at.stage * STAGE_BYTES, at.row0, barrier);
        copy_box(scales, &p.scales, first_scale(p, at.stage), at.row0, barrier);
    }
    static __device__ __forceinline__ void ask_tokens(const Problem& p, const Place& at, unsigned slot, unsigned barrier) {
        if (TOKENS == COPIED) {
#pragma unroll
            for (int b = 0; b < 4; b++) copy_box(slot + CODES + b * 1024 * NT, &p.tokens, at.stage * STAGE + b * STEP, 0, barrier);
        }
    }

    // The scales that are copied for a stage start at a multiple of 16 bytes.
    static __device__ __forceinline__ int first_scale(const Problem& p, int stage) {
        return (stage * STAGE >> p.log2_blocksize) & (NESTED ? ~15 : ~3);
    }

    // This lane's part of a stage of tokens, in the order of the codes' fragments. What there is no token for stays as it is.
    static __device__ __forceinline__ void read_tokens(const Problem& p, int stage, unsigned (&tokens)[NT][4][8]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < NT; i++) {
            const int token = i * 8 + g;
            const uint4* from = reinterpret_cast<const uint4*>((const storage*)p.x + ((i64)token * p.k + stage * STAGE + t * 16));
#pragma unroll
            for (int b = 0; b < 4; b++) {
                if (token < p.m && stage * STAGE + b * STEP < p.k) {
#pragma unroll
                    for (int half = 0; half < 2; half++) put(tokens[i][b], half, from[b * 8 + half]);
                } else if (stage * STAGE + b * STEP >= p.k) {
#pragma unroll
                    for (int half = 0; half < 2; half++) put(tokens[i][b], half, make_uint4(0, 0, 0, 0));
                }
            }
        }
    }

    static __device__ __forceinline__ void put(unsigned (&tokens)[8], int half, const uint4& v) {
        tokens[4 * half] = v.x, tokens[4 * half + 1] = v.y, tokens[4 * half + 2] = v.z, tokens[4 * half + 3] = v.w;
    }

    // The same from the ring.
    static __device__ __forceinline__ void fetch_tokens(unsigned from, unsigned (&tokens)[NT][4][8]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int b = 0; b < 4; b++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    put(tokens[i][b], half, load_shared4(from + b * 1024 * NT + (i * 8 + g) * 128 + (((2 * t + half) ^ g) << 4)));
    }

    // The maximum of nested scales of a stage in row lane / 2 of each fragment tile. Rows have a multiple of 16 scales, which the copy
    // engine asks for, so a stage's have one maximum.
    static __device__ __forceinline__ void read_maxima(const Problem& p, const Place& at, float (&maximum)[RT]) {
        const int pitch = p.k >> p.log2_blocksize, column = min(at.stage * STAGE >> p.log2_blocksize, pitch - 1);
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const int row = at.row0 + r * TILE + threadIdx.x % WARP / 2;
            maximum[r] = p.nested.absmax_of((i64)min(row, p.n - 1) * pitch + column);
        }
    }

    // Turns a stage's nested scales into float32, row by row at `to`: each lane two of them.
    static __device__ __forceinline__ void decode_scales(const Problem& p, unsigned from, unsigned to, int stage, float maximum,
                                                         const float* code, float offset) {
        const int row = threadIdx.x % WARP / 2, step = threadIdx.x % 2 * 2;
        const int within = (stage * STAGE >> p.log2_blocksize) - first_scale(p, stage);
        const unsigned at = from + row * 16 + within;
        const unsigned first = load_shared_u8(at + (step * STEP >> p.log2_blocksize));
        const unsigned second = load_shared_u8(at + ((step + 1) * STEP >> p.log2_blocksize));
        store_shared2(to + row * 16 + step * 4, nested_scale(code[first], maximum, offset),
                      nested_scale(code[second], maximum, offset));
        __syncwarp();
    }

    // The scales of the stage's four steps in rows 2 g and 2 g + 1; where they lie, they are as many as blocks, or decoded.
    static __device__ __forceinline__ void fetch_scales(const Problem& p, unsigned from, int stage, float inverse_factor,
                                                        float (&scale)[2][4]) {
        const int g = threadIdx.x % WARP / 4, within = (stage * STAGE >> p.log2_blocksize) - first_scale(p, stage);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const unsigned row = from + (2 * g + h) * 16;
            if (NESTED || p.log2_blocksize == 6) {
                const uint4 v = load_shared4(row);
                scale[h][0] = __uint_as_float(v.x), scale[h][1] = __uint_as_float(v.y);
                scale[h][2] = __uint_as_float(v.z), scale[h][3] = __uint_as_float(v.w);
            } else {
#pragma unroll
                for (int b = 0; b < 4; b++)
                    scale[h][b] = __uint_as_float(load_shared(row + 4 * (within + (b * STEP >> p.log2_blocksize))));
            }
#pragma unroll
            for (int b = 0; b < 4; b++) scale[h][b] *= inverse_factor;
        }
    }

    static __device__ __forceinline__ unsigned sum_address(unsigned sums, int i) {
        return IN_TABLE ? sums + i / 32 * 256 + i % 32 * 4 : sums + i * 4;
    }

    // Adds the warps' sums of a fragment tile, rounds them and writes them out. `first` is the index of their first partial sum.
    static __device__ __forceinline__ void reduce(const Problem& p, unsigned sums, int first, int group, int wk, int row0,
                                                  const float (&sum)[NT][4]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        if (BUFFERS == 1) barrier(1 + group, WK * WARP);  // the sums before these have been read
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                store_shared2(sum_address(sums, first + (wk * 8 * NT + i * 8 + t * 2 + j) * TILE + 2 * g), sum[i][j], sum[i][2 + j]);
        barrier(1 + group, WK * WARP);
        const int count = min(p.m, 8 * NT) * TILE;
        for (int e = wk * WARP + lane; e < count; e += WK * WARP) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WK; w++)
                total += __uint_as_float(load_shared(sum_address(sums, first + w * 8 * NT * TILE + e)));
            const int token = e / TILE, row = row0 + e % TILE;
            if (row >= p.n) continue;
            if (p.bias) total += E::widen(((const storage*)p.bias)[row]);
            ((storage*)p.y)[(i64)token * p.n + row] = E::narrow(total);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const unsigned bottom = shared_address(shared);
        const unsigned table = (bottom + Table::BYTES - 1) & ~(Table::BYTES - 1);
        const unsigned sums = IN_TABLE ? table + 128 : bottom + SUM_AT;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = warp / WK, wk = warp % WK;
        const unsigned barriers = bottom + warp * DEPTH * 8;
        const unsigned ring = warp < RINGS_BELOW ? table - (warp + 1) * RING : table + Table::BYTES + (warp - RINGS_BELOW) * RING;
        const unsigned scale_ring = bottom + SCALE_RING + warp * DEPTH * SCALES;
        const unsigned decoded = bottom + DECODED + warp * TILE * 16;
        float* const nested_code = reinterpret_cast<float*>(shared + 1024);

        const int stages = (p.k + STAGE - 1) / STAGE, per = TOKENS == HELD ? NPER : (stages + WK - 1) / WK;
        const int tiles = (p.n + ROWS - 1) / ROWS, in_hand = gridDim.x * GROUPS;
        const int first = blockIdx.x + group * gridDim.x;  // neighbouring tiles on different multiprocessors
        const int own = first < tiles ? (tiles - first + in_hand - 1) / in_hand : 0;

        Place asked{first * ROWS, wk};
        int left = own * per;
        auto ask_weight_at = [&](const Place& at, int slot) {
            ask_weight(p, at, ring + slot * SLOT, scale_ring + slot * SCALES, barriers + slot * 8);
        };
        auto ask_next = [&](int slot, bool has_weight) {
            if (left > 0) {
                if (!has_weight) ask_weight_at(asked, slot);
                ask_tokens(p, asked, ring + slot * SLOT, barriers + slot * 8);
            }
            asked.next(wk, per, in_hand * ROWS);
            left--;
        };
        // Stages of the weight that are read before the previous kernel has ended. All that a short row has would be in its way.
        const int early = !EARLY || !p.settled ? 0 : left > DEPTH ? DEPTH : 1;
        if (lane == 0) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) init_mbarrier(barriers + d * 8, 1);
            publish_mbarriers();
            prefetch_map(&p.codes), prefetch_map(&p.scales);
            if (TOKENS == COPIED) prefetch_map(&p.tokens);
            // Reading what may still be written must wait, bringing it near need not: a later write is seen in the L2 cache all the same.
            Place near = asked;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (d >= left) break;
                if (d < early)
                    ask_weight_at(near, d);
                else
                    prefetch_box(&p.codes, near.stage * STAGE_BYTES, near.row0);
                near.next(wk, per, in_hand * ROWS);
            }
        }
        __syncwarp();
        Table::fill(table, p.quant_type);
        if (NESTED && !p.nested.code) load_nested_code(nested_code, nullptr);
        wait_for_previous_kernel();
        if (lane == 0) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) ask_next(d, d < early);
        }
        __syncwarp();
        let_next_kernel_start();
        if (NESTED && p.nested.code) load_nested_code(nested_code, p.nested.code);
        const float offset = NESTED ? *p.nested.offset : 0.0f, inverse_factor = 1.0f / product_factor<E>(p.quant_type);
        unsigned tokens[KEPT][NT][4][8] = {};
        if (TOKENS == HELD) {
#pragma unroll
            for (int i = 0; i < KEPT; i++) read_tokens(p, i * WK + wk, tokens[i]);
        }
        __syncthreads();

        const unsigned lane_base = table | (lane * 4);
        int slot = 0, phase = 0, parity = 0;
        // Read a stage ahead.
        float following[RT] = {};
        Place ahead{first * ROWS, wk};
        if (NESTED) read_maxima(p, ahead, following);
        for (int tile = 0; tile < own; tile++) {
            const int row0 = (first + tile * in_hand) * ROWS;
            float sum[RT][NT][4] = {};
#pragma unroll
            for (int i = 0; i < (TOKENS == HELD ? NPER : per); i++) {
                const int stage = i * WK + wk;
                float maximum[RT];
#pragma unroll
                for (int r = 0; r < RT; r++) maximum[r] = following[r];
                if (NESTED) {
                    ahead.next(wk, per, in_hand * ROWS);
                    read_maxima(p, ahead, following);
                }
                if (TOKENS == READ) read_tokens(p, stage, tokens[0]);
                wait_mbarrier(barriers + slot * 8, phase);
                const unsigned here = ring + slot * SLOT;
                if (TOKENS == COPIED) fetch_tokens(here + CODES, tokens[0]);
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    uint2 packed[2][4];
                    float scale[2][4];
                    fetch_codes(here + r * TILE * STAGE_BYTES, packed);
                    const unsigned scales = scale_ring + slot * SCALES + r * TILE * 16;
                    if (NESTED) {
                        decode_scales(p, scales, decoded, stage, maximum[r], nested_code, offset);
                        fetch_scales(p, decoded, stage, inverse_factor, scale);
                        __syncwarp();  // before they are written over
                    } else {
                        fetch_scales(p, scales, stage, inverse_factor, scale);
                    }
                    multiply_stage<E, Table>(packed, lane_base, scale, tokens[TOKENS == HELD ? i : 0], sum[r]);
                }
                __syncwarp();  // everybody has read the slot
                if (lane == 0) ask_next(slot, false);
                if (++slot == DEPTH) slot = 0, phase ^= 1;
            }
#pragma unroll
            for (int r = 0; r < RT; r++) {
                reduce(p, sums, (group * BUFFERS + (BUFFERS - 1) * parity) * SUMS, group, wk, row0 + r * TILE, sum[r]);
                parity ^= 1;
            }
        }
    }
};

// One block on a multiprocessor may take 227 KB of shared memory, each of two 113.
#define SKINNY(NAME, RESIDENT, WARPS, E, ...)                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) NAME(const __grid_constant__ Problem p) {         \
        typedef Skinny<Product##E, __VA_ARGS__> Instance;                                                                \
        static_assert(Instance::BYTES <= 228 * 1024 / RESIDENT - 1024, "shared memory");                                 \
        Instance::run(p);                                                                                                \
    }
SKINNY_INSTANCES
