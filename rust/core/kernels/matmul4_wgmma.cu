// y = x W^T + bias for many rows of x (tokens), on Hopper: the time is that of the tensor cores.
//
//   x     m x k of E                       codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//
// A warpgroup multiplies 64 rows of W, decoded into registers, by COLUMNS tokens in shared memory; the codes of the next 64 columns
// are decoded while the tensor cores multiply these. Up to 128 tokens the operand is the unscaled value of the code, as in
// matmul4_mid.cu: one table read for two, and the sum over 64 columns is multiplied by the block's scale. With 256 there is no room
// for such sums, and the operand is bit for bit the dequantized weight: a table holds the two float32 values of a byte (32 copies,
// one a bank), two products by the block's scale, one rounding to a pair of E.
//
// Work: a cluster of two blocks takes 256 rows and COLUMNS tokens; each block has 128 of the rows, for which it decodes, and
// fetches half of the tokens for both: without that the reads of x from the L2 cache would be the bound. In a block one thread
// asks the copy engine for codes, scales (256 columns a slot) and tokens (64 columns a slot); two warpgroups multiply 64 rows each.
// Clusters are persistent; consecutive tiles share rows and tokens in the L2 cache.
// How the clusters' pieces end together: runs.cuh.
#include "matmul4_hopper.cuh"
#include "matmul4_instances.cuh"

constexpr int CLUSTER = 2;  // blocks
#include "runs.cuh"

constexpr int ROWS = 128;          // of a block; a warpgroup has half
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int GROUP = 16;          // tiles of rows that are walked through before the next tokens

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
    static constexpr int SUMS = COLUMNS / 2;  // of a thread
    static constexpr bool UNSCALED = COLUMNS <= 128;
    typedef PairTable<E, 256> Table;
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

    // Asks for a slot of the weight, whose place in the ring is free.
    static __device__ __forceinline__ void ask_weight(const Problem& p, unsigned base, const Barriers& barriers, int place, int row,
                                                      int slot) {
        const unsigned here = barriers.codes_here + place * 8;
        expect_bytes(here, CODES + SCALES);
        copy_box(base + CODE_RING + place * CODES, &p.codes, slot * SLOT_COLUMNS / 2, row, here);
        copy_box(base + SCALE_RING + place * SCALES, &p.scales, p.first_scale(slot, NESTED), row, here);
    }
    // Before the previous kernel has ended: as much of the first piece as the ring takes. Returns how many slots.
    static __device__ __forceinline__ int ask_first(const Problem& p, const Split& split, unsigned base, const Barriers& barriers,
                                                    unsigned rank) {
        Schedule schedule(tile_count(p), p.slot_count(), split.rounds);
        Piece piece;
        if (!p.settled || !schedule.next(piece)) return 0;
        const int count = min(CODE_SLOTS, piece.last - piece.first), row = tile(p, piece.tile).row + rank * ROWS;
        for (int i = 0; i < count; i++) ask_weight(p, base, barriers, i, row, piece.first + i);
        return count;
    }

    // `asked` slots of the weight have been asked for.
    static __device__ __forceinline__ void produce(const Problem& p, const Split& split, unsigned base, const Barriers& barriers,
                                                   unsigned rank, int asked) {
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        Schedule schedule(tile_count(p), p.slot_count(), split.rounds);
        Piece piece;
        while (schedule.next(piece)) {
            const Tile at = tile(p, piece.tile);
            const int row = at.row + rank * ROWS, half = rank * (COLUMNS / 2);
            for (int slot = piece.first; slot < piece.last; slot++) {
                if (asked-- <= 0) {
                    wait_mbarrier(barriers.codes_free + c.slot * 8, c.round ^ 1);
                    ask_weight(p, base, barriers, c.slot, row, slot);
                }
                c.next();
                for (int q = 0; q < SLOT_STEPS; q++) {
                    wait_mbarrier(barriers.tokens_free + t.slot * 8, t.round ^ 1);
                    const unsigned here = barriers.tokens_here + t.slot * 8;
                    expect_bytes(here, TOKENS);
                    copy_box_to_cluster(base + TOKEN_RING + t.slot * TOKENS + half * STEP * 2, &p.tokens, slot * SLOT_COLUMNS + q * STEP,
                                        at.token + half, here, (1 << CLUSTER) - 1);
                    t.next();
                }
            }
        }
    }

    // What a consumer thread needs to decode: its rows `row` and row + 8 of the block, and its table.
    struct Decoder {
        unsigned lane_base, select;  // the permutation that puts byte t of a word into the table's address
        int row;

        __device__ __forceinline__ Decoder(unsigned base, int group) {
            const int lane = threadIdx.x % WARP;
            lane_base = (base + TABLE - SYSTEM) | (lane * (UNSCALED ? 4 : 8));
            select = 0x7604 | (lane % 4) << 4;
            row = group * 64 + threadIdx.x / WARP % 4 * 16 + lane / 4;
        }

        __device__ __forceinline__ unsigned pair(unsigned word, float scale) const {
            const unsigned at = permute_bytes(word, lane_base, select);
            if (UNSCALED) return load_shared(at);
            const uint2 v = load_shared2(at);
            return E::pack2(__fmul_rn(__uint_as_float(v.x), scale), __fmul_rn(__uint_as_float(v.y), scale));
        }

        // Fragments of step q of a slot; the scales are those of rows `row` and row + 8.
        __device__ __forceinline__ void decode(unsigned codes, int q, float upper, float lower, unsigned (&a)[4][4]) const {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const unsigned at = codes + row * 128 + (((q * 2 + c) ^ (row & 7)) << 4);
                const uint4 u = load_shared4(at), l = load_shared4(at + 8 * 128);
                a[2 * c][0] = pair(u.x, upper), a[2 * c][1] = pair(l.x, lower);
                a[2 * c][2] = pair(u.y, upper), a[2 * c][3] = pair(l.y, lower);
                a[2 * c + 1][0] = pair(u.z, upper), a[2 * c + 1][1] = pair(l.z, lower);
                a[2 * c + 1][2] = pair(u.w, upper), a[2 * c + 1][3] = pair(l.w, lower);
            }
        }
    };

    // The slots of one piece: sum += codes * tokens, scaled. Both kinds of operand keep one group of products in flight at most.
    struct Consumer {
        const Problem& p;
        const Barriers& barriers;
        unsigned base;
        Decoder decoder;
        RowScales<NESTED> scales;
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        float inverse_factor;

        __device__ __forceinline__ Consumer(const Problem& p, const Barriers& barriers, unsigned base, const float* nested_code)
            : p(p), barriers(barriers), base(base), decoder(base, threadIdx.x / 128), scales(p, nested_code, decoder.row) {
            inverse_factor = 1.0f / product_factor<E>(p.quant_type);
        }

        __device__ __forceinline__ void release_tokens(int slot) const {
            if (threadIdx.x % 128 < CLUSTER) arrive_in_cluster(barriers.tokens_free + slot * 8, threadIdx.x % 128);
        }
        __device__ __forceinline__ void release_codes() {
            __syncwarp();  // this warp has read the slot
            if (threadIdx.x % WARP == 0) arrive(barriers.codes_free + c.slot * 8);
            c.next();
        }
        __device__ __forceinline__ unsigned long long wait_for_tokens() const {
            wait_mbarrier(barriers.tokens_here + t.slot * 8, t.round);
            return swizzled_descriptor(base + TOKEN_RING + t.slot * TOKENS);
        }

        __device__ __forceinline__ void multiply_unscaled(const Piece& piece, int row0, float (&sum)[SUMS]) {
            // In the same registers at every step: an assembler that knows that old sums do not matter takes new ones, which there are not.
            float part[SUMS] = {};
            const int never = p.k == 0;
            scales.start(p, row0, piece.first);
            for (int slot = piece.first; slot < piece.last; slot++) {
                scales.advance(p, row0, slot);
                wait_mbarrier(barriers.codes_here + c.slot * 8, c.round);
                const unsigned codes = base + CODE_RING + c.slot * CODES, here = base + SCALE_RING + c.slot * SCALES;
                unsigned a[2][4][4];
                decoder.decode(codes, 0, 0.0f, 0.0f, a[0]);
#pragma unroll
                for (int q = 0; q < SLOT_STEPS; q++) {
                    const unsigned long long tokens = wait_for_tokens();
                    fence_products();
                    Wgmma<E, COLUMNS>::multiply_if(part, a[q % 2][0], tokens, never);
#pragma unroll
                    for (int s = 1; s < 4; s++) Wgmma<E, COLUMNS>::multiply(part, a[q % 2][s], tokens + s * 2);
                    commit_products();
                    if (q + 1 < SLOT_STEPS) decoder.decode(codes, q + 1, 0.0f, 0.0f, a[(q + 1) % 2]);
                    const float upper = scales.template read<0>(p, here, slot, q) * inverse_factor;
                    const float lower = scales.template read<1>(p, here, slot, q) * inverse_factor;
                    wait_for_products<0>();
                    release_tokens(t.slot);
                    t.next();
#pragma unroll
                    for (int j = 0; j < SUMS; j++) sum[j] = __fmaf_rn(part[j], j % 4 < 2 ? upper : lower, sum[j]);
                }
                release_codes();
            }
        }

        __device__ __forceinline__ void multiply_scaled(const Piece& piece, int row0, float (&sum)[SUMS]) {
            unsigned a[2][4][4];
            int before = -1;
            scales.start(p, row0, piece.first);
            for (int slot = piece.first; slot < piece.last; slot++) {
                scales.advance(p, row0, slot);
                wait_mbarrier(barriers.codes_here + c.slot * 8, c.round);
                const unsigned codes = base + CODE_RING + c.slot * CODES, here = base + SCALE_RING + c.slot * SCALES;
#pragma unroll
                for (int q = 0; q < SLOT_STEPS; q++) {
                    const float upper = scales.template read<0>(p, here, slot, q);
                    const float lower = scales.template read<1>(p, here, slot, q);
                    decoder.decode(codes, q, upper, lower, a[q % 2]);
                    const unsigned long long tokens = wait_for_tokens();
                    fence_products();
#pragma unroll
                    for (int s = 0; s < 4; s++) Wgmma<E, COLUMNS>::multiply(sum, a[q % 2][s], tokens + s * 2);
                    commit_products();
                    wait_for_products<1>();
                    if (before >= 0) release_tokens(before);
                    before = t.slot;
                    t.next();
                }
                release_codes();
            }
            wait_for_products<0>();
            release_tokens(before);
        }
    };

    static __device__ __forceinline__ void consume(const Problem& p, const Split& split, unsigned base, const Barriers& barriers,
                                                   const float* nested_code, unsigned rank) {
        const int group = threadIdx.x / 128, warp = threadIdx.x / WARP % 4;
        Consumer consumer(p, barriers, base, nested_code);
        Schedule schedule(tile_count(p), p.slot_count(), split.rounds);
        Piece piece;
        while (schedule.next(piece)) {
            const Tile at = tile(p, piece.tile);
            const int row0 = at.row + rank * ROWS;
            float sum[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] = 0.0f;
            if (UNSCALED)
                consumer.multiply_unscaled(piece, row0, sum);
            else
                consumer.multiply_scaled(piece, row0, sum);
            if (piece.last < schedule.slots) {
                leave_part<CONSUMERS>(split, schedule.cluster, rank, sum);
                continue;
            }
            add_parts<CONSUMERS>(split, schedule, piece, rank, sum);
            write_sums<E>(p.out, base + RESULTS + (group * 4 + warp) * WRITE_STAGING, at.token, row0 + group * 64 + warp * 16, sum);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p, const Split& split) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const unsigned base = shared_address(shared), rank = cluster_rank();
        const Barriers barriers(base);
        float* const nested_code = reinterpret_cast<float*>(shared + NESTED_CODE);
        int asked = 0;
        if (threadIdx.x == CONSUMERS) {
            for (int i = 0; i < CODE_SLOTS; i++) {
                init_mbarrier(barriers.codes_here + i * 8, 1);
                init_mbarrier(barriers.codes_free + i * 8, 8);
            }
            for (int i = 0; i < TOKEN_SLOTS; i++) {
                init_mbarrier(barriers.tokens_here + i * 8, 1);
                init_mbarrier(barriers.tokens_free + i * 8, 2 * CLUSTER);
            }
            publish_mbarriers();
            prefetch_map(&p.codes), prefetch_map(&p.scales), prefetch_map(&p.tokens);
            asked = ask_first(p, split, base, barriers, rank);
        }
        __syncwarp();
        if (UNSCALED)
            Table::fill(base + TABLE - SYSTEM, p.quant_type);
        else
            fill_float_table(base + TABLE - SYSTEM, p.quant_type);
        if (NESTED && !p.nested.code) load_nested_code(nested_code, nullptr);
        wait_for_previous_kernel();
        let_next_kernel_start();
        if (NESTED && p.nested.code) load_nested_code(nested_code, p.nested.code);
        cluster_sync();
        if (threadIdx.x >= CONSUMERS) {
            release_registers<40>();
            if (threadIdx.x == CONSUMERS) produce(p, split, base, barriers, rank, asked);
        } else {
            take_registers<232>();
            consume(p, split, base, barriers, nested_code, rank);
        }
        // Neither block leaves while the other may still write to it.
        __syncwarp();
        cluster_sync();
    }
};

#define WIDE(NAME, E, NESTED, ...)                                                                                       \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)                             \
        NAME(const __grid_constant__ Problem p, const Split split) {                                                                        \
        typedef Wide<Product##E, NESTED, __VA_ARGS__> Instance;                                                          \
        static_assert(Instance::BYTES <= 227 * 1024, "shared memory");                                                   \
        Instance::run(p, split);                                                                                                \
    }
WIDE_INSTANCES
