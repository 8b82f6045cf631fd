// The int8 product on tensor cores without Hopper's copy engine: compute capability 7.5 and later, any size and alignment. int8.cuh
// gives the formula; the sums alone are a result too (I32).
//
// Work: a block takes TM rows of A and TN rows of W at a time, 64 columns a stage, through a ring of STAGES in shared memory. Where
// rows start on 16 bytes they are copied asynchronously; elsewhere byte by byte. A warp has WM x WN of the tile. Rows of 64 bytes: the
// 16-byte pieces of two rows fill all banks, and every second row exchanges them by its number, so that reads of eight rows do too.
#include "int8.cuh"

constexpr int STEP = 64;  // columns, and bytes, of a stage
constexpr int STAGES = 3;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

template <class E>
struct IsSum {
    static constexpr bool VALUE = false;
};
template <>
struct IsSum<I32> {
    static constexpr bool VALUE = true;
};

template <class E, int TM, int TN, int WARPS_M>
struct Tile {
    typedef typename E::storage storage;
    static constexpr int WARPS_N = WARPS / WARPS_M, WM = TM / WARPS_M, WN = TN / WARPS_N;
    static_assert(WM % 16 == 0 && WN % 16 == 0, "whole fragments, two of W at a time");
    static constexpr int ROWS = TM + TN, STAGE = ROWS * STEP, BYTES = STAGES * STAGE;
    static constexpr int MI = WM / 16, NI = WN / 8;
    static_assert(4 * CHUNK * ROWS <= BYTES, "room for outlier columns");
    static_assert(BYTES <= 48 * 1024, "shared memory");

    static __device__ __forceinline__ unsigned place(int row, int piece) { return row * STEP + ((piece ^ (row >> 1 & 3)) << 4); }

    // Asks for columns from `column` on of the tile's rows; what lies outside reads as 0.
    static __device__ __forceinline__ void copy(const Operands& o, i64 row0, i64 col0, i64 column, unsigned stage, bool aligned) {
#pragma unroll
        for (int i = 0; i < (ROWS * 4 + THREADS - 1) / THREADS; i++) {
            const int at = i * THREADS + threadIdx.x, row = at / 4, piece = at % 4;
            if (row >= ROWS) break;
            const bool of_a = row < TM;
            const i64 index = of_a ? row0 + row : col0 + row - TM, rows = of_a ? o.m : o.n, first = column + piece * 16;
            const i8* const from = (of_a ? o.codes : o.weight) + index * o.k + first;
            const bool inside = index < rows && first < o.k;
            const unsigned to = stage + place(row, piece);
            if (aligned) {
                copy_async(to, inside ? from : o.weight, inside ? 16 : 0);
                continue;
            }
            unsigned v[4] = {};
            if (inside) {
#pragma unroll
                for (int b = 0; b < 16; b++)
                    if (first + b < o.k) v[b / 4] |= (unsigned)(u8)from[b] << (b % 4 * 8);
            }
            store_shared4(to, make_uint4(v[0], v[1], v[2], v[3]));
        }
        commit_copies();
    }

    static __device__ __forceinline__ void multiply(unsigned stage, int warp_m, int warp_n, int (&sum)[MI][NI][4]) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int s = 0; s < STEP / 32; s++) {
            unsigned a[MI][4];
#pragma unroll
            for (int i = 0; i < MI; i++) {
                const uint4 v = load_matrices(stage + place(warp_m * WM + i * 16 + lane % 16, s * 2 + lane / 16));
                a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
            }
#pragma unroll
            for (int j = 0; j < NI; j += 2) {
                // Matrices: eight rows of W, their two pieces, then the next eight.
                const int row = TM + warp_n * WN + j * 8 + lane / 16 * 8 + lane % 8;
                const uint4 b = load_matrices(stage + place(row, s * 2 + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < MI; i++) mma_s8(sum[i][j], a[i], b.x, b.y), mma_s8(sum[i][j + 1], a[i], b.z, b.w);
            }
        }
    }

    // Two neighbours of a row of the result.
    static __device__ __forceinline__ void write(const Operands& o, i64 row, i64 col, storage first, storage second, bool paired) {
        storage* const to = (storage*)o.out + row * o.n + col;
        if (paired && col + 1 < o.n) {
            struct alignas(2 * sizeof(storage)) Pair {
                storage a, b;
            };
            *reinterpret_cast<Pair*>(to) = Pair{first, second};
            return;
        }
        if (col < o.n) to[0] = first;
        if (col + 1 < o.n) to[1] = second;
    }

    // Scales, outlier columns, bias, rounding.
    static __device__ __forceinline__ void finish(const Operands& o, i64 row0, i64 col0, int warp_m, int warp_n, float* shared,
                                                  const int (&sum)[MI][NI][4]) {
        const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        float value[MI][NI][4];
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const i64 row = row0 + warp_m * WM + i * 16 + h * 8 + g;
                const float row_scale = row < o.m ? o.row_scale[row] : 0.0f;
#pragma unroll
                for (int j = 0; j < NI; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const i64 col = col0 + warp_n * WN + j * 8 + t * 2 + c;
                        value[i][j][h * 2 + c] = scaled_sum(sum[i][j][h * 2 + c], row_scale, col < o.n ? o.col_scale[col] : 0.0f);
                    }
            }
        if (o.mask) {
            OutlierWalk walk(o.mask, o.k);
            i64 own;
            int count;
            do {
                count = walk.next(own);
                __syncthreads();  // what was here has been read
                for (int c = 0; c < count; c++) {
                    const i64 column = __shfl_sync(FULL_WARP, own, c);
                    for (int r = threadIdx.x; r < ROWS; r += THREADS) {
                        const i64 index = r < TM ? row0 + r : col0 + r - TM;
                        float v = 0.0f;
                        if (r < TM && index < o.m) v = residual<E>(o, index, column, o.row_scale[index]);
                        if (r >= TM && index < o.n) v = outlier_weight(o.weight[index * o.k + column], o.col_scale[index]);
                        shared[c * ROWS + r] = v;
                    }
                }
                __syncthreads();
                for (int c = 0; c < count; c++) {
                    const float* const r = shared + c * ROWS + warp_m * WM + g;
                    const float* const w = shared + c * ROWS + TM + warp_n * WN + t * 2;
#pragma unroll
                    for (int j = 0; j < NI; j++)
#pragma unroll
                        for (int i = 0; i < MI; i++)
#pragma unroll
                            for (int q = 0; q < 4; q++)
                                value[i][j][q] = __fmaf_rn(r[i * 16 + q / 2 * 8], w[j * 8 + q % 2], value[i][j][q]);
                }
            } while (count == CHUNK);
        }
        const bool paired = o.n % 2 == 0 && is_aligned(o.out, 2 * sizeof(storage));
        const storage* const bias = (const storage*)o.bias;
#pragma unroll
        for (int j = 0; j < NI; j++) {
            const i64 col = col0 + warp_n * WN + j * 8 + t * 2;
            float shift[2] = {};
            if (bias) {
#pragma unroll
                for (int c = 0; c < 2; c++) shift[c] = col + c < o.n ? E::widen(bias[col + c]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const i64 row = row0 + warp_m * WM + i * 16 + h * 8 + g;
                    if (row < o.m)
                        write(o, row, col, E::narrow(value[i][j][h * 2] + shift[0]), E::narrow(value[i][j][h * 2 + 1] + shift[1]), paired);
                }
        }
    }

    static __device__ __forceinline__ void run(const Operands& o) {
        extern __shared__ __align__(16) unsigned char shared[];
        const unsigned ring = shared_address(shared);
        const int warp = threadIdx.x / WARP, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
        const bool aligned = o.k % 16 == 0 && is_aligned(o.codes, 16) && is_aligned(o.weight, 16);
        const i64 rows = (o.m + TM - 1) / TM, tiles = rows * ((o.n + TN - 1) / TN), steps = (o.k + STEP - 1) / STEP;
        wait_for_previous_kernel();
        let_next_kernel_start();
        clear_ready(o);
        // Neighbouring blocks share rows of W.
        for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const i64 row0 = tile % rows * TM, col0 = tile / rows * TN;
            int sum[MI][NI][4] = {};
            __syncthreads();  // the tile before has been read
#pragma unroll
            for (int s = 0; s < STAGES - 1; s++) {
                if (s < steps)
                    copy(o, row0, col0, (i64)s * STEP, ring + s * STAGE, aligned);
                else
                    commit_copies();
            }
            int slot = 0, next = STAGES - 1;
            for (i64 step = 0; step < steps; step++) {
                wait_for_copies<STAGES - 2>();
                __syncthreads();  // the others' copies have arrived too, and everybody is done with the slot before
                if (step + STAGES - 1 < steps)
                    copy(o, row0, col0, (step + STAGES - 1) * STEP, ring + next * STAGE, aligned);
                else
                    commit_copies();
                multiply(ring + slot * STAGE, warp_m, warp_n, sum);
                slot = slot + 1 == STAGES ? 0 : slot + 1;
                next = next + 1 == STAGES ? 0 : next + 1;
            }
            wait_for_copies<0>();
            if constexpr (IsSum<E>::VALUE) {
                const int lane = threadIdx.x % WARP;
                const bool paired = o.n % 2 == 0 && is_aligned(o.out, 8);
#pragma unroll
                for (int i = 0; i < MI; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const i64 row = row0 + warp_m * WM + i * 16 + h * 8 + lane / 4;
#pragma unroll
                        for (int j = 0; j < NI; j++)
                            if (row < o.m)
                                write(o, row, col0 + warp_n * WN + j * 8 + lane % 4 * 2, sum[i][j][h * 2], sum[i][j][h * 2 + 1], paired);
                    }
            } else {
                finish(o, row0, col0, warp_m, warp_n, reinterpret_cast<float*>(shared), sum);
            }
        }
    }
};

#define MMA(DTYPE, E)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) int8_mma_128_##DTYPE(const __grid_constant__ Operands o) {  \
        Tile<E, 128, 128, 2>::run(o);                                                                                    \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) int8_mma_16_##DTYPE(const __grid_constant__ Operands o) {   \
        Tile<E, 16, 128, 1>::run(o);                                                                                     \
    }
MMA(f32, F32)
MMA(f16, F16)
MMA(bf16, BF16)
MMA(i32, I32)
