// The int8 product for few rows of A (tokens), on Hopper: the time is that of reading W once. int8.cuh gives the formula.
//
// Work: the eight warps of a block share a tile of 16 * RT rows of W; each takes every eighth stage of STAGE columns, through a ring of
// its own in shared memory that the copy engine fills. W is operand A of the tensor cores, tokens are operand B. The warps' integer
// sums meet in shared memory. Blocks are persistent, one on a multiprocessor: with two, the next launch's would meet on those that end first.
//
// Outlier columns: where they are few, what the codes leave over of x is kept, W's codes are fetched once more, and both are multiplied at
// the end of a tile. Where they are many, each stage's are gathered from it and from x: int8_gather.cuh.
//
// Tokens: OWN, a block quantizes all rows of x itself and keeps their codes in shared memory, while its first stages of W are on their
// way; KEPT, the codes are given and copied once, each warp's by itself; COPIED, they come with W through the ring.
//
// Small reads that everything waits for are asked for before W: behind a ring's worth of W of all blocks they would come last.
//
// Order: of 64 columns lane t of a group takes bytes 16 t ... 16 t + 15, in both operands: two products. Fragment row i is row
// (i % 2) * 4 + i / 2 of eight, so that the two rows that lanes read together differ in what the swizzle exchanges: no bank conflict.
//
// Shared memory, wavefronts for 16 rows of 64 columns: 8 to read W and 4 for eight tokens; the copy engine writes 8 (and 4).
#include "int8_listed.cuh"
#include "int8_own_rows.cuh"

constexpr int FIRST = 2;  // stages of a warp that are asked for while the rows are being quantized

template <class E, Tokens MODE, int NT, int RT, int DEPTH>
struct Skinny : SkinnyLayout<E, MODE, NT, RT, DEPTH> {
    typedef SkinnyLayout<E, MODE, NT, RT, DEPTH> Layout;
    typedef typename Layout::storage storage;
    typedef typename Layout::Gather Gather;
    typedef typename Layout::Outliers Outliers;
    typedef typename Layout::Tiles Tiles;
    typedef typename Layout::Known Known;
    typedef ListedColumns<Layout> Listed;
    typedef OwnRows<Layout> Own;
    using Layout::BOXES, Layout::ELEMENTS, Layout::KNOWN, Layout::OWN_AT, Layout::PITCH, Layout::RING, Layout::ROWS, Layout::SLOT;
    using Layout::STAGE, Layout::TILES, Layout::TOKENS, Layout::TOKEN_BARRIERS, Layout::WEIGHT, Layout::WORDS;
    using Layout::kept, Layout::padded;

    // Where a warp is: a tile of rows and a stage of columns, and what follows.
    struct Place {
        int row0, stage;

        __device__ __forceinline__ void next(int warp, int per) {
            stage += WARPS;
            if (stage >= per * WARPS) stage = warp, row0 += gridDim.x * ROWS;
        }
    };

    static __device__ __forceinline__ void ask(const Problem& p, const Place& at, unsigned slot, unsigned barrier) {
        expect_bytes(barrier, SLOT);
#pragma unroll
        for (int b = 0; b < BOXES; b++) {
            copy_box(slot + b * ROWS * BOX, &p.weight, at.stage * STAGE + b * BOX, at.row0, barrier);
            if (MODE == COPIED) copy_box(slot + WEIGHT + b * TOKENS * BOX, &p.codes, at.stage * STAGE + b * BOX, 0, barrier);
        }
    }

    // One lane asks for the tokens of all stages of its warp.
    static __device__ __forceinline__ void ask_tokens(const Problem& p, int warp, int stages, unsigned tokens, unsigned barrier) {
        expect_bytes(barrier, (stages - warp + WARPS - 1) / WARPS * TOKENS * STAGE);
        for (int box = warp * BOXES; box < stages * BOXES; box += WARPS * BOXES) {
#pragma unroll
            for (int b = 0; b < BOXES; b++) copy_box(tokens + (box + b) * TOKENS * BOX, &p.codes, (box + b) * BOX, 0, barrier);
        }
    }

    // Halves have sums of their own where there are few: products that follow each other wait for each other.
    static constexpr int CHAINS = RT * NT == 1 ? 2 : 1;

    // MASKED: without the columns whose bits are set in the lanes' words.
    template <bool MASKED>
    static __device__ __forceinline__ void multiply(unsigned slot, unsigned own_tokens, int rows, unsigned outliers,
                                                    int (&sum)[CHAINS][RT][NT][4]) {
        const int lane = threadIdx.x % WARP, g = interleaved(lane / 4), t = lane % 4;
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int piece = h * 4 + t;
                uint4 kept;
                if (MASKED) {
                    const unsigned others = ~__shfl_sync(FULL_WARP, outliers, b * 4 + piece / 2) >> piece % 2 * 16;
                    kept = make_uint4(byte_mask(others), byte_mask(others >> 4), byte_mask(others >> 8), byte_mask(others >> 12));
                }
                uint4 tokens[NT];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const int token = MODE == OWN ? g & (rows - 1) : g;
                    const unsigned at = (MODE == COPIED ? slot + WEIGHT : own_tokens) + (b * rows + j * 8) * BOX;
                    tokens[j] = load_shared4(at + token * BOX + ((piece ^ token) << 4));
                }
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const unsigned at = slot + b * ROWS * BOX + (r * 16 + g) * BOX + ((piece ^ g) << 4);
                    uint4 u = load_shared4(at), l = load_shared4(at + 8 * BOX);
                    if (MASKED) {
                        u.x &= kept.x, u.y &= kept.y, u.z &= kept.z, u.w &= kept.w;
                        l.x &= kept.x, l.y &= kept.y, l.z &= kept.z, l.w &= kept.w;
                    }
                    const unsigned first[4] = {u.x, l.x, u.y, l.y}, second[4] = {u.z, l.z, u.w, l.w};
#pragma unroll
                    for (int j = 0; j < NT; j++)
                        mma_s8(sum[0][r][j], first, tokens[j].x, tokens[j].y), mma_s8(sum[CHAINS - 1][r][j], second, tokens[j].z, tokens[j].w);
                }
            }
    }

    // What a thread's results have in common, of one row of W: asked for long before the end of a tile.
    struct RowParts {
        float col_scale, bias;

        __device__ __forceinline__ RowParts(const Operands& o, int row)
            : col_scale(row < o.n ? o.col_scale[row] : 0.0f),
              bias(o.bias && row < o.n ? E::widen(((const storage*)o.bias)[row]) : 0.0f) {}
    };
    static_assert(THREADS % ROWS == 0, "they are of one row");

    // Where a tile keeps a thread's sum.
    static __device__ __forceinline__ int place(int r, int j, int q) {
        const int lane = threadIdx.x % WARP, g = interleaved(lane / 4), t = lane % 4;
        return (j * 8 + interleaved(t * 2 + q % 2)) * PITCH + r * 16 + g + q / 2 * 8;
    }

    // Adds the warps' sums of gathered columns, one warp after another: so they have one order.
    static __device__ __forceinline__ void add_gathered(Outliers& outliers, const Gather& gather) {
        for (int turn = 0; turn < WARPS; turn++) {
            if (turn == threadIdx.x / WARP) {
#pragma unroll
                for (int r = 0; r < RT; r++)
#pragma unroll
                    for (int j = 0; j < NT; j++)
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            float& at = outliers.gathered[place(r, j, q)];
                            at = turn == 0 ? gather.sum[r][j][q] : at + gather.sum[r][j][q];
                        }
            }
            __syncthreads();
        }
    }

    // Adds the warps' sums of a tile, finishes them and writes them out.
    template <bool MANY>
    static __device__ __forceinline__ void finish(const Problem& p, int* sums, Outliers& outliers, const Known& known,
                                                  const Gather& gather, int row0, const RowParts& parts, const int (&sum)[CHAINS][RT][NT][4]) {
        const Operands& o = p.o;
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    atomicAdd(&sums[place(r, j, q)], CHAINS == 1 ? sum[0][r][j][q] : sum[0][r][j][q] + sum[1][r][j][q]);
        wait_for_copies<1>();  // of this tile: those of the next may be on their way
        if constexpr (MANY)
            add_gathered(outliers, gather);
        else
            __syncthreads();
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            const int e = i * THREADS + threadIdx.x, token = e / ROWS, row = row0 + e % ROWS;
            if (token >= o.m) break;
            int& total = sums[token * PITCH + e % ROWS];
            float value = scaled_sum(total, __uint_as_float(known.absmax[token]), parts.col_scale);
            total = 0;  // for the tile after the next
            if (row >= o.n) continue;
#pragma unroll 4
            for (int c = 0; !MANY && c < known.count; c++) {
                const i8 code = (i8)(outliers.weight[c][e % ROWS] >> known.columns[c] % 4 * 8);
                value = __fmaf_rn(known.residual[c][token], outlier_weight(code, parts.col_scale), value);
            }
            if (MANY) value = __fmaf_rn(outliers.gathered[token * PITCH + e % ROWS], __fmul_rn(parts.col_scale, INVERSE_127), value);
            ((storage*)o.out)[(i64)token * o.n + row] = E::narrow(o.bias ? value + parts.bias : value);
        }
    }

    // What a block has to do.
    struct Work {
        int stages, per;   // of columns: of a tile, of a warp
        int rows;          // of tokens that are kept
        int first, tiles;  // the first tile, and how many there are

        __device__ __forceinline__ explicit Work(const Operands& o)
            : stages(padded(o) / STAGE), per((stages + WARPS - 1) / WARPS), rows(kept(o)), first(blockIdx.x) {
            const int all = ((int)o.n + ROWS - 1) / ROWS;
            tiles = first < all ? (all - first + gridDim.x - 1) / gridDim.x : 0;
        }
    };

    // MANY outlier columns have a loop of its own: with their registers and branches the other would be slower.
    template <bool MANY, class AskNext>
    static __device__ __forceinline__ void multiply_tiles(const Problem& p, const Work& work, unsigned ring, unsigned barriers,
                                                          unsigned own_tokens, const unsigned* mask, Tiles& tiles, Known& known, const typename Listed::LeftOver& left_over,
                                                          RowParts parts, const AskNext& ask_next) {
        const Operands& o = p.o;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        int slot = 0, phase = 0;
        const ColumnKinds kinds{mask, (int)o.k};
        // The lanes' words of stage i of the warp; asked for a stage ahead.
        auto words = [&](int i) {
            const int stage = (i < work.per ? i : 0) * WARPS + warp;
            return MANY && lane < WORDS ? kinds.outliers(stage * WORDS + lane) : 0;
        };
        unsigned next_words = words(0);
        if (!MANY) Listed::ask_outliers(o, known, tiles.outliers[0], work.first * ROWS);
        for (int tile = 0; tile < work.tiles; tile++) {
            const int row0 = (work.first + tile * gridDim.x) * ROWS;
            const int next_row0 = row0 + gridDim.x * ROWS, next_row = next_row0 + threadIdx.x % ROWS;
            if (!MANY) Listed::ask_outliers(o, known, tiles.outliers[(tile + 1) % 3], next_row0);
            if (threadIdx.x < ROWS && next_row < o.n) prefetch(o.col_scale + next_row);
            int sum[CHAINS][RT][NT][4] = {};
            Gather gather;
            for (int i = 0; i < work.per; i++) {
                const int stage = i * WARPS + warp;
                const unsigned at = ring + slot * SLOT;
                // A stage past the last has no own tokens; what is read for it is multiplied by zeros.
                const unsigned codes = own_tokens + min(stage, work.stages - 1) * BOXES * work.rows * BOX;
                const unsigned outliers = next_words;
                next_words = words(i + 1);
                if (MANY && gather.start(outliers)) {
                    gather.ask(o, stage * STAGE);
                    wait_mbarrier(barriers + slot * 8, phase);
                    multiply<true>(at, codes, work.rows, outliers, sum);
                    gather.add(o, stage * STAGE, [&](int row, int column) {
                        const int piece = column / 16 % 8;
                        return load_shared_u8(at + (column / BOX * ROWS + row) * BOX + ((piece ^ (row & 7)) << 4) + column % 16);
                    });
                } else {
                    wait_mbarrier(barriers + slot * 8, phase);
                    multiply<false>(at, codes, work.rows, 0, sum);
                }
                __syncwarp();  // everybody has read the slot
                if (lane == 0) ask_next(slot);
                if (++slot == DEPTH) slot = 0, phase ^= 1;
            }
            if (tile == 0) left_over.store(o, known);
            finish<MANY>(p, tiles.sum[tile % 2], tiles.outliers[tile % 3], known, gather, row0, parts, sum);
            parts = RowParts(o, next_row);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const Operands& o = p.o;
        const unsigned base = shared_address(shared);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const unsigned barriers = base + warp * DEPTH * 8, token_barrier = base + TOKEN_BARRIERS + warp * 8;
        const unsigned ring = base + RING + warp * DEPTH * SLOT, own_tokens = base + OWN_AT;
        Tiles& tiles = *reinterpret_cast<Tiles*>(shared + TILES);
        Known& known = *reinterpret_cast<Known*>(shared + KNOWN);
        unsigned char* const tokens = shared + OWN_AT;
        unsigned* const own_mask = reinterpret_cast<unsigned*>(tokens + OWN_BYTES);
        const bool marked = MODE == OWN ? p.threshold > 0.0f : o.mask != nullptr;
        const unsigned* const mask = MODE == COPIED ? o.mask : own_mask;

        const Work work(o);
        Place asked{work.first * ROWS, warp};
        int left = work.tiles * work.per;
        auto ask_next = [&](int slot) {
            // Past the last column everything reads as 0, and need not be asked for; the ring goes on all the same.
            if (left > 0) ask(p, asked, ring + slot * SLOT, barriers + slot * 8);
            asked.next(warp, work.per);
            left--;
        };
        let_next_kernel_start();
        int in_flight = 0;  // stages asked for before the wait
        if (lane == 0) {
            for (int d = 0; d < DEPTH; d++) init_mbarrier(barriers + d * 8, 1);
            if (MODE == KEPT) init_mbarrier(token_barrier, 1);
            publish_mbarriers();
            prefetch_map(&p.weight);
            if (MODE != OWN) prefetch_map(&p.codes);
            if (MODE == KEPT && p.after_rows) {
                // W is there already. Not the whole ring: the tokens would have to wait behind it.
                for (; in_flight < FIRST; in_flight++) ask_next(in_flight);
            } else {
                // Reading W must wait, bringing it near need not: a later write is seen in the L2 cache all the same. It pays where the
                // rows are being quantized meanwhile. Own rows would have to wait behind it.
                const int ahead = MODE != OWN ? DEPTH : kept(o) <= 2 ? 1 : 0;
                Place near = asked;
                for (int d = 0; d < min(ahead, left); d++) {
#pragma unroll
                    for (int b = 0; b < BOXES; b++) prefetch_box(&p.weight, near.stage * STAGE + b * BOX, near.row0);
                    near.next(warp, work.per);
                }
            }
        }
        for (int i = threadIdx.x; i < TOKENS * PITCH; i += THREADS) tiles.sum[0][i] = tiles.sum[1][i] = 0;
        if (threadIdx.x == 0) known.count = 0, known.many = false;
        if (MODE == OWN) {
            if (threadIdx.x < TOKENS) known.absmax[threadIdx.x] = 0;
            for (int i = threadIdx.x; i < ((int)o.k + 31) / 32; i += THREADS) own_mask[i] = 0;
        }
        __syncthreads();
        wait_for_previous_kernel();
        RowParts parts(o, work.first * ROWS + threadIdx.x % ROWS);
        typename Listed::LeftOver left_over;
        auto ask_weight = [&] {
            if (lane == 0)
                for (int d = in_flight; d < DEPTH; d++) ask_next(d);
            __syncwarp();
        };
        const int words = marked ? ((int)o.k + 31) / 32 : 0;
        unsigned bits = 0;  // of the mask, this thread's first
        if (MODE == OWN) {
            const typename Own::Share share(o);
            if (padded(o) / E::PER_VECTOR <= 4 * share.step)
                Own::template quantize<4>(p, share, tokens, known, own_mask, ask_weight);
            else
                Own::template quantize<8>(p, share, tokens, known, own_mask, ask_weight);
            __syncthreads();
            if (threadIdx.x < words) bits = own_mask[threadIdx.x];
            if (blockIdx.x == 0)  // for whoever asks which they were
                for (int i = threadIdx.x; i < words; i += THREADS) const_cast<unsigned*>(o.mask)[i] = own_mask[i];
        } else {
            if (MODE == KEPT && lane == 0) ask_tokens(p, warp, work.stages, own_tokens, token_barrier);
            left_over.ask_scale(o);
            if (MODE == COPIED && threadIdx.x < words) bits = o.mask[threadIdx.x];
            if (MODE == KEPT && threadIdx.x < words) {
                const int masks = p.after_rows ? (int)o.m : 1;
#pragma unroll
                for (int i = 0; i < TOKENS; i++)
                    if (i < masks) bits |= o.mask[i * words + threadIdx.x];
            }
            ask_weight();
            if (MODE == KEPT && threadIdx.x < words) {
                // Bits past the last column have not been written.
                if ((int)threadIdx.x * 32 + 32 > o.k) bits &= (1u << o.k % 32) - 1;
                own_mask[threadIdx.x] = bits;
            }
        }
        clear_ready(o);
        if (marked) {
            Listed::list_outliers(o, mask, bits, known);
            left_over.ask(o, tokens, known);
        }

        if (MODE == KEPT) wait_mbarrier(token_barrier, 0);
        if (known.many)
            multiply_tiles<true>(p, work, ring, barriers, own_tokens, mask, tiles, known, left_over, parts, ask_next);
        else
            multiply_tiles<false>(p, work, ring, barriers, own_tokens, mask, tiles, known, left_over, parts, ask_next);
    }
};

#define SKINNY(NAME, KILOBYTES, ...)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Problem p) {                   \
        typedef Skinny<__VA_ARGS__> Instance;                                                                            \
        static_assert(Instance::BYTES <= KILOBYTES * 1024, "shared memory");                                                   \
        Instance::run(p);                                                                                                \
    }
#define SKINNIES(DTYPE, E)                                                                                               \
    SKINNY(int8_skinny_own_##DTYPE, 210, E, OWN, 1, 1, 4)                                                                \
    SKINNY(int8_skinny_kept_8_##DTYPE, 203, E, KEPT, 1, 1, 4)                                                            \
    SKINNY(int8_skinny_kept_16_##DTYPE, 214, E, KEPT, 2, 2, 4)                                                           \
    SKINNY(int8_skinny_8_##DTYPE, 227, E, COPIED, 1, 1, 4)                                                               \
    SKINNY(int8_skinny_16_##DTYPE, 227, E, COPIED, 2, 2, 4)                                                              \
    SKINNY(int8_skinny_32_##DTYPE, 227, E, COPIED, 4, 2, 3)
SKINNIES(f32, F32)
SKINNIES(f16, F16)
SKINNIES(bf16, BF16)
