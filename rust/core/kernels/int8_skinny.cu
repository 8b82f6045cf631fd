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
// way; COPIED, the codes are given and come with W through the ring.
//
// Order: of 64 columns lane t of a group takes bytes 16 t ... 16 t + 15, in both operands: two products. Fragment row i is row
// (i % 2) * 4 + i / 2 of eight, so that the two rows that lanes read together differ in what the swizzle exchanges: no bank conflict.
//
// Shared memory, wavefronts for 16 rows of 64 columns: 8 to read W and 4 for eight tokens; the copy engine writes 8 (and 4).
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
};

template <class E, bool OWN, int NT, int RT, int DEPTH>
struct Skinny {
    typedef typename E::storage storage;
    static constexpr int TOKENS = 8 * NT, ROWS = 16 * RT, BOXES = 2 / RT, STAGE = BOX * BOXES;
    static constexpr int WEIGHT = ROWS * STAGE, SLOT = WEIGHT + (OWN ? 0 : TOKENS * STAGE);
    static constexpr int ELEMENTS = (ROWS * TOKENS + THREADS - 1) / THREADS;  // results of a thread
    static constexpr int PITCH = ROWS + 8;  // of sums: the fragments' lanes meet all banks

    static constexpr int WORDS = STAGE / 32;  // of the mask, of a stage
    typedef ::Gather<E, NT, RT, WORDS> Gather;

    // What is kept of one tile until its end; two of them in turn.
    struct Tile {
        int sum[TOKENS * PITCH];
        float gathered[TOKENS * PITCH];
        unsigned weight[LIST][ROWS];  // the four bytes around an outlier column of W
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
    // From the bottom, after what the system takes: barriers, tiles, what is known, rings; own tokens, their mask.
    static constexpr int TILES = 512, KNOWN = TILES + 2 * sizeof(Tile), RING = (KNOWN + sizeof(Known) + 1023) / 1024 * 1024;
    static constexpr int OWN_AT = RING + WARPS * DEPTH * SLOT, BYTES = OWN_AT + (OWN ? OWN_BYTES + OWN_BYTES / 8 : 0);

    static __device__ __forceinline__ int padded(const Operands& o) { return ((int)o.k + STAGE - 1) / STAGE * STAGE; }

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
            if (!OWN) copy_box(slot + WEIGHT + b * TOKENS * BOX, &p.codes, at.stage * STAGE + b * BOX, 0, barrier);
        }
    }

    // Rows of own tokens that are kept: a power of two of at least m. Fragments take each more than once.
    static __device__ __forceinline__ int kept(const Operands& o) { return o.m > 4 ? 8 : o.m > 2 ? 4 : (int)o.m; }

    // Where 16 own codes from a column on lie.
    static __device__ __forceinline__ int own_place(int token, int column, int rows) {
        return (column / BOX * rows + token) * BOX + (((column / 16 % 8) ^ token) << 4);
    }

    // What a warp quantizes of x: a row, or a share of one. Vectors are whole: k is a multiple of 16.
    struct Share {
        const uint4* from;
        int rows, token, first, step, vectors, padded;  // lanes take vectors first, first + step ...; past the last they are 0

        __device__ __forceinline__ explicit Share(const Operands& o) : rows(kept(o)) {
            const int warp = threadIdx.x / WARP;
            token = warp & (rows - 1), first = warp / rows * WARP + threadIdx.x % WARP, step = WARPS / rows * WARP;
            from = reinterpret_cast<const uint4*>((const storage*)o.x + token * o.k);
            vectors = token < o.m ? (int)o.k / E::PER_VECTOR : 0, padded = token < o.m ? Skinny::padded(o) / E::PER_VECTOR : 0;
        }

        template <int COUNT>
        __device__ __forceinline__ void load(uint4 (&v)[COUNT], int turn) const {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int at = first + (turn * COUNT + i) * step;
                v[i] = at < vectors ? from[at] : make_uint4(0, 0, 0, 0);
            }
        }
    };

    // Quantizes the rows of x, COUNT vectors of a lane at a time; where these are all it has, they are read once.
    template <int COUNT>
    static __device__ __forceinline__ void quantize(const Problem& p, const Share& share, unsigned char* tokens, Known& known, unsigned* mask) {
        constexpr int N = E::PER_VECTOR;
        const Threshold threshold(p.threshold);
        const int turns = (share.padded - share.first + COUNT * share.step - 1) / (COUNT * share.step);
        unsigned largest = 0;
        uint4 v[COUNT];
        for (int turn = 0; turn < turns; turn++) {
            share.load(v, turn);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                unsigned outliers = 0;
                largest = max(largest, take_outliers<E>(v[i], threshold, outliers));
                const int at = share.first + (turn * COUNT + i) * share.step;
                if (outliers) atomicOr(mask + at * N / 32, outliers << at * N % 32);
            }
        }
        largest = warp_max(largest);
        if (threadIdx.x % WARP == 0) atomicMax(&known.absmax[share.token], largest);
        __syncthreads();
        const RowCode code(known.absmax[share.token]);
        for (int turn = 0; turn < turns; turn++) {
            if (turns > 1) share.load(v, turn);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int at = share.first + (turn * COUNT + i) * share.step;
                if (at >= share.padded) break;
                unsigned outliers = 0;
                if (turns > 1) take_outliers<E>(v[i], threshold, outliers);
                write_codes<E>(reinterpret_cast<i8*>(tokens + own_place(share.token, at * N, share.rows) + at * N % 16), v[i], code);
            }
        }
    }

    static __device__ __forceinline__ float own_residual(const Operands& o, const unsigned char* tokens, const Known& known, int token,
                                                         int column) {
        const float scale = __uint_as_float(known.absmax[token]);
        if (!OWN) return residual<E>(o, token, column, scale);
        const i8 code = (i8)tokens[own_place(token, column & ~15, kept(o)) + column % 16];
        const float x = E::widen(((const storage*)o.x)[token * o.k + column]);
        return __fsub_rn(x, __fmul_rn((float)code, __fmul_rn(scale, INVERSE_127)));
    }

    // The outlier columns and what the codes leave over of them, unless they are many. A thread takes a word of the mask at a time.
    static __device__ __forceinline__ void list_outliers(const Operands& o, const unsigned* mask, const unsigned char* tokens, Known& known) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, words = mask ? ((int)o.k + 31) / 32 : 0;
        int total = 0, turn = 0;
        for (int first = 0; first < words && total <= LIST; first += THREADS, turn ^= 1) {
            const int word = first + threadIdx.x;
            unsigned bits = word < words ? mask[word] : 0;
            int before = __popc(bits);  // up to this thread, within its warp
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const int other = __shfl_up_sync(FULL_WARP, before, d);
                if (lane >= d) before += other;
            }
            if (lane == WARP - 1) known.counts[turn][warp] = before;
            before += total - __popc(bits);
            __syncthreads();
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const int count = known.counts[turn][w];
                total += count;
                if (w < warp) before += count;
            }
            for (; bits && before < LIST; bits &= bits - 1) known.columns[before++] = word * 32 + __ffs(bits) - 1;
        }
        if (threadIdx.x == 0) known.many = total > LIST, known.count = total > LIST ? 0 : total;
        __syncthreads();
        for (int i = threadIdx.x; i < known.count * TOKENS; i += THREADS) {
            const int token = i % TOKENS;
            if (token < o.m) known.residual[i / TOKENS][token] = own_residual(o, tokens, known, token, known.columns[i / TOKENS]);
        }
        __syncthreads();
    }

    // Asks for what a tile has in the listed columns, long before its end.
    static __device__ __forceinline__ void ask_outliers(const Operands& o, const Known& known, Tile& tile, int row0) {
        for (int i = threadIdx.x; i < known.count * ROWS; i += THREADS) {
            const int column = known.columns[i / ROWS], row = row0 + i % ROWS;
            if (row < o.n) copy_async4(shared_address(&tile.weight[i / ROWS][i % ROWS]), o.weight + (row * o.k + (column & ~3)));
        }
        commit_copies();
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
                    const int token = OWN ? g & (rows - 1) : g;
                    const unsigned at = OWN ? own_tokens + b * rows * BOX : slot + WEIGHT + b * TOKENS * BOX + j * 8 * BOX;
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
    static __device__ __forceinline__ void add_gathered(Tile& tile, const Gather& gather) {
        for (int turn = 0; turn < WARPS; turn++) {
            if (turn == threadIdx.x / WARP) {
#pragma unroll
                for (int r = 0; r < RT; r++)
#pragma unroll
                    for (int j = 0; j < NT; j++)
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            float& at = tile.gathered[place(r, j, q)];
                            at = turn == 0 ? gather.sum[r][j][q] : at + gather.sum[r][j][q];
                        }
            }
            __syncthreads();
        }
    }

    // Adds the warps' sums of a tile, finishes them and writes them out.
    static __device__ __forceinline__ void finish(const Problem& p, Tile& tile, const Known& known, const Gather& gather, int row0,
                                                  const RowParts& parts, const int (&sum)[CHAINS][RT][NT][4]) {
        const Operands& o = p.o;
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    atomicAdd(&tile.sum[place(r, j, q)], CHAINS == 1 ? sum[0][r][j][q] : sum[0][r][j][q] + sum[1][r][j][q]);
        wait_for_copies<0>();
        if (known.many)
            add_gathered(tile, gather);
        else
            __syncthreads();
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            const int e = i * THREADS + threadIdx.x, token = e / ROWS, row = row0 + e % ROWS;
            if (token >= o.m) break;
            int& total = tile.sum[token * PITCH + e % ROWS];
            float value = scaled_sum(total, __uint_as_float(known.absmax[token]), parts.col_scale);
            total = 0;  // for the tile after the next
            if (row >= o.n) continue;
#pragma unroll 4
            for (int c = 0; c < known.count; c++) {
                const i8 code = (i8)(tile.weight[c][e % ROWS] >> known.columns[c] % 4 * 8);
                value = __fmaf_rn(known.residual[c][token], outlier_weight(code, parts.col_scale), value);
            }
            if (known.many) value = __fmaf_rn(tile.gathered[token * PITCH + e % ROWS], __fmul_rn(parts.col_scale, INVERSE_127), value);
            ((storage*)o.out)[(i64)token * o.n + row] = E::narrow(o.bias ? value + parts.bias : value);
        }
    }

    static __device__ __forceinline__ void run(const Problem& p) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const Operands& o = p.o;
        const unsigned base = shared_address(shared);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const unsigned barriers = base + warp * DEPTH * 8, ring = base + RING + warp * DEPTH * SLOT, own_tokens = base + OWN_AT;
        Tile* const kept_tiles = reinterpret_cast<Tile*>(shared + TILES);
        Known& known = *reinterpret_cast<Known*>(shared + KNOWN);
        unsigned char* const tokens = shared + OWN_AT;
        unsigned* const own_mask = reinterpret_cast<unsigned*>(tokens + kept(o) * padded(o));
        const unsigned* const mask = OWN ? (p.threshold > 0.0f ? own_mask : nullptr) : o.mask;

        const int stages = padded(o) / STAGE, per = (stages + WARPS - 1) / WARPS, rows = kept(o);
        const int tiles = ((int)o.n + ROWS - 1) / ROWS, first = blockIdx.x;
        const int own = first < tiles ? (tiles - first + gridDim.x - 1) / gridDim.x : 0;
        Place asked{first * ROWS, warp};
        int left = own * per;
        let_next_kernel_start();
        if (lane == 0) {
            for (int d = 0; d < DEPTH; d++) init_mbarrier(barriers + d * 8, 1);
            publish_mbarriers();
            prefetch_map(&p.weight);
            if (!OWN) prefetch_map(&p.codes);
            // Reading W must wait, bringing it near need not: a later write is seen in the L2 cache all the same. It pays where the rows
            // are being quantized meanwhile.
            Place near = asked;
            for (int d = 0; !OWN && d < min(DEPTH, left); d++) {
#pragma unroll
                for (int b = 0; b < BOXES; b++) prefetch_box(&p.weight, near.stage * STAGE + b * BOX, near.row0);
                near.next(warp, per);
            }
        }
        for (int i = threadIdx.x; i < TOKENS * PITCH; i += THREADS) kept_tiles[0].sum[i] = kept_tiles[1].sum[i] = 0;
        if (OWN) {
            if (threadIdx.x < TOKENS) known.absmax[threadIdx.x] = 0;
            for (int i = threadIdx.x; i < ((int)o.k + 31) / 32; i += THREADS) own_mask[i] = 0;
            __syncthreads();
        }
        __syncwarp();
        wait_for_previous_kernel();
        auto ask_next = [&](int slot) {
            // Past the last column everything reads as 0, and need not be asked for; the ring goes on all the same.
            if (left > 0) ask(p, asked, ring + slot * SLOT, barriers + slot * 8);
            asked.next(warp, per);
            left--;
        };
        if (lane == 0)
            for (int d = 0; d < DEPTH; d++) ask_next(d);
        __syncwarp();
        clear_ready(o);
        if (OWN) {
            const Share share(o);
            if (padded(o) / E::PER_VECTOR <= 4 * share.step)
                quantize<4>(p, share, tokens, known, own_mask);
            else
                quantize<16>(p, share, tokens, known, own_mask);
        } else if (threadIdx.x < TOKENS) {
            known.absmax[threadIdx.x] = threadIdx.x < o.m ? __float_as_uint(o.row_scale[threadIdx.x]) : 0;
        }
        __syncthreads();
        list_outliers(o, mask, tokens, known);

        const ColumnKinds kinds{mask, (int)o.k};
        // The lanes' words of stage i of the warp; asked for a stage ahead.
        auto words = [&](int i) { return known.many && lane < WORDS ? kinds.outliers((i % per * WARPS + warp) * WORDS + lane) : 0; };

        int slot = 0, phase = 0;
        unsigned next_words = words(0);
        for (int tile = 0; tile < own; tile++) {
            const int row0 = (first + tile * gridDim.x) * ROWS;
            ask_outliers(o, known, kept_tiles[tile & 1], row0);
            const RowParts parts(o, row0 + threadIdx.x % ROWS);
            int sum[CHAINS][RT][NT][4] = {};
            Gather gather;
            for (int i = 0; i < per; i++) {
                const int stage = i * WARPS + warp;
                const unsigned at = ring + slot * SLOT;
                // A stage past the last has no own tokens; what is read for it is multiplied by zeros.
                const unsigned codes = own_tokens + min(stage, stages - 1) * BOXES * rows * BOX;
                const unsigned outliers = next_words;
                next_words = words(i + 1);
                if (known.many && gather.start(outliers)) {
                    gather.ask(o, stage * STAGE);
                    wait_mbarrier(barriers + slot * 8, phase);
                    multiply<true>(at, codes, rows, outliers, sum);
                    gather.add(o, stage * STAGE, [&](int row, int column) {
                        const int piece = column / 16 % 8;
                        return load_shared_u8(at + (column / BOX * ROWS + row) * BOX + ((piece ^ (row & 7)) << 4) + column % 16);
                    });
                } else {
                    wait_mbarrier(barriers + slot * 8, phase);
                    multiply<false>(at, codes, rows, 0, sum);
                }
                __syncwarp();  // everybody has read the slot
                if (lane == 0) ask_next(slot);
                if (++slot == DEPTH) slot = 0, phase ^= 1;
            }
            finish(p, kept_tiles[tile & 1], known, gather, row0, parts, sum);
        }
    }
};

#define SKINNY(NAME, ...)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Problem p) {                   \
        typedef Skinny<__VA_ARGS__> Instance;                                                                            \
        static_assert(Instance::BYTES <= 227 * 1024, "shared memory");                                                   \
        Instance::run(p);                                                                                                \
    }
#define SKINNIES(DTYPE, E)                                                                                               \
    SKINNY(int8_skinny_own_##DTYPE, E, true, 1, 1, 4)                                                                       \
    SKINNY(int8_skinny_8_##DTYPE, E, false, 1, 1, 4)                                                                        \
    SKINNY(int8_skinny_16_##DTYPE, E, false, 2, 2, 4)                                                                    \
    SKINNY(int8_skinny_32_##DTYPE, E, false, 4, 2, 3)
SKINNIES(f32, F32)
SKINNIES(f16, F16)
SKINNIES(bf16, BF16)
