// Rows of int8 codes, and an int8 weight back again.
//
//   row_scale[i] = max |x[i][j]| over the elements that are no outliers, 0 for none; a NaN makes it NaN
//   codes[i][j] = rint(x[i][j] * (127 / row_scale[i])), the quotient rounded first, ties to even; 0 for outliers, and in rows whose scale is 0 or NaN
//
//   x      m x k of E             an outlier has |x| >= threshold > 0; threshold 0: there are none
//   codes  m x k int8             mask: a bit for each column, which is set where the column has an outlier; or null. Few rows: one each
//
// Work: a block a row; rows of up to 1024 elements (float32: 512) a warp. A row stays in registers up to 16384 elements (8192); longer
// ones are read again. Vectors of 16 bytes whose largest element is below the threshold, nearly all, need no look at their
// elements. The mask is read before it is written: of all rows with an outlier in a column a few write, and none waits for it.
// Bytes an element: its own, and one. Instructions for eight: about 40, a fourth of what there is time for.
#include "int8_code.cuh"

constexpr int THREADS = 256;

// Where outliers are marked.
struct Marks {
    unsigned* mask;
    // Where the mask is not zero at first, the launch's first block clears it and then writes `token` to the flags here; the
    // product that reads the mask writes 0. Null where the caller has cleared it.
    unsigned long long* ready;
    unsigned long long token;

    __device__ __forceinline__ void clear(i64 k) const {
        if (!ready || blockIdx.x != 0) return;
        for (i64 i = threadIdx.x; i < (k + 31) / 32; i += THREADS) mask[i] = 0;
        __syncthreads();
        if (threadIdx.x < FLAGS) store_release(ready + threadIdx.x * FLAG_STRIDE, token);
    }

    // Waits until the mask has been cleared, for those that have something to mark: it empties the multiprocessor's L1 cache. The
    // first block never waits for another.
    __device__ __forceinline__ void wait() const {
        if (!ready) return;
        while (load_acquire(ready + blockIdx.x % FLAGS * FLAG_STRIDE) != token) {}
    }

    // Sets `bits`, from a column on, within a word, unless it has them.
    __device__ __forceinline__ void set(i64 column, unsigned bits) const {
        if (!mask) return;
        unsigned* const word = mask + column / 32;
        bits <<= column % 32;
        if ((load_l2(word) & bits) != bits) atomicOr(word, bits);
    }
};

// The largest of a block's values, in every thread. `shared` is not written again before all have read it.
__device__ __forceinline__ unsigned block_max(unsigned m, unsigned* shared) {
    m = warp_max(m);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = m;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < THREADS / WARP ? shared[threadIdx.x % WARP] : 0);
}

struct Rows {
    const void* x;
    i8* codes;
    float* row_scale;
    Marks marks;
    i64 m, k;
    float threshold;
    // Few rows: each has a mask of its own, which needs not be cleared, and the next kernel reads W as soon as it starts.
    int few;

    __device__ __forceinline__ unsigned* own_mask(i64 row) const { return marks.mask + row * ((k + 31) / 32); }
};

// A row of at most LANES * VECTORS vectors, by LANES threads: a warp or the block.
template <class E, int LANES, int VECTORS>
__device__ __forceinline__ void quantize_row(const Rows& p, i64 row, unsigned* shared) {
    constexpr int N = E::PER_VECTOR;
    const int lane = threadIdx.x % LANES, count = (int)(p.k / N);
    const Threshold threshold(p.threshold);
    const uint4* const from = reinterpret_cast<const uint4*>((const typename E::storage*)p.x + row * p.k);
    i8* const to = p.codes + row * p.k;
    uint4 v[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * LANES + lane;
        v[i] = at < count ? p.few ? from[at] : load_once(from + at) : make_uint4(0, 0, 0, 0);
    }
    unsigned largest = 0, found[VECTORS / 4] = {};  // outliers, a byte a vector
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * LANES + lane;
        unsigned outliers = 0;
        if (at < count) largest = max(largest, take_outliers<E>(v[i], threshold, outliers));
        found[i / 4] |= outliers << (i % 4 * 8);
    }
    largest = LANES == WARP ? warp_max(largest) : block_max(largest, shared);
    const RowCode code(largest);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = i * LANES + lane;
        if (at < count) write_codes<E>(to + (i64)at * N, v[i], code);
    }
    if (lane == 0) p.row_scale[row] = __uint_as_float(largest);
    if (p.few) {
        unsigned char* const mask = reinterpret_cast<unsigned char*>(p.own_mask(row));
#pragma unroll
        for (int i = 0; p.marks.mask && i < VECTORS; i++) {
            const int at = i * LANES + lane;
            unsigned bits = found[i / 4] >> (i % 4 * 8) & 0xff;
            if (N == 4) bits |= __shfl_down_sync(FULL_WARP, bits, 1) << 4;
            if (at < count && (N == 8 || at % 2 == 0)) mask[at * N / 8] = (unsigned char)bits;
        }
        return;
    }
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < VECTORS / 4; i++) any |= found[i];
    if (!any) return;
    p.marks.wait();
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const unsigned outliers = found[i / 4] >> (i % 4 * 8) & 0xff;
        if (outliers) p.marks.set((i64)(i * LANES + lane) * N, outliers);
    }
}

// A row of any length whose vectors are aligned, read twice.
template <class E>
__device__ __forceinline__ void quantize_long_row(const Rows& p, i64 row, unsigned* shared) {
    constexpr int N = E::PER_VECTOR, UNROLL = 4;
    const i64 count = p.k / N;
    const Threshold threshold(p.threshold);
    const uint4* const from = reinterpret_cast<const uint4*>((const typename E::storage*)p.x + row * p.k);
    i8* const to = p.codes + row * p.k;
    unsigned largest = 0;
    for (i64 first = threadIdx.x; first < count; first += THREADS * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) v[i] = first + i * THREADS < count ? from[first + i * THREADS] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            unsigned outliers = 0;
            largest = max(largest, take_outliers<E>(v[i], threshold, outliers));
            const i64 column = (first + i * THREADS) * N;
            if (outliers) p.marks.wait(), p.marks.set(column, outliers);
        }
    }
    largest = block_max(largest, shared);
    const RowCode code(largest);
    for (i64 at = threadIdx.x; at < count; at += THREADS) {
        uint4 v = load_once(from + at);
        unsigned outliers = 0;
        take_outliers<E>(v, threshold, outliers);
        write_codes<E>(to + at * N, v, code);
    }
    if (threadIdx.x == 0) p.row_scale[row] = __uint_as_float(largest);
}

// A row of any length and alignment, element by element.
template <class E>
__device__ __forceinline__ void quantize_odd_row(const Rows& p, i64 row, unsigned* shared) {
    const Threshold threshold(p.threshold);
    const typename E::storage* const from = (const typename E::storage*)p.x + row * p.k;
    i8* const to = p.codes + row * p.k;
    Marks marks = p.marks;
    if (p.few && marks.mask) {
        marks.mask = p.own_mask(row);
        for (i64 i = threadIdx.x; i < (p.k + 31) / 32; i += THREADS) marks.mask[i] = 0;
        __syncthreads();
    }
    unsigned largest = 0;
    for (i64 at = threadIdx.x; at < p.k; at += THREADS) {
        const unsigned bits = magnitude(E::widen(from[at]));
        if (threshold.is_outlier(bits))
            marks.wait(), marks.set(at, 1);
        else
            largest = max(largest, bits);
    }
    largest = block_max(largest, shared);
    const RowCode code(largest);
    for (i64 at = threadIdx.x; at < p.k; at += THREADS) {
        const float x = E::widen(from[at]);
        to[at] = threshold.is_outlier(magnitude(x)) ? 0 : (i8)code.any(x);
    }
    if (threadIdx.x == 0) p.row_scale[row] = __uint_as_float(largest);
}

template <class E>
__device__ __forceinline__ void quantize_rows(const Rows& p) {
    constexpr int N = E::PER_VECTOR;
    __shared__ unsigned shared[2][THREADS / WARP];
    // The product may set itself up, and bring W near, while rows are quantized; it waits for them. Where it reads W, W's writers
    // must have ended before it starts.
    if (!p.few) let_next_kernel_start();
    wait_for_previous_kernel();
    if (p.few) let_next_kernel_start();
    p.marks.clear(p.k);
    const i64 vectors = p.k / N;
    const bool aligned = p.k % N == 0 && is_aligned(p.x, 16) && is_aligned(p.codes, N);
    if (aligned && vectors <= 4 * WARP) {
        constexpr int WARPS = THREADS / WARP;
        for (i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / WARP; row < p.m; row += (i64)gridDim.x * WARPS)
            quantize_row<E, WARP, 4>(p, row, nullptr);
        return;
    }
    int turn = 0;
    for (i64 row = blockIdx.x; row < p.m; row += gridDim.x, turn ^= 1) {
        if (!aligned)
            quantize_odd_row<E>(p, row, shared[turn]);
        else if (vectors <= 4 * THREADS)
            quantize_row<E, THREADS, 4>(p, row, shared[turn]);
        else if (vectors <= 8 * THREADS)
            quantize_row<E, THREADS, 8>(p, row, shared[turn]);
        else
            quantize_long_row<E>(p, row, shared[turn]);
    }
}

// out[r][c] = W[first_row + r][first_column + c] * (col_scale[first_row + r] / 127), rounded once.
template <class E>
__device__ __forceinline__ void dequantize(const i8* weight, i64 k, const float* col_scale, i64 first_row, i64 rows, i64 first_column,
                                           i64 columns, typename E::storage* out) {
    constexpr int N = E::PER_VECTOR;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const i8* const corner = weight + first_row * k + first_column;
    const bool aligned = (k | columns) % N == 0 && is_aligned(corner, N) && is_aligned(out, 16);
    const i64 width = aligned ? columns / N : columns;
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i8* const from = corner + row * k;
        typename E::storage* const to = out + row * columns;
        const float scale = __fmul_rn(col_scale[first_row + row], INVERSE_127);
        if (!aligned) {
            for (i64 c = threadIdx.x; c < width; c += THREADS) to[c] = E::narrow(__fmul_rn((float)from[c], scale));
            continue;
        }
        constexpr int UNROLL = 4;
        for (i64 first = threadIdx.x; first < width; first += THREADS * UNROLL) {
            unsigned v[UNROLL][N / 4];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const i64 c = first + u * THREADS;
                if (c >= width) break;
#pragma unroll
                for (int i = 0; i < N / 4; i++) v[u][i] = reinterpret_cast<const unsigned*>(from + c * N)[i];
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const i64 c = first + u * THREADS;
                if (c >= width) break;
                float f[N];
#pragma unroll
                for (int i = 0; i < N; i++) f[i] = __fmul_rn((float)(i8)(v[u][i / 4] >> (8 * (i % 4))), scale);
                *reinterpret_cast<uint4*>(to + c * N) = E::pack(f);
            }
        }
    }
}

#define ROWS(DTYPE, E)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) int8_quantize_rows_##DTYPE(const Rows p) { quantize_rows<E>(p); }    \
    extern "C" __global__ void __launch_bounds__(THREADS) int8_dequantize_panel_##DTYPE(                                 \
        const i8* weight, i64 k, const float* col_scale, i64 first_row, i64 rows, i64 first_column, i64 columns,         \
        E::storage* out) {                                                                                               \
        dequantize<E>(weight, k, col_scale, first_row, rows, first_column, columns, out);                                \
    }

ROWS(f32, F32)
ROWS(f16, F16)
ROWS(bf16, BF16)
