// The int8 product for many rows of A (tokens), on Hopper: the time is that of the tensor cores. int8.cuh gives the formula.
//
// A warpgroup multiplies 64 rows of W by COLUMNS tokens, both from shared memory, 128 columns of them a slot of the ring.
//
// Work: a cluster of two blocks takes 256 rows of W and COLUMNS tokens; each block has 128 of the rows and fetches half of the tokens
// for both: without that the reads of the L2 cache would be the bound. In a block one thread asks the copy engine for a slot, two
// warpgroups multiply, and three warps gather meanwhile what the end of a tile needs: the scales of its tokens and the outlier columns,
// CHUNK at a time. Clusters are persistent; consecutive tiles share rows and tokens in the L2 cache. How the clusters' pieces end
// together: runs.cuh.
//
// Where outlier columns are many, a piece is gone through twice, as int8_outliers.cuh tells: slots of codes, then slots of x, 64 columns
// each, for which W's box comes again. Slots that have no column of their pass are left out. The mere presence of that code makes the
// other way 3 to 17 % slower, so there are instances without; but only the device knows how many columns there are.
#include "hopper.cuh"
#include "int8_outliers.cuh"

constexpr int CLUSTER = 2;  // blocks
#include "runs.cuh"

constexpr int ROWS = 128;  // of a block; a warpgroup has half
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int GROUP = 16;  // tiles of rows that are walked through before the next tokens
constexpr int STEP = 128;  // columns, and bytes, of a slot
constexpr int GATHERERS = 96;

struct Problem {
    TensorMap weight;  // n x k bytes; boxes of ROWS x 128, swizzled by 128 bytes
    TensorMap codes;   // m x k bytes; boxes of COLUMNS / 2 x 128, swizzled by 128 bytes
    TensorMap x;       // m x k of 16 bits; boxes of COLUMNS / 2 x 64, swizzled by 128 bytes; where outlier columns are many
    Operands o;
};

// How outlier columns are taken. SINGLY: one by one; where there are none, and where 16-bit tensor cores do not help. BOTH: as their
// number says. FEW, MANY: the same in two launches, one after another, of which one does nothing: it takes 4 us, but none of them has
// the other's code.
enum class Outliers { SINGLY, BOTH, FEW, MANY };

// FEW_REGISTERS: half of them, so that blocks that quantize the next rows find room beside this one.
template <class E, int COLUMNS, int SLOTS, bool FEW_REGISTERS, Outliers OUTLIERS>
struct Wide {
    typedef typename E::storage storage;
    static constexpr int SUMS = COLUMNS / 2;  // of a thread
    static constexpr int WEIGHT = ROWS * STEP, SLOT = WEIGHT + COLUMNS * STEP;

    // What the end of a tile needs, in shared memory; two of them.
    struct Extras {
        float row_scale[COLUMNS];  // with a tile's first chunk
        float residual[CHUNK][COLUMNS];
        float weight[CHUNK][ROWS];
    };
    // From the bottom, after what the system takes: barriers, results, slots, extras.
    static constexpr int RESULTS = 1024, RING = RESULTS + 8 * WRITE_STAGING, EXTRAS = RING + SLOTS * SLOT;
    static_assert(RING % 1024 == 0, "swizzled");
    static constexpr int BYTES = EXTRAS + 2 * sizeof(Extras);

    struct Barriers {
        unsigned here, free, extras_here, extras_free;
        unsigned counts;  // of outlier columns of each Extras; less than CHUNK: there are no more
        unsigned kind_here, are_many;  // whether outlier columns are many, once it is known

        __device__ __forceinline__ explicit Barriers(unsigned base)
            : here(base), free(base + 128), extras_here(base + 256), extras_free(base + 288), counts(base + 320),
              kind_here(base + 352), are_many(base + 360) {}
    };

    struct Tile {
        int row, token;
    };

    // Tile `index` of the sequence: GROUP tiles of rows, then the next tokens, then the next rows.
    static __device__ __forceinline__ Tile tile(const Operands& o, int index) {
        const int rows = ((int)o.n + CLUSTER * ROWS - 1) / (CLUSTER * ROWS), tokens = ((int)o.m + COLUMNS - 1) / COLUMNS;
        const int group = index / (GROUP * tokens), within = index % (GROUP * tokens);
        const int height = min(GROUP, rows - group * GROUP);
        return {(group * GROUP + within % height) * CLUSTER * ROWS, within / height * COLUMNS};
    }
    static __device__ __forceinline__ Schedule schedule(const Operands& o, const Split& split) {
        const int rows = ((int)o.n + CLUSTER * ROWS - 1) / (CLUSTER * ROWS), tokens = ((int)o.m + COLUMNS - 1) / COLUMNS;
        return Schedule(rows * tokens, ((int)o.k + STEP - 1) / STEP, split.rounds);
    }

    // Brings the first slots of W near, before the previous kernel has ended: a later write is seen in the L2 cache all the same.
    static __device__ __forceinline__ void prefetch_weight(const Problem& p, const Split& split, unsigned rank) {
        Schedule pieces = schedule(p.o, split);
        Piece piece;
        if (!pieces.next(piece)) return;
        const int row = tile(p.o, piece.tile).row + rank * ROWS;
        for (int slot = piece.first; slot < min(piece.last, piece.first + SLOTS); slot++) prefetch_box(&p.weight, slot * STEP, row);
    }

    static constexpr bool MAY_TAKE_TWO = OUTLIERS == Outliers::BOTH || OUTLIERS == Outliers::MANY;  // passes

    // Whether the outlier columns are many. It takes a while until that is known.
    static __device__ __forceinline__ bool are_many(const Barriers& barriers) {
        wait_mbarrier(barriers.kind_here, 0);
        return load_shared(barriers.are_many) != 0;
    }

    // Whether the codes of a slot are gone through, of which `taken` were before: the first ones are, whatever they are, because they are
    // asked for while the kinds of columns are not known.
    static __device__ __forceinline__ bool takes_codes(const ColumnKinds& kinds, int slot, int taken) {
        return taken < SLOTS || kinds.has_others(slot);
    }

    static __device__ __forceinline__ void produce(const Problem& p, const Split& split, unsigned base, const Barriers& barriers,
                                                   unsigned rank) {
        Cursor<SLOTS> c;
        Schedule pieces = schedule(p.o, split);
        Piece piece;
        const ColumnKinds kinds{p.o.mask, (int)p.o.k};
        int early = 0;  // slots that are asked for while it is not known whether there is something to do
        int taken = 0;
        bool known = OUTLIERS == Outliers::SINGLY || OUTLIERS == Outliers::MANY, two = OUTLIERS == Outliers::MANY;
        auto takes_two = [&]() {
            if (!known) two = are_many(barriers), known = true;
            return two;
        };
        // Nobody leaves while something is on its way.
        auto await_early = [&] {
            for (int slot = 0; slot < early; slot++) wait_mbarrier(barriers.here + slot * 8, 0);
        };
        while (pieces.next(piece)) {
            const Tile at = tile(p.o, piece.tile);
            const int row = at.row + rank * ROWS, half = rank * (COLUMNS / 2);
            auto ask = [&](int slot, const TensorMap& tokens, int column) {
                wait_mbarrier(barriers.free + c.slot * 8, c.round ^ 1);
                const unsigned here = barriers.here + c.slot * 8, to = base + RING + c.slot * SLOT;
                expect_bytes(here, SLOT);
                copy_box(to, &p.weight, slot * STEP, row, here);
                copy_box_to_cluster(to + WEIGHT + half * STEP, &tokens, column, at.token + half, here, (1 << CLUSTER) - 1);
                c.next();
            };
            int slot = piece.first;
            if constexpr (OUTLIERS == Outliers::FEW) {
                for (; !known && early < SLOTS && slot < piece.last; slot++, early++) ask(slot, p.codes, slot * STEP);
                if (!known && early == SLOTS) {
                    if (are_many(barriers)) return await_early();
                    known = true;
                }
            }
            for (; slot < piece.last; slot++) {
                if (MAY_TAKE_TWO && taken >= SLOTS && takes_two() && !takes_codes(kinds, slot, taken)) continue;
                ask(slot, p.codes, slot * STEP);
                taken++;
            }
            if constexpr (MAY_TAKE_TWO) {
                for (int half_slot = 2 * piece.first; takes_two() && half_slot < 2 * piece.last; half_slot++)
                    if (kinds.has_outliers(half_slot)) ask(half_slot / 2, p.x, half_slot * (STEP / 2));
            }
        }
        if (OUTLIERS == Outliers::FEW && !known && are_many(barriers)) await_early();
    }

    // Three warps. Each goes through the outlier columns by itself.
    static __device__ __forceinline__ void gather(const Problem& p, const Split& split, Extras* extras, const Barriers& barriers,
                                                  unsigned rank) {
        const Operands& o = p.o;
        const int thread = threadIdx.x - (THREADS - GATHERERS);
        bool two = OUTLIERS == Outliers::MANY;
        if constexpr (OUTLIERS == Outliers::BOTH || OUTLIERS == Outliers::FEW) {
            two = ColumnKinds{o.mask, (int)o.k}.are_many();
            if (thread == 0) {
                store_shared(barriers.are_many, __int_as_float(two));
                arrive(barriers.kind_here);
            }
            if (OUTLIERS == Outliers::FEW && two) return;
        }
        Cursor<2> e;
        Schedule pieces = schedule(o, split);
        Piece piece;
        while (pieces.next(piece)) {
            // Of two passes the first ends with scales in every piece.
            if (!two && piece.last < pieces.slots) continue;
            const Tile at = tile(o, piece.tile);
            const int row0 = at.row + rank * ROWS;
            OutlierWalk walk(two ? nullptr : o.mask, o.k);
            int count;
            bool first = true;
            do {
                i64 own;
                count = walk.next(own);
                wait_mbarrier(barriers.extras_free + e.slot * 8, e.round ^ 1);
                Extras& to = extras[e.slot];
                if (first) {
                    for (int i = thread; i < COLUMNS; i += GATHERERS)
                        to.row_scale[i] = at.token + i < o.m ? o.row_scale[at.token + i] : 0.0f;
                }
                first = false;
                // Lanes take rows and tokens; the loads of a row's columns are under way together.
                for (int i = thread; count > 0 && i < COLUMNS + ROWS; i += GATHERERS) {
                    const bool of_a = i < COLUMNS;
                    const i64 index = of_a ? at.token + i : row0 + i - COLUMNS;
                    const bool inside = index < (of_a ? o.m : o.n);
                    const float scale = inside ? (of_a ? o.row_scale : o.col_scale)[index] : 0.0f;
#pragma unroll
                    for (int c = 0; c < CHUNK; c++) {
                        const i64 column = __shfl_sync(FULL_WARP, own, c);
                        float v = 0.0f;
                        if (inside && c < count) v = of_a ? residual<E>(o, index, column, scale) : outlier_weight(o.weight[index * o.k + column], scale);
                        (of_a ? to.residual[c] + i : to.weight[c] + (i - COLUMNS))[0] = v;
                    }
                }
                if (thread == 0) store_shared(barriers.counts + e.slot * 4, __int_as_float(count));
                __syncwarp();
                if (threadIdx.x % WARP == 0) arrive(barriers.extras_here + e.slot * 8);
                e.next();
            } while (count == CHUNK);
        }
    }

    static __device__ __forceinline__ void write(const Operands& o, unsigned staging, int token0, int row0, const float (&value)[SUMS]) {
        if constexpr (sizeof(storage) == 2) {
            write_sums<E>(Output{o.bias, o.out, (int)o.m, (int)o.n}, staging, token0, row0, value);
        } else {
            // Eight lanes fill 32 bytes of a token.
            const int lane = threadIdx.x % WARP, row = row0 + lane / 4;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (row + 8 * h >= o.n) break;
                const float bias = o.bias ? ((const float*)o.bias)[row + 8 * h] : 0.0f;
#pragma unroll
                for (int j = 0; j < SUMS / 4; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int token = token0 + j * 8 + lane % 4 * 2 + c;
                        if (token < o.m) ((float*)o.out)[(i64)token * o.n + row + 8 * h] = value[4 * j + 2 * h + c] + bias;
                    }
            }
        }
    }

    // A piece in two passes: value = what it adds to the sums of a tile, without W's scales.
    template <class Release>
    static __device__ __forceinline__ void multiply_twice(const Problem& p, const Piece& piece, unsigned base, const Extras* extras,
                                                          const Barriers& barriers, Cursor<SLOTS>& c, Cursor<2>& e, int& taken,
                                                          const Release& release, float (&value)[SUMS]) {
        const int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 + lane / 4, pair = lane % 4 * 2;
        const ColumnKinds kinds{p.o.mask, (int)p.o.k};
        int sum[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0;
        for (int slot = piece.first; slot < piece.last; slot++) {
            if (!takes_codes(kinds, slot, taken)) continue;
            taken++;
            const unsigned others[4] = {kinds.others(slot * 4), kinds.others(slot * 4 + 1), kinds.others(slot * 4 + 2), kinds.others(slot * 4 + 3)};
            wait_mbarrier(barriers.here + c.slot * 8, c.round);
            const unsigned at_slot = base + RING + c.slot * SLOT;
            unsigned a[4][4];
            other_fragments(at_slot + own * STEP, own, others, a);
            const unsigned long long b = swizzled_descriptor(at_slot + WEIGHT);
            fence_products();
#pragma unroll
            for (int s = 0; s < 4; s++) WgmmaS8<COLUMNS>::multiply(sum, a[s], b + s * 2);
            commit_products();
            wait_for_products<0>();
            release(c.slot);
            c.next();
        }
        wait_mbarrier(barriers.extras_here + e.slot * 8, e.round);
#pragma unroll
        for (int j = 0; j < SUMS / 4; j++) {
            float2 row = *reinterpret_cast<const float2*>(&extras[e.slot].row_scale[j * 8 + pair]);
            row.x = __fmul_rn(row.x, INVERSE_127), row.y = __fmul_rn(row.y, INVERSE_127);
            value[4 * j] = __fmul_rn((float)sum[4 * j], row.x), value[4 * j + 1] = __fmul_rn((float)sum[4 * j + 1], row.y);
            value[4 * j + 2] = __fmul_rn((float)sum[4 * j + 2], row.x), value[4 * j + 3] = __fmul_rn((float)sum[4 * j + 3], row.y);
        }
        __syncwarp();  // this warp has read them
        if (lane == 0) arrive(barriers.extras_free + e.slot * 8);
        e.next();
        auto next_half_slot = [&](int from) {
            while (from < 2 * piece.last && !kinds.has_outliers(from)) from++;
            return from;
        };
        auto prepare = [&](int half_slot, const Cursor<SLOTS>& at, unsigned (&a)[4][4]) {
            const unsigned outliers[2] = {kinds.outliers(half_slot * 2), kinds.outliers(half_slot * 2 + 1)};
            wait_mbarrier(barriers.here + at.slot * 8, at.round);
            outlier_fragments<E>(base + RING + at.slot * SLOT + own * STEP, own, half_slot % 2, outliers, a);
        };
        auto multiply = [&](const unsigned (&a)[4][4]) {
            const unsigned long long b = swizzled_descriptor(base + RING + c.slot * SLOT + WEIGHT);
            fence_products();
#pragma unroll
            for (int s = 0; s < 4; s++) Wgmma<typename SixteenBits<E>::Product, COLUMNS>::multiply(value, a[s], b + s * 2);
            commit_products();
        };
        auto finish = [&]() {
            wait_for_products<0>();
            release(c.slot);
            c.next();
        };
        int half_slot = next_half_slot(2 * piece.first);
        if constexpr (FEW_REGISTERS) {
            for (; half_slot < 2 * piece.last; half_slot = next_half_slot(half_slot + 1)) {
                unsigned a[4][4];
                prepare(half_slot, c, a);
                multiply(a);
                finish();
            }
        } else {
            // The next half slot's fragments are made while this one is multiplied.
            Cursor<SLOTS> ahead = c;
            unsigned even[4][4], odd[4][4];
            auto prepare_next = [&](unsigned (&a)[4][4]) {
                if (half_slot < 2 * piece.last) prepare(half_slot, ahead, a), ahead.next();
            };
            auto step = [&](const unsigned (&now)[4][4], unsigned (&next)[4][4]) {
                multiply(now);
                half_slot = next_half_slot(half_slot + 1);
                prepare_next(next);
                finish();
            };
            prepare_next(even);
            while (half_slot < 2 * piece.last) {
                step(even, odd);
                if (half_slot < 2 * piece.last) step(odd, even);
            }
        }
    }

    static __device__ __forceinline__ void consume(const Problem& p, const Split& split, unsigned base, const Extras* extras,
                                                   const Barriers& barriers, unsigned rank) {
        const Operands& o = p.o;
        const int group = threadIdx.x / 128, warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
        const int own = group * 64 + warp * 16 + lane / 4, pair = lane % 4 * 2;
        auto release = [&](int slot) {
            if (threadIdx.x % 128 < CLUSTER) arrive_in_cluster(barriers.free + slot * 8, threadIdx.x % 128);
        };
        Cursor<SLOTS> c;
        Cursor<2> e;
        Schedule pieces = schedule(o, split);
        Piece piece;
        const bool two = OUTLIERS == Outliers::MANY || (OUTLIERS != Outliers::SINGLY && are_many(barriers));
        if (OUTLIERS == Outliers::FEW && two) return;
        int taken = 0;
        while (pieces.next(piece)) {
            const Tile at = tile(o, piece.tile);
            const int row0 = at.row + rank * ROWS;
            // Asked for now, used after the products.
            const float upper = row0 + own < o.n ? o.col_scale[row0 + own] : 0.0f;
            const float lower = row0 + own + 8 < o.n ? o.col_scale[row0 + own + 8] : 0.0f;
            const unsigned staging = base + RESULTS + (group * 4 + warp) * WRITE_STAGING;
            if (MAY_TAKE_TWO && two) {
                if constexpr (MAY_TAKE_TWO) {
                    float value[SUMS];
                    multiply_twice(p, piece, base, extras, barriers, c, e, taken, release, value);
                    if (piece.last < pieces.slots) {
                        leave_part<CONSUMERS>(split, pieces.cluster, rank, value);
                        continue;
                    }
                    add_parts<CONSUMERS>(split, pieces, piece, rank, value);
#pragma unroll
                    for (int i = 0; i < SUMS; i++) value[i] = __fmul_rn(value[i], __fmul_rn(i % 4 < 2 ? upper : lower, INVERSE_127));
                    write(o, staging, at.token, row0 + group * 64 + warp * 16, value);
                }
            } else if constexpr (OUTLIERS != Outliers::MANY) {
                int sum[SUMS];
#pragma unroll
                for (int i = 0; i < SUMS; i++) sum[i] = 0;
                int before = -1;
                for (int slot = piece.first; slot < piece.last; slot++) {
                    wait_mbarrier(barriers.here + c.slot * 8, c.round);
                    const unsigned at_slot = base + RING + c.slot * SLOT;
                    const unsigned long long a = swizzled_descriptor(at_slot + group * 64 * STEP);
                    const unsigned long long b = swizzled_descriptor(at_slot + WEIGHT);
                    fence_products();
#pragma unroll
                    for (int s = 0; s < STEP / 32; s++) WgmmaS8<COLUMNS>::multiply(sum, a + s * 2, b + s * 2);
                    commit_products();
                    wait_for_products<1>();
                    if (before >= 0) release(before);
                    before = c.slot;
                    c.next();
                }
                wait_for_products<0>();
                release(before);
                if (piece.last < pieces.slots) {
                    leave_part<CONSUMERS>(split, pieces.cluster, rank, sum);
                    continue;
                }
                add_parts<CONSUMERS>(split, pieces, piece, rank, sum);

                wait_mbarrier(barriers.extras_here + e.slot * 8, e.round);
                float value[SUMS];
#pragma unroll
                for (int j = 0; j < SUMS / 4; j++) {
                    const float2 row = *reinterpret_cast<const float2*>(&extras[e.slot].row_scale[j * 8 + pair]);
                    value[4 * j] = scaled_sum(sum[4 * j], row.x, upper), value[4 * j + 1] = scaled_sum(sum[4 * j + 1], row.y, upper);
                    value[4 * j + 2] = scaled_sum(sum[4 * j + 2], row.x, lower), value[4 * j + 3] = scaled_sum(sum[4 * j + 3], row.y, lower);
                }
                while (true) {
                    const Extras& now = extras[e.slot];
                    const int count = load_shared(barriers.counts + e.slot * 4);
#pragma unroll 1
                    for (int i = 0; i < count; i++) {
                        const float w = now.weight[i][own], v = now.weight[i][own + 8];
#pragma unroll
                        for (int j = 0; j < SUMS / 4; j++) {
                            const float2 r = *reinterpret_cast<const float2*>(&now.residual[i][j * 8 + pair]);
                            value[4 * j] = __fmaf_rn(r.x, w, value[4 * j]), value[4 * j + 1] = __fmaf_rn(r.y, w, value[4 * j + 1]);
                            value[4 * j + 2] = __fmaf_rn(r.x, v, value[4 * j + 2]), value[4 * j + 3] = __fmaf_rn(r.y, v, value[4 * j + 3]);
                        }
                    }
                    __syncwarp();  // this warp has read it
                    if (lane == 0) arrive(barriers.extras_free + e.slot * 8);
                    e.next();
                    if (count < CHUNK) break;
                    wait_mbarrier(barriers.extras_here + e.slot * 8, e.round);
                }
                write(o, staging, at.token, row0 + group * 64 + warp * 16, value);
            }
        }
    }

    static __device__ __forceinline__ void run(const Problem& p, const Split& split) {
        extern __shared__ __align__(1024) unsigned char shared[];
        // FEW, which is launched before, lets this one start when the mask is complete.
        if (OUTLIERS == Outliers::MANY && !ColumnKinds{p.o.mask, (int)p.o.k}.are_many()) {
            wait_for_previous_kernel();
            return;
        }
        const unsigned base = shared_address(shared), rank = cluster_rank();
        const Barriers barriers(base);
        Extras* const extras = reinterpret_cast<Extras*>(shared + EXTRAS);
        if (threadIdx.x == CONSUMERS) {
            for (int i = 0; i < SLOTS; i++) {
                init_mbarrier(barriers.here + i * 8, 1);
                init_mbarrier(barriers.free + i * 8, 2 * CLUSTER);
            }
            for (int i = 0; i < 2; i++) {
                init_mbarrier(barriers.extras_here + i * 8, GATHERERS / WARP);
                init_mbarrier(barriers.extras_free + i * 8, CONSUMERS / WARP);
            }
            init_mbarrier(barriers.kind_here, 1);
            publish_mbarriers();
            prefetch_map(&p.weight), prefetch_map(&p.codes);
            if (MAY_TAKE_TWO) prefetch_map(&p.x);
            prefetch_weight(p, split, rank);
        }
        if (OUTLIERS != Outliers::FEW) let_next_kernel_start();
        wait_for_previous_kernel();
        if (OUTLIERS == Outliers::FEW) let_next_kernel_start();
        clear_ready(p.o);
        cluster_sync();
        if (threadIdx.x >= CONSUMERS) {
            release_registers<FEW_REGISTERS ? 64 : 72>();
            if (threadIdx.x >= THREADS - GATHERERS)
                gather(p, split, extras, barriers, rank);
            else if (threadIdx.x == CONSUMERS)
                produce(p, split, base, barriers, rank);
        } else {
            take_registers<FEW_REGISTERS ? 88 : 216>();
            consume(p, split, base, extras, barriers, rank);
        }
        // Neither block leaves while the other may still write to it.
        __syncwarp();
        cluster_sync();
    }
};

#define WIDE(DTYPE, E, COLUMNS, SLOTS, FEW_REGISTERS, OUTLIERS, NAME)                                                    \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, FEW_REGISTERS ? 2 : 1)         \
        int8_wide_##COLUMNS##NAME##_##DTYPE(const __grid_constant__ Problem p, const Split split) {                      \
        typedef Wide<E, COLUMNS, SLOTS, FEW_REGISTERS, OUTLIERS> Instance;                                               \
        static_assert(Instance::BYTES <= 227 * 1024, "shared memory");                                                   \
        Instance::run(p, split);                                                                                         \
    }
#define WIDES(DTYPE, E, OUTLIERS, NAME)                                                                                  \
    WIDE(DTYPE, E, 64, 8, true, OUTLIERS, NAME)                                                                          \
    WIDE(DTYPE, E, 128, 6, false, OUTLIERS, NAME)                                                                        \
    WIDE(DTYPE, E, 256, 4, false, OUTLIERS, NAME)
WIDES(f32, F32, Outliers::SINGLY, )
WIDES(f16, F16, Outliers::SINGLY, )
WIDES(bf16, BF16, Outliers::SINGLY, )
WIDES(f16, F16, Outliers::BOTH, _both)
WIDES(bf16, BF16, Outliers::BOTH, _both)
WIDE(f16, F16, 256, 4, false, Outliers::FEW, _few)
WIDE(bf16, BF16, 256, 4, false, Outliers::FEW, _few)
WIDE(f16, F16, 256, 4, false, Outliers::MANY, _many)
WIDE(bf16, BF16, 256, 4, false, Outliers::MANY, _many)
