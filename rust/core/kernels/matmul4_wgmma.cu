// y = x W^T + bias for many rows of x (tokens), on Hopper: the time is that of the tensor cores.
//
//   x     m x k of E                       codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//
// A warpgroup multiplies 64 rows of W, decoded into registers, by COLUMNS tokens in shared memory. The operand is bit for bit the
// dequantized weight: a table holds the two float32 values of a byte (32 copies, one a bank), two products by the block's scale,
// one rounding to a pair of E. The codes of the next 64 columns are decoded while the tensor cores multiply these.
//
// Work: a cluster of two blocks takes 256 rows and COLUMNS tokens; each block has 128 of the rows, for which it decodes, and
// fetches half of the tokens for both: without that the reads of x from the L2 cache would be the bound. In a block one thread
// asks the copy engine for codes, scales (256 columns a slot) and tokens (64 columns a slot); two warpgroups multiply 64 rows each.
// Clusters are persistent; consecutive tiles share rows and tokens in the L2 cache.
#include "matmul4_hopper.cuh"
#include "matmul4_instances.cuh"

struct Problem {
    TensorMap codes;   // bytes, n x k / 2; boxes of 128 x 128, swizzled by 128 bytes
    TensorMap scales;  // n x k / blocksize float32 or u8; boxes of 128 x 16 bytes
    TensorMap tokens;  // m x k of E; boxes of COLUMNS / 2 x 64, swizzled by 128 bytes
    NestedSource nested;
    Output out;
    int k, log2_blocksize, quant_type;
};

constexpr int ROWS = 128;       // of a block; a warpgroup has half
constexpr int SLOT_COLUMNS = 256;  // of a slot of codes
constexpr int STEP = 64;        // columns of a slot of tokens
constexpr int CLUSTER = 2;
constexpr int THREADS = 384;
constexpr int GROUP = 16;       // tiles of rows that are walked through before the next tokens

// The two values of a byte as float32, 32 copies: entry b, copy l at 256 b + 8 l.
__device__ __forceinline__ void fill_float_table(unsigned address, int quant_type) {
    const int lane = threadIdx.x % WARP;
    const float own = (quant_type == QUANT_TYPE_FP4 ? FP4_VALUES : NF4_VALUES)[lane & 15];
    for (int i = threadIdx.x; i < 256 * 16; i += blockDim.x) {
        const int entry = i / 16;
        const unsigned high = __float_as_uint(__shfl_sync(FULL_WARP, own, entry >> 4));
        const unsigned low = __float_as_uint(__shfl_sync(FULL_WARP, own, entry & 15));
        store_shared4(address + i * 16, make_uint4(high, low, high, low));
    }
}

template <class E, bool NESTED, int COLUMNS, int CODE_SLOTS, int TOKEN_SLOTS>
struct Wide {
    typedef typename E::storage storage;
    static constexpr int SUMS = COLUMNS / 2;  // of a thread
    static constexpr int CODES = ROWS * SLOT_COLUMNS / 2, SCALES = ROWS * 16, TOKENS = COLUMNS * STEP * 2;
    // From the bottom: what the system takes, barriers, codes, scales, results; the table; tokens; the nested code.
    static constexpr int SYSTEM = 1024, TABLE = 65536;
    static constexpr int CODE_RING = 2048 - SYSTEM, SCALE_RING = CODE_RING + CODE_SLOTS * CODES;
    static constexpr int RESULTS = SCALE_RING + CODE_SLOTS * SCALES;
    static_assert(RESULTS + 8 * WRITE_STAGING <= TABLE - SYSTEM, "below the table");
    static constexpr int TOKEN_RING = 2 * TABLE - SYSTEM, NESTED_CODE = TOKEN_RING + TOKEN_SLOTS * TOKENS;
    static constexpr int BYTES = NESTED_CODE + (NESTED ? 1024 : 0);

    struct Tile {
        int row, token;
    };

    // Tile `index` of this cluster's sequence: GROUP tiles of rows, then the next tokens, then the next rows.
    static __device__ __forceinline__ Tile tile(const Problem& p, int index) {
        const int rows = (p.out.n + CLUSTER * ROWS - 1) / (CLUSTER * ROWS), tokens = (p.out.m + COLUMNS - 1) / COLUMNS;
        const int group = index / (GROUP * tokens), within = index % (GROUP * tokens);
        const int height = min(GROUP, rows - group * GROUP);
        return {(group * GROUP + within % height) * CLUSTER * ROWS, within / height * COLUMNS};
    }
    static __device__ __forceinline__ int tile_count(const Problem& p) {
        return ((p.out.n + CLUSTER * ROWS - 1) / (CLUSTER * ROWS)) * ((p.out.m + COLUMNS - 1) / COLUMNS);
    }

    // Whole slots of codes: what lies past the last column reads as 0.
    static __device__ __forceinline__ int step_count(const Problem& p) {
        return (p.k + SLOT_COLUMNS - 1) / SLOT_COLUMNS * (SLOT_COLUMNS / STEP);
    }

    static __device__ __forceinline__ int first_scale(const Problem& p, int slot) {
        return (slot * SLOT_COLUMNS >> p.log2_blocksize) & (NESTED ? ~15 : ~3);
    }

    static __device__ __forceinline__ void produce(const Problem& p, unsigned base, const Barriers& barriers, unsigned rank) {
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        const int steps = step_count(p), tiles = tile_count(p);
        for (int index = blockIdx.x / CLUSTER; index < tiles; index += gridDim.x / CLUSTER) {
            const Tile at = tile(p, index);
            const int row = at.row + rank * ROWS, half = rank * (COLUMNS / 2);
            for (int step = 0; step < steps; step++) {
                if (step % 4 == 0) {
                    wait_mbarrier(barriers.codes_free + c.slot * 8, c.round ^ 1);
                    const unsigned here = barriers.codes_here + c.slot * 8;
                    expect_bytes(here, CODES + SCALES);
                    copy_box(base + CODE_RING + c.slot * CODES, &p.codes, step * STEP / 2, row, here);
                    copy_box(base + SCALE_RING + c.slot * SCALES, &p.scales, first_scale(p, step / 4), row, here);
                    c.next();
                }
                wait_mbarrier(barriers.tokens_free + t.slot * 8, t.round ^ 1);
                const unsigned here = barriers.tokens_here + t.slot * 8;
                expect_bytes(here, TOKENS);
                copy_box_to_cluster(base + TOKEN_RING + t.slot * TOKENS + half * STEP * 2, &p.tokens, step * STEP, at.token + half, here,
                                    (1 << CLUSTER) - 1);
                t.next();
            }
        }
    }

    // What a consumer thread needs to decode: where it is in the fragment, and its table.
    struct Decoder {
        unsigned lane_base, select;  // the permutation that puts byte t of a word into the table's address
        int row;                     // of the block; the other is 8 below
        const float* nested_code;
        float offset;

        __device__ __forceinline__ Decoder(const Problem& p, unsigned base, const float* nested_code, int group) : nested_code(nested_code) {
            const int lane = threadIdx.x % WARP;
            lane_base = (base + TABLE - SYSTEM) | (lane * 8);
            select = 0x7604 | (lane % 4) << 4;
            row = group * 64 + threadIdx.x / WARP % 4 * 16 + lane / 4;
            offset = NESTED ? *p.nested.offset : 0.0f;
        }

        __device__ __forceinline__ float scale(const Problem& p, unsigned scales, int row0, int step, int below) const {
            const int block = step * STEP >> p.log2_blocksize, within = block - first_scale(p, step / 4);
            const unsigned at = scales + (row + below) * 16;
            if (!NESTED) return __uint_as_float(load_shared(at + within * 4));
            const int pitch = p.k >> p.log2_blocksize;
            const i64 index = (i64)min(row0 + row + below, p.out.n - 1) * pitch + min(block, pitch - 1);
            const float absmax = p.nested.absmax_of(index);
            return nested_scale(nested_code[load_shared_u8(at + within)], absmax, offset);
        }

        __device__ __forceinline__ unsigned pair(unsigned word, float scale) const {
            const uint2 v = load_shared2(permute_bytes(word, lane_base, select));
            return E::pack2(__fmul_rn(__uint_as_float(v.x), scale), __fmul_rn(__uint_as_float(v.y), scale));
        }

        // Fragments of 64 columns: step `step` of the row, in the slot of codes and scales at these addresses.
        __device__ __forceinline__ void decode(const Problem& p, unsigned codes, unsigned scales, int row0, int step,
                                               unsigned (&a)[4][4]) const {
            const float upper = scale(p, scales, row0, step, 0), lower = scale(p, scales, row0, step, 8);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const unsigned at = codes + row * 128 + (((step % 4 * 2 + c) ^ (row & 7)) << 4);
                const uint4 u = load_shared4(at), l = load_shared4(at + 8 * 128);
                a[2 * c][0] = pair(u.x, upper), a[2 * c][1] = pair(l.x, lower);
                a[2 * c][2] = pair(u.y, upper), a[2 * c][3] = pair(l.y, lower);
                a[2 * c + 1][0] = pair(u.z, upper), a[2 * c + 1][1] = pair(l.z, lower);
                a[2 * c + 1][2] = pair(u.w, upper), a[2 * c + 1][3] = pair(l.w, lower);
            }
        }
    };

    static __device__ __forceinline__ void consume(const Problem& p, unsigned base, const Barriers& barriers, const float* nested_code,
                                                   unsigned rank) {
        const int group = threadIdx.x / 128, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
        const Decoder decoder(p, base, nested_code, group);
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        const int steps = step_count(p), tiles = tile_count(p);
        auto release_tokens = [&](int slot) {
            if (threadIdx.x % 128 < CLUSTER) arrive_in_cluster(barriers.tokens_free + slot * 8, threadIdx.x % 128);
        };
        for (int index = blockIdx.x / CLUSTER; index < tiles; index += gridDim.x / CLUSTER) {
            const Tile at = tile(p, index);
            const int row0 = at.row + rank * ROWS;
            float sum[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] = 0.0f;
            unsigned a[2][4][4];
            int before = 0;
            for (int step0 = 0; step0 < steps; step0 += 4) {
                wait_mbarrier(barriers.codes_here + c.slot * 8, c.round);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    decoder.decode(p, base + CODE_RING + c.slot * CODES, base + SCALE_RING + c.slot * SCALES, row0, step0 + q, a[q % 2]);
                    wait_mbarrier(barriers.tokens_here + t.slot * 8, t.round);
                    fence_products();
                    const unsigned long long tokens = token_descriptor(base + TOKEN_RING + t.slot * TOKENS);
#pragma unroll
                    for (int s = 0; s < 4; s++) Wgmma<E, COLUMNS>::multiply(sum, a[q % 2][s], tokens + s * 2);
                    commit_products();
                    wait_for_products<1>();
                    if (step0 + q > 0) release_tokens(before);
                    before = t.slot;
                    t.next();
                }
                __syncwarp();  // this warp has read the slot
                if (lane == 0) arrive(barriers.codes_free + c.slot * 8);
                c.next();
            }
            wait_for_products<0>();
            release_tokens(before);
            write_sums<E>(p.out, base + RESULTS + (group * 4 + warp) * WRITE_STAGING, at.token, row0 + group * 64 + warp * 16, sum);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const unsigned base = shared_address(shared), rank = cluster_rank();
        const Barriers barriers(base);
        float* const nested_code = reinterpret_cast<float*>(shared + NESTED_CODE);
        if (threadIdx.x == 0) {
            for (int i = 0; i < CODE_SLOTS; i++) {
                init_mbarrier(barriers.codes_here + i * 8, 1);
                init_mbarrier(barriers.codes_free + i * 8, 8);
            }
            for (int i = 0; i < TOKEN_SLOTS; i++) {
                init_mbarrier(barriers.tokens_here + i * 8, 1);
                init_mbarrier(barriers.tokens_free + i * 8, 2 * CLUSTER);
            }
            publish_mbarriers();
        }
        fill_float_table(base + TABLE - SYSTEM, p.quant_type);
        wait_for_previous_kernel();
        let_next_kernel_start();
        if (NESTED) load_nested_code(nested_code, p.nested);
        cluster_sync();
        if (threadIdx.x / 128 == 2) {
            release_registers<40>();
            if (threadIdx.x == 256) produce(p, base, barriers, rank);
        } else {
            take_registers<232>();
            consume(p, base, barriers, nested_code, rank);
        }
        // Neither block leaves while the other may still write to it.
        __syncwarp();
        cluster_sync();
    }
};

#define WIDE(NAME, E, NESTED, ...)                                                                                       \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)                             \
        NAME(const __grid_constant__ Problem p) {                                                                        \
        typedef Wide<Product##E, NESTED, __VA_ARGS__> Instance;                                                          \
        static_assert(Instance::BYTES <= 227 * 1024, "shared memory");                                                   \
        Instance::run(p);                                                                                                \
    }
WIDE_INSTANCES
