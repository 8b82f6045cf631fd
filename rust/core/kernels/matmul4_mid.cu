// y = x W^T + bias for a moderate number of rows of x (tokens), on Hopper: W is still what takes the time to read, but the tensor
// cores and the reads of x weigh, too.
//
//   x     m x k of E                       codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//
// As in matmul4_skinny.cu the operand is the unscaled value of the code, one table read for two, and the sum over 64 columns is
// multiplied by the block's scale in float32; as in matmul4_wgmma.cu a warpgroup multiplies 64 rows, from registers, by COLUMNS
// tokens in shared memory.
//
// Work: a block has GROUPS times 64 rows, which share the tokens; HALVES warpgroups have the same rows and take turns along k. One
// more warpgroup has the thread that asks the copy engine for codes and scales (256 columns a slot) and tokens (64 columns a slot).
// Where there are few rows, a cluster of SPLIT blocks shares a tile along k. All sums of an element meet in shared memory and are
// added in a fixed order; in a cluster each block does so for its part of the tokens. Blocks are persistent.
#include "matmul4_hopper.cuh"
#include "matmul4_instances.cuh"

template <class E, bool NESTED, int COLUMNS, int GROUPS, int HALVES, int SPLIT, int CODE_SLOTS, int TOKEN_SLOTS>
struct Mid {
    static constexpr int SUMS = COLUMNS / 2;  // of a thread
    static constexpr int ROWS = 64 * GROUPS, CONSUMERS = 128 * GROUPS * HALVES, THREADS = CONSUMERS + 128;
    // An assembler that knows that old sums do not matter takes new registers at each step.
    static constexpr bool FEW_REGISTERS = GROUPS * HALVES == 4;
    static constexpr int CODES = ROWS * SLOT_COLUMNS / 2, SCALES = ROWS * 16, TOKENS = COLUMNS * STEP * 2;
    typedef PairTable<E, 256> Table;
    // From the bottom: what the system takes, barriers, the nested code, scales, results; slots of codes that find room; the table;
    // the other slots of codes; tokens.
    static constexpr int SYSTEM = 1024, NESTED_CODE = 1024, SCALE_RING = 2048, RESULTS = SCALE_RING + CODE_SLOTS * SCALES;
    static constexpr int BOTTOM = RESULTS + 4 * GROUPS * WRITE_STAGING, TABLE = Table::BYTES - SYSTEM;
    static constexpr int BELOW = (TABLE - BOTTOM) / CODES < CODE_SLOTS ? (TABLE - BOTTOM) / CODES : CODE_SLOTS;
    static constexpr int CODE_RING = TABLE + Table::BYTES, TOKEN_RING = CODE_RING + (CODE_SLOTS - BELOW) * CODES;
    // Sums of warpgroups and blocks that share a tile, token by token.
    static constexpr int PITCH = ROWS + 4, MEETING = TOKEN_RING + TOKEN_SLOTS * TOKENS;
    static constexpr int BYTES = MEETING + (HALVES * SPLIT > 1 ? COLUMNS * PITCH * 4 : 0);
    static_assert(TOKEN_SLOTS <= 16 && CODE_SLOTS <= 8, "room for the barriers");
    static_assert(TOKEN_SLOTS % HALVES == 0 && HALVES <= 2, "a warpgroup meets every slot or every second one");

    static __device__ __forceinline__ int tile_count(const Problem& p) {
        return ((p.out.n + ROWS - 1) / ROWS) * ((p.out.m + COLUMNS - 1) / COLUMNS);
    }
    // Neighbouring tiles have the same tokens.
    static __device__ __forceinline__ int row_of(const Problem& p, int tile) { return tile % ((p.out.n + ROWS - 1) / ROWS) * ROWS; }
    static __device__ __forceinline__ int token_of(const Problem& p, int tile) {
        return tile / ((p.out.n + ROWS - 1) / ROWS) * COLUMNS;
    }
    // This block's slots of a row.
    static __device__ __forceinline__ int slot_bound(const Problem& p, unsigned part) {
        return p.slot_count() * part / SPLIT;
    }
    static __device__ __forceinline__ unsigned code_slot(unsigned base, int slot) {
        return base + (slot < BELOW ? TABLE - (slot + 1) * CODES : CODE_RING + (slot - BELOW) * CODES);
    }

    // Asks for a slot of the weight, whose place in the ring is free.
    static __device__ __forceinline__ void ask_weight(const Problem& p, unsigned base, const Barriers& barriers, int place, int row, int slot) {
        const unsigned here = barriers.codes_here + place * 8;
        expect_bytes(here, CODES + SCALES);
        copy_box(code_slot(base, place), &p.codes, slot * SLOT_COLUMNS / 2, row, here);
        copy_box(base + SCALE_RING + place * SCALES, &p.scales, p.first_scale(slot, NESTED), row, here);
    }
    // Before the previous kernel has ended: one slot, returned. More of them, or in clusters, would be in its way.
    static __device__ __forceinline__ int ask_first(const Problem& p, unsigned base, const Barriers& barriers) {
        if (!p.settled || SPLIT > 1 || blockIdx.x >= tile_count(p) || p.slot_count() == 0) return 0;
        ask_weight(p, base, barriers, 0, row_of(p, blockIdx.x), 0);
        return 1;
    }

    // `asked` slots of the weight have been asked for.
    static __device__ __forceinline__ void produce(const Problem& p, unsigned base, const Barriers& barriers, unsigned rank, int asked) {
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        const int tiles = tile_count(p), first = slot_bound(p, rank), last = slot_bound(p, rank + 1);
        for (int tile = blockIdx.x / SPLIT; tile < tiles; tile += gridDim.x / SPLIT) {
            const int row = row_of(p, tile), token = token_of(p, tile);
            for (int slot = first; slot < last; slot++) {
                if (asked-- <= 0) {
                    wait_mbarrier(barriers.codes_free + c.slot * 8, c.round ^ 1);
                    ask_weight(p, base, barriers, c.slot, row, slot);
                }
                c.next();
                for (int q = 0; q < SLOT_STEPS; q++) {
                    wait_mbarrier(barriers.tokens_free + t.slot * 8, t.round ^ 1);
                    const unsigned here = barriers.tokens_here + t.slot * 8;
                    expect_bytes(here, TOKENS);
                    copy_box(base + TOKEN_RING + t.slot * TOKENS, &p.tokens, slot * SLOT_COLUMNS + q * STEP, token, here);
                    t.next();
                }
            }
        }
    }

    // What a consumer thread needs to decode: its rows `row` and row + 8 of the block, and its table.
    struct Decoder {
        unsigned lane_base, select;  // the permutation that puts byte t of a word into the table's address
        int row;
        float inverse_factor;

        __device__ __forceinline__ Decoder(const Problem& p, unsigned base) {
            const int lane = threadIdx.x % WARP;
            lane_base = (base + TABLE) | (lane * 4);
            select = 0x7604 | (lane % 4) << 4;
            row = threadIdx.x / WARP % (4 * GROUPS) * 16 + lane / 4;
            inverse_factor = 1.0f / product_factor<E>(p.quant_type);
        }

        __device__ __forceinline__ unsigned pair(unsigned word) const { return load_shared(permute_bytes(word, lane_base, select)); }

        // Fragments of step q of a slot.
        __device__ __forceinline__ void decode(unsigned codes, int q, unsigned (&a)[4][4]) const {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const unsigned at = codes + row * 128 + (((q * 2 + c) ^ (row & 7)) << 4);
                const uint4 u = load_shared4(at), l = load_shared4(at + 8 * 128);
                a[2 * c][0] = pair(u.x), a[2 * c][1] = pair(l.x), a[2 * c][2] = pair(u.y), a[2 * c][3] = pair(l.y);
                a[2 * c + 1][0] = pair(u.z), a[2 * c + 1][1] = pair(l.z), a[2 * c + 1][2] = pair(u.w), a[2 * c + 1][3] = pair(l.w);
            }
        }
    };

    // Element i of a thread's sums, where sums meet.
    static __device__ __forceinline__ unsigned meeting(unsigned base, int row, int i) {
        return base + MEETING + ((i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * PITCH + row + i % 4 / 2 * 8) * 4;
    }

    static __device__ __forceinline__ void consume(const Problem& p, unsigned base, const Barriers& barriers, const float* nested_code,
                                                   unsigned rank) {
        constexpr int STEPS = SLOT_STEPS / HALVES;  // of a slot, for this warpgroup
        const int half = threadIdx.x / (128 * GROUPS), warp = threadIdx.x / WARP % (4 * GROUPS), lane = threadIdx.x % WARP;
        const Decoder decoder(p, base);
        RowScales<NESTED> row_scales(p, nested_code, decoder.row);
        Cursor<CODE_SLOTS> c;
        Cursor<TOKEN_SLOTS> t;
        t.slot = half;
        const int never = p.k == 0;
        const int tiles = tile_count(p), first = slot_bound(p, rank), last = slot_bound(p, rank + 1);
        for (int tile = blockIdx.x / SPLIT; tile < tiles; tile += gridDim.x / SPLIT) {
            const int row0 = row_of(p, tile), token = token_of(p, tile);
            float sum[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] = 0.0f;
            row_scales.start(p, row0, first);
            float part[SUMS] = {};
            for (int slot = first; slot < last; slot++) {
                row_scales.advance(p, row0, slot);
                wait_mbarrier(barriers.codes_here + c.slot * 8, c.round);
                const unsigned codes = code_slot(base, c.slot), scales = base + SCALE_RING + c.slot * SCALES;
                unsigned a[2][4][4];
                decoder.decode(codes, half, a[0]);
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const int q = i * HALVES + half;
                    wait_mbarrier(barriers.tokens_here + t.slot * 8, t.round);
                    fence_products();
                    const unsigned long long tokens = swizzled_descriptor(base + TOKEN_RING + t.slot * TOKENS);
                    if (FEW_REGISTERS)
                        Wgmma<E, COLUMNS>::multiply_if(part, a[i % 2][0], tokens, never);
                    else
                        Wgmma<E, COLUMNS>::start(part, a[i % 2][0], tokens);
#pragma unroll
                    for (int s = 1; s < 4; s++) Wgmma<E, COLUMNS>::multiply(part, a[i % 2][s], tokens + s * 2);
                    commit_products();
                    // The next fragments while the tensor cores multiply these.
                    if (i + 1 < STEPS) decoder.decode(codes, q + HALVES, a[(i + 1) % 2]);
                    const float upper = row_scales.template read<0>(p, scales, slot, q) * decoder.inverse_factor;
                    const float lower = row_scales.template read<1>(p, scales, slot, q) * decoder.inverse_factor;
                    wait_for_products<0>();
                    if (threadIdx.x % 128 == 0) arrive(barriers.tokens_free + t.slot * 8);
                    t.slot += HALVES;
                    if (t.slot >= TOKEN_SLOTS) t.slot -= TOKEN_SLOTS, t.round ^= 1;
#pragma unroll
                    for (int j = 0; j < SUMS; j++) sum[j] = __fmaf_rn(part[j], j % 4 < 2 ? upper : lower, sum[j]);
                }
                __syncwarp();  // this warp has read the slot
                if (lane == 0) arrive(barriers.codes_free + c.slot * 8);
                c.next();
            }
            if (HALVES == 2) {
                if (half == 1) {
#pragma unroll
                    for (int i = 0; i < SUMS; i++) store_shared(meeting(base, decoder.row, i), sum[i]);
                }
                barrier(1, CONSUMERS);
                if (half == 0) {
#pragma unroll
                    for (int i = 0; i < SUMS; i++) sum[i] += __uint_as_float(load_shared(meeting(base, decoder.row, i)));
                }
                if (tile + gridDim.x / SPLIT < tiles) barrier(2, CONSUMERS);  // before the next tile's sums come
            }
            if (half == 1) continue;
            if (SPLIT == 1) {
                write_sums<E>(p.out, base + RESULTS + warp * WRITE_STAGING, token, row0 + warp * 16, sum);
            } else {
#pragma unroll
                for (int i = 0; i < SUMS; i++) store_shared(meeting(base, decoder.row, i), sum[i]);
            }
        }
    }

    // Adds what the blocks of the cluster have summed of their one tile, each block for its part of the tokens.
    static __device__ __forceinline__ void add_parts(const Problem& p, unsigned base, unsigned rank) {
        typedef typename E::storage storage;
        const int tile = blockIdx.x / SPLIT, row0 = row_of(p, tile), token0 = token_of(p, tile);
        for (int i = threadIdx.x; i < COLUMNS / SPLIT * ROWS; i += THREADS) {
            const int row = row0 + i % ROWS, token = rank * (COLUMNS / SPLIT) + i / ROWS;
            if (row >= p.out.n || token0 + token >= p.out.m) continue;
            float total = 0.0f;
#pragma unroll
            for (int r = 0; r < SPLIT; r++) total += load_cluster(base + MEETING + (token * PITCH + i % ROWS) * 4, r);
            if (p.out.bias) total += E::widen(((const storage*)p.out.bias)[row]);
            ((storage*)p.out.y)[(i64)(token0 + token) * p.out.n + row] = E::narrow(total);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const unsigned base = shared_address(shared), rank = SPLIT == 1 ? 0 : cluster_rank();
        const Barriers barriers(base);
        float* const nested_code = reinterpret_cast<float*>(shared + NESTED_CODE);
        int asked = 0;
        if (threadIdx.x == CONSUMERS) {
            for (int i = 0; i < CODE_SLOTS; i++) {
                init_mbarrier(barriers.codes_here + i * 8, 1);
                init_mbarrier(barriers.codes_free + i * 8, 4 * GROUPS * HALVES);
            }
            for (int i = 0; i < TOKEN_SLOTS; i++) {
                init_mbarrier(barriers.tokens_here + i * 8, 1);
                init_mbarrier(barriers.tokens_free + i * 8, GROUPS);
            }
            publish_mbarriers();
            prefetch_map(&p.codes), prefetch_map(&p.scales), prefetch_map(&p.tokens);
            asked = ask_first(p, base, barriers);
        }
        __syncwarp();
        Table::fill(base + TABLE, p.quant_type);
        if (NESTED && !p.nested.code) load_nested_code(nested_code, nullptr);
        wait_for_previous_kernel();
        let_next_kernel_start();
        if (NESTED && p.nested.code) load_nested_code(nested_code, p.nested.code);
        __syncthreads();
        if (threadIdx.x >= CONSUMERS) {
            release_registers<GROUPS * HALVES == 2 ? 40 : 32>();
            if (threadIdx.x == CONSUMERS) produce(p, base, barriers, rank, asked);
        } else {
            take_registers<GROUPS * HALVES == 2 ? 232 : 112>();
            consume(p, base, barriers, nested_code, rank);
        }
        if (SPLIT > 1) {
            __syncwarp();
            cluster_sync();
            add_parts(p, base, rank);
            __syncwarp();
            cluster_sync();  // nobody leaves while another still reads its sums
        }
    }
};

#define MID(NAME, E, NESTED, COLUMNS, GROUPS, HALVES, SPLIT, ...)                                                        \
    extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(128 * (GROUPS * HALVES + 1), 1)           \
        NAME(const __grid_constant__ Problem p) {                                                                        \
        typedef Mid<Product##E, NESTED, COLUMNS, GROUPS, HALVES, SPLIT, __VA_ARGS__> Instance;                           \
        static_assert(Instance::BYTES <= 227 * 1024, "shared memory");                                                   \
        Instance::run(p);                                                                                                \
    }
MID_INSTANCES
