// y = x W^T + bias for more rows of x (tokens) than matmul4_mma.cu takes, on tensor cores without Hopper's copy engine and warpgroups:
// compute capability 8.0 and later.
//
//   x     m x k of E                       codes  n x k / 2 bytes, the first code of a pair in the high nibble
//   y     m x n of E                       scales one a block; blocks of 2^log2_blocksize >= 64 elements lie within a row
//   k is a multiple of 64; x and codes start on 16 bytes
//
// A block takes 128 rows of W and COLUMNS tokens: four warps have 32 rows each and all of the tokens, so that a code is decoded once, and
// another four the same at other columns, 64 and 64 in turn. Fragments, their order and the table: matmul4_fragments.cuh. Codes come
// 256 columns at a time, tokens 128, copied asynchronously. How blocks share tiles and their pieces meet: runs.cuh.
#include "matmul4_direct.cuh"
#include "matmul4_instances.cuh"

constexpr int CLUSTER = 1;
#include "runs.cuh"

constexpr int ROWS = 128, THREADS = 256;
constexpr int CODES = ROWS * STAGE_BYTES, STEPS = STAGE / STEP;
constexpr int ROUND = 2 * STEP;  // columns

template <class E, class Scales, int COLUMNS, int TOKEN_SLOTS>
struct Broad {
    typedef typename E::storage storage;
    typedef PairTable<E, 128> Table;
    static constexpr int ROUNDS = STAGE / ROUND;                 // of a slot of codes
    static constexpr int NT = COLUMNS / 8, ALL_SUMS = 2 * NT * 4;  // eights of tokens, and sums, of a thread,
    static constexpr int OWN = NT / 2, SUMS = ALL_SUMS / 2;        // and what it has in the end
    static constexpr int TOGETHER = 2;                             // eights of tokens that are multiplied at a time
    static constexpr int ROW_COPIES = ROWS * 8 / THREADS, TOKEN_COPIES = COLUMNS * 16 / THREADS;
    static constexpr int STEP_TOKENS = COLUMNS * STEP * 2, TOKENS = 2 * STEP_TOKENS;
    static constexpr int NESTED_CODE = Table::BYTES, CODE_RING = NESTED_CODE + (Scales::NESTED ? 1024 : 0);
    static constexpr int TOKEN_RING = CODE_RING + 2 * CODES;
    static constexpr int BYTES = TOKEN_RING + TOKEN_SLOTS * TOKENS;
    // Results pass through the rings, so that neighbouring threads write neighbouring rows: eight elements more a token against
    // conflicts of banks.
    static constexpr int PITCH = ROWS + 8;
    static_assert(COLUMNS * PITCH * 2 <= BYTES - CODE_RING && SUMS * THREADS * 4 <= BYTES - CODE_RING, "room for results");
    // A slot of codes is asked for when the one before is begun, and read a round early.
    static_assert(TOKEN_SLOTS >= 2 && TOKEN_SLOTS <= ROUNDS, "codes are here when they are decoded");

    const Problem& p;
    const Scales scales;
    const unsigned base;
    const int half, warp_row;

    __device__ __forceinline__ Broad(const Problem& p, unsigned base, const float* nested)
        : p(p),
          scales(p, nested, 1.0f / product_factor<E>(p.quant_type)),
          base(base),
          half(threadIdx.x / WARP / 4),
          warp_row(threadIdx.x / WARP % 4 * 32) {}

    // The step that this warp has in a round.
    __device__ __forceinline__ int own_step(int round) const { return round * 2 + half; }

    // What a thread copies and loads of a tile, worked out once.
    struct Place {
        const u8* codes;        // of its first row: eight threads a row, sixteen bytes each
        const storage* tokens;  // of its first token: sixteen threads a token
        i64 scales;             // the number of the first block of its row
        unsigned rows, columns;  // which of its rows and tokens there are, a bit each
        bool scaled;
    };

    __device__ __forceinline__ Place place(i64 row0, i64 token0) const {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        const i64 row = row0 + threadIdx.x / 8, token = token0 + threadIdx.x / 16;
        Place place = {p.codes + row * (p.k / 2) + threadIdx.x % 8 * 16, (const storage*)p.x + token * p.k + threadIdx.x % 16 * 8};
#pragma unroll
        for (int i = 0; i < ROW_COPIES; i++) place.rows |= (row + i * (ROWS / ROW_COPIES) < p.n) << i;
#pragma unroll
        for (int i = 0; i < TOKEN_COPIES; i++) place.columns |= (token + i * (COLUMNS / TOKEN_COPIES) < p.m) << i;
        // Lane (g, t) loads the scale of row 2 g + t % 2 of fragment tile t / 2.
        const i64 scale_row = row0 + warp_row + t / 2 * TILE + 2 * g + t % 2;
        place.scales = scale_row * (p.k >> p.log2_blocksize), place.scaled = scale_row < p.n;
        return place;
    }

    // Asks for 256 columns of codes. What lies outside of W reads as 0.
    __device__ __forceinline__ void copy_codes(const Place& at, int slot) const {
        constexpr int STEP_ROWS = ROWS / ROW_COPIES;
        const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        const unsigned to = base + CODE_RING + slot % 2 * CODES + row * STAGE_BYTES + ((chunk ^ (row & 7)) << 4);
        const i64 offset = (i64)slot * STAGE_BYTES, pitch = p.k / 2;
        const unsigned which = offset + chunk * 16 < pitch ? at.rows : 0;
#pragma unroll
        for (int i = 0; i < ROW_COPIES; i++) {
            const bool inside = which >> i & 1;
            copy_async(to + i * STEP_ROWS * STAGE_BYTES, inside ? at.codes + (offset + i * STEP_ROWS * pitch) : p.codes, inside ? 16 : 0);
        }
    }

    // Asks for the tokens of a round. What lies outside of x reads as 0.
    __device__ __forceinline__ void copy_tokens(const Place& at, int round, int slot) const {
        constexpr int STEP_COLUMNS = COLUMNS / TOKEN_COPIES;
        const int token = threadIdx.x / 16, chunk = threadIdx.x % 16;
        const unsigned to =
            base + TOKEN_RING + slot * TOKENS + chunk / 8 * STEP_TOKENS + token * (STEP * 2) + ((chunk % 8 ^ (token & 7)) << 4);
        const i64 offset = (i64)round * ROUND;
        const unsigned which = offset + chunk * 8 < p.k ? at.columns : 0;
#pragma unroll
        for (int i = 0; i < TOKEN_COPIES; i++) {
            const bool inside = which >> i & 1;
            const void* from = inside ? at.tokens + (offset + i * STEP_COLUMNS * p.k) : p.x;
            copy_async(to + i * STEP_COLUMNS * (STEP * 2), from, inside ? 16 : 0);
        }
    }

    __device__ __forceinline__ typename Scales::Raw load_scale(const Place& at, int step) const {
        const i64 column = (i64)step * STEP;
        return at.scaled && column < p.k ? scales.load(at.scales + (column >> p.log2_blocksize)) : scales.none();
    }

    // A quarter of this lane's fragments of 32 rows and 64 columns, unscaled: row 2 g + h of a fragment tile.
    __device__ __forceinline__ void decode(int step, int tile, int h, unsigned (&a)[2][4][4]) const {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        const unsigned codes = base + CODE_RING + step / STEPS % 2 * CODES, lane_base = lane * 4;
        const int chunk = step % STEPS * 2 + t / 2, row = warp_row + tile * TILE + 2 * g + h;
        const uint2 packed = load_shared2(codes + row * STAGE_BYTES + ((chunk ^ (row & 7)) << 4) + t % 2 * 8);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const unsigned word = s < 2 ? packed.x : packed.y;
            a[tile][s][h] = s % 2 ? Table::template look_up<2>(word, lane_base, base) : Table::template look_up<0>(word, lane_base, base);
            a[tile][s][2 + h] = s % 2 ? Table::template look_up<3>(word, lane_base, base) : Table::template look_up<1>(word, lane_base, base);
        }
    }

    // sum += fragments * 64 columns of tokens, scaled. The tensor cores take longer for a few products than it takes to ask for them:
    // there is time to decode the fragments of step `following`, a quarter at a time.
    __device__ __forceinline__ void multiply(int slot, const unsigned (&a)[2][4][4], float own_scale, int following,
                                             unsigned (&next)[2][4][4], float (&sum)[ALL_SUMS]) const {
        constexpr int GROUPS = NT / TOGETHER;
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        float scale[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) scale[i / 2][i % 2] = __shfl_sync(FULL_WARP, own_scale, (lane & ~3) | i);
        const unsigned tokens = base + TOKEN_RING + slot * TOKENS + half * STEP_TOKENS + g * (STEP * 2);
        const unsigned first = tokens + ((2 * t ^ g) << 4), second = tokens + ((2 * t + 1 ^ g) << 4);
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            unsigned b[TOGETHER][8];
            float part[TOGETHER][2][4] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int at = (group * TOGETHER + i) * 8 * (STEP * 2);
                const uint4 u = load_shared4(first + at), v = load_shared4(second + at);
                b[i][0] = u.x, b[i][1] = u.y, b[i][2] = u.z, b[i][3] = u.w;
                b[i][4] = v.x, b[i][5] = v.y, b[i][6] = v.z, b[i][7] = v.w;
            }
#pragma unroll
            for (int s = 0; s < 4; s++)
#pragma unroll
                for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                    for (int tile = 0; tile < 2; tile++) E::mma(part[i][tile], a[tile][s], b[i][2 * s], b[i][2 * s + 1]);
#pragma unroll
            for (int i = 0; i < 4 / GROUPS; i++) {
                const int quarter = group * (4 / GROUPS) + i;
                decode(following, quarter / 2, quarter % 2, next);
            }
            __syncwarp();  // nothing of this moves past the products' sums
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                for (int tile = 0; tile < 2; tile++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float& to = sum[((group * TOGETHER + i) * 2 + tile) * 4 + j];
                        to = __fmaf_rn(part[i][tile][j], scale[tile][j / 2], to);
                    }
        }
    }

    // The rounds `first` ... `last` - 1 of a tile.
    __device__ __forceinline__ void run_rounds(i64 row0, i64 token0, int first, int last, float (&sum)[ALL_SUMS]) const {
        const Place at = place(row0, token0);
        auto ask = [&](int round, int slot) {
            if (round < last) copy_tokens(at, round, slot);
            commit_copies();
        };
        copy_codes(at, first / ROUNDS);
#pragma unroll
        for (int i = 0; i < TOKEN_SLOTS - 1; i++) ask(first + i, i);
        typename Scales::Raw raw = load_scale(at, own_step(first));
        unsigned a[2][2][4][4];
        int slot = 0;
        auto advance = [&](int round, const unsigned (&now)[2][4][4], unsigned (&next)[2][4][4]) {
            wait_for_copies<TOKEN_SLOTS - 2>();
            __syncthreads();  // everybody's copies have arrived, and everybody has read the round before
            if (round % ROUNDS == 0 && round + ROUNDS < last) copy_codes(at, round / ROUNDS + 1);
            ask(round + TOKEN_SLOTS - 1, slot == 0 ? TOKEN_SLOTS - 1 : slot - 1);
            const float own_scale = scales.value(raw);
            // After the last round some codes are decoded again, for nobody.
            const int following = own_step(round + 1 < last ? round + 1 : round);
            raw = load_scale(at, following);
            multiply(slot, now, own_scale, following, next, sum);
            slot = slot + 1 == TOKEN_SLOTS ? 0 : slot + 1;
        };
        wait_for_copies<TOKEN_SLOTS - 2>();
        __syncthreads();
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) decode(own_step(first), quarter / 2, quarter % 2, a[0]);
#pragma unroll 1
        for (int round = first; round < last; round += 2) {
            advance(round, a[0], a[1]);
            if (round + 1 < last) advance(round + 1, a[1], a[0]);
        }
        wait_for_copies<0>();
        __syncthreads();  // the rings are free
    }

    // Of the two warps with the same rows each takes half of the tokens, and the other's sums of them.
    __device__ __forceinline__ void share(const float (&all)[ALL_SUMS], float (&sum)[SUMS], unsigned char* shared) const {
        float* const staged = reinterpret_cast<float*>(shared + CODE_RING) + threadIdx.x % (THREADS / 2);
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            // (Selected, not indexed: registers have no addresses.)
            sum[i] = half ? all[ALL_SUMS - SUMS + i] : all[i];
            staged[(half * SUMS + i) * (THREADS / 2)] = half ? all[i] : all[ALL_SUMS - SUMS + i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] += staged[((half ^ 1) * SUMS + i) * (THREADS / 2)];
        __syncthreads();
    }

    // Adds the bias, rounds and writes.
    __device__ __forceinline__ void write(i64 row0, i64 token0, const float (&sum)[SUMS], unsigned char* shared) const {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        storage* const staged = reinterpret_cast<storage*>(shared + CODE_RING);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const int row = warp_row + tile * TILE + 2 * g;
            float bias[2] = {0.0f, 0.0f};
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (p.bias && row0 + row + h < p.n) bias[h] = E::widen(((const storage*)p.bias)[row0 + row + h]);
#pragma unroll
            for (int i = 0; i < OWN; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float* const s = &sum[(i * 2 + tile) * 4];
                    *reinterpret_cast<unsigned*>(staged + (half * (COLUMNS / 2) + i * 8 + 2 * t + j) * PITCH + row) =
                        E::pack2(s[j] + bias[0], s[2 + j] + bias[1]);
                }
        }
        __syncthreads();
        const int rows = (int)min((i64)ROWS, p.n - row0), tokens = (int)min((i64)COLUMNS, p.m - token0);
        storage* const y = (storage*)p.y + token0 * p.n + row0;
        const int row = threadIdx.x % ROWS;
        if (row < rows)
            for (int token = threadIdx.x / ROWS; token < tokens; token += THREADS / ROWS) y[token * p.n + row] = staged[token * PITCH + row];
        __syncthreads();  // the rings are free
    }

    static __device__ __forceinline__ void run(const Problem& p, const Split& split) {
        extern __shared__ __align__(16) unsigned char shared[];
        const unsigned base = shared_address(shared);
        float* const nested = reinterpret_cast<float*>(shared + NESTED_CODE);
        Table::fill(base, p.quant_type);
        if (Scales::NESTED) load_nested_code(nested, p.nested.code);
        const Broad block(p, base, nested);
        __syncthreads();
        const int rounds = (int)((p.k + ROUND - 1) / ROUND), token_tiles = (int)((p.m + COLUMNS - 1) / COLUMNS);
        const int tiles = (int)((p.n + ROWS - 1) / ROWS) * token_tiles;
        Schedule schedule(tiles, (rounds + ROUNDS - 1) / ROUNDS, split.rounds);
        Piece piece;
        while (schedule.next(piece)) {
            const i64 row0 = (i64)(piece.tile / token_tiles) * ROWS, token0 = (i64)(piece.tile % token_tiles) * COLUMNS;
            float all[ALL_SUMS] = {}, sum[SUMS];
            block.run_rounds(row0, token0, piece.first * ROUNDS, min(piece.last * ROUNDS, rounds), all);
            block.share(all, sum, shared);
            if (piece.last < schedule.slots) {
                leave_part<THREADS>(split, schedule.cluster, 0, sum);
                continue;
            }
            add_parts<THREADS>(split, schedule, piece, 0, sum);
            block.write(row0, token0, sum, shared);
        }
    }
};

#define BROAD(NAME, E, SCALES, ...)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Problem p, const Split split) { \
        typedef Broad<Product##E, SCALES, __VA_ARGS__> Instance;                                           \
        static_assert(Instance::BYTES <= 99 * 1024, "shared memory");                                     \
        Instance::run(p, split);                                                                           \
    }
BROAD_INSTANCES
