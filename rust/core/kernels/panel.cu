// Parts of a 4-bit weight of n rows and k columns, with the values that dequantize.cu gives the whole:
//   out[r][c] = code[codes[i]] * absmax[i / blocksize],  i = row(r) * k + first_column + c,  r < rows, c < columns
//   row(r) = first_row + r, or indices[r] where there are indices; an index that names no row gives a row of NaN
//
//   codes   (n * k + 1) / 2 bytes of two codes, the first in the high nibble
//   absmax  as in dequantize.cu; blocks are cut from the flattened weight, so they may run across rows
//   out     rows * columns elements of E
//
// Work: as in dequantize.cu, a lane turns 8 codes (float32: 4) into one 16-byte store, UNROLL of them in flight. Where a lane's
// vectors lie is found by one division; those after it are one step of THREADS vectors on. A vector never leaves its block where
// k, first_column and columns are multiples of its length; elsewhere elements are written one by one.
#include "decode.cuh"

constexpr int THREADS = 256;
constexpr int UNROLL = 4;

// Which row of the weight a row of the result is.
struct RowOf {
    const void* indices;
    bool wide;  // int64, not int32
    i64 first, n;

    // -1 for none.
    __device__ __forceinline__ i64 operator()(i64 r) const {
        if (!indices) return first + r;
        const i64 row = wide ? static_cast<const i64*>(indices)[r] : static_cast<const int*>(indices)[r];
        return row >= 0 && row < n ? row : -1;
    }
};

// 64-bit division takes four times as long.
__device__ __forceinline__ i64 divide(i64 a, i64 b) {
    return (a | b) >> 32 ? a / b : (i64)((unsigned)a / (unsigned)b);
}

template <class E, class Absmax>
__device__ __forceinline__ void write_vectors(const u8* codes, const Decode4& decode, const Absmax& absmax,
                                              const RowOf& row_of, i64 k, i64 first_column, i64 rows, i64 columns,
                                              typename E::storage* out, int log2_blocksize) {
    constexpr int N = E::PER_VECTOR;
    const i64 width = columns / N, total = rows * width;
    const i64 row_step = width > THREADS ? 0 : THREADS / (int)width, column_step = THREADS - row_step * width;
    for (i64 tile = blockIdx.x; tile * (THREADS * UNROLL) < total; tile += gridDim.x) {
        const i64 first = tile * (THREADS * UNROLL) + threadIdx.x;
        i64 r = divide(first, width), c = first - r * width;
        uint2 packed[UNROLL];
        float scale[UNROLL];
        // All loads before the first use.
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const i64 row = first + u * THREADS < total ? row_of(r) : -1;
            packed[u] = make_uint2(0, 0);
            scale[u] = __uint_as_float(0x7fffffffu);
            if (row >= 0) {
                const i64 i = row * k + first_column + c * N;
                packed[u] = Decode4::load<N>(codes, i);
                scale[u] = absmax(i >> log2_blocksize);
            }
            r += row_step, c += column_step;
            if (c >= width) r++, c -= width;
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (first + u * THREADS >= total) break;
            float f[N];
#pragma unroll
            for (int i = 0; i < N; i++) f[i] = __fmul_rn(decode.value(packed[u], i), scale[u]);
            *reinterpret_cast<uint4*>(out + (first + u * THREADS) * N) = E::pack(f);
        }
    }
}

template <class E, class Absmax>
__device__ __forceinline__ void write_panel(const u8* codes, const Decode4& decode, const Absmax& absmax,
                                            const RowOf& row_of, i64 k, i64 first_column, i64 rows, i64 columns,
                                            typename E::storage* out, int log2_blocksize) {
    constexpr int N = E::PER_VECTOR;
    if ((k | first_column | columns) % N == 0 && is_aligned(codes, N / 2) && is_aligned(out, 16)) {
        write_vectors<E>(codes, decode, absmax, row_of, k, first_column, rows, columns, out, log2_blocksize);
        return;
    }
#pragma unroll 1
    for (i64 e = (i64)blockIdx.x * THREADS + threadIdx.x; e < rows * columns; e += (i64)gridDim.x * THREADS) {
        const i64 r = divide(e, columns), row = row_of(r), i = row * k + first_column + (e - r * columns);
        const float value = row < 0 ? __uint_as_float(0x7fffffffu)
                                    : __fmul_rn(decode.value_at(codes, i), absmax(i >> log2_blocksize));
        out[e] = E::narrow(value);
    }
}

#define DEQUANTIZE_PANEL(DTYPE, E)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_4bit_panel_##DTYPE(                                 \
        const u8* codes, const float* absmax, const void* indices, int wide, i64 first_row, i64 n, i64 k,                \
        i64 first_column, i64 rows, i64 columns, E::storage* out, int log2_blocksize, int quant_type) {                  \
        __shared__ float values[16];                                                                                     \
        const Decode4 decode = load_values_4bit(values, quant_type);                                                     \
        __syncthreads();                                                                                                 \
        write_panel<E>(codes, decode, PlainAbsmax{absmax}, RowOf{indices, wide != 0, first_row, n}, k, first_column,     \
                       rows, columns, out, log2_blocksize);                                                              \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_4bit_panel_nested_##DTYPE(                          \
        const u8* codes, const u8* absmax_codes, const float* nested_code, const float* nested_absmax,                   \
        int log2_nested_blocksize, const float* offset, const void* indices, int wide, i64 first_row, i64 n, i64 k,      \
        i64 first_column, i64 rows, i64 columns, E::storage* out, int log2_blocksize, int quant_type) {                  \
        __shared__ float values[16], nested[256];                                                                        \
        const Decode4 decode = load_values_4bit(values, quant_type);                                                     \
        load_nested_code(nested, nested_code);                                                                           \
        __syncthreads();                                                                                                 \
        const NestedAbsmax absmax{absmax_codes, nested, nested_absmax, log2_nested_blocksize, *offset};                  \
        write_panel<E>(codes, decode, absmax, RowOf{indices, wide != 0, first_row, n}, k, first_column, rows, columns,   \
                       out, log2_blocksize);                                                                             \
    }

DEQUANTIZE_PANEL(f32, F32)
DEQUANTIZE_PANEL(f16, F16)
DEQUANTIZE_PANEL(bf16, BF16)
