// Blockwise dequantization: out[i] = code[codes[i]] * absmax[i / blocksize], one float32 product, rounded once.
//
//   codes   n bytes, or (n + 1) / 2 bytes of two codes, the first in the high nibble
//   absmax  ceil(n / blocksize) float32; double quantization stores it as 8-bit codes:
//           absmax[b] = nested_code[absmax_codes[b]] * nested_absmax[b / nested_blocksize] + *offset, two float32 operations
//   out     n elements of E
//
// Work: a lane turns 8 codes (float32: 4) into one 16-byte store, UNROLL of them in flight, so that a warp writes 512
// consecutive bytes at a time. Sixteen float32 values lie in sixteen banks of shared memory and never conflict; the 256 of an
// 8-bit code stand there in COPIES copies, which leaves two lanes a bank. Both are written while the kernel before ends.
#include "decode.cuh"

constexpr int THREADS = 256;
constexpr int UNROLL = 4;
constexpr int COPIES = 8;

// One code a byte.
struct Decode8 {
    const float* values;  // of this lane's copy, COPIES apart, in shared memory

    template <int N>
    static __device__ __forceinline__ uint2 load(const u8* codes, i64 first) {
        if (N == 8) return *reinterpret_cast<const uint2*>(codes + first);
        return make_uint2(*reinterpret_cast<const unsigned*>(codes + first), 0);
    }
    __device__ __forceinline__ float value(const uint2& packed, int i) const {
        return values[((i < 4 ? packed.x : packed.y) >> (8 * (i % 4)) & 255) * COPIES];
    }
    __device__ __forceinline__ float value_at(const u8* codes, i64 i) const { return values[codes[i] * COPIES]; }
};

// Elements `start` to `end`, a thread a vector where the tensors are aligned, the rest one by one.
template <class E, class Decode, class Absmax>
__device__ __forceinline__ void dequantize_some(const u8* codes, const Decode& decode, const Absmax& absmax,
                                                typename E::storage* out, i64 start, i64 end, bool aligned,
                                                int log2_blocksize) {
    constexpr int N = E::PER_VECTOR;
    const i64 whole = aligned ? (end - start) / N * N : 0;
#pragma unroll 1
    for (i64 i = start + threadIdx.x * N; i < start + whole; i += THREADS * N) {
        const uint2 packed = Decode::template load<N>(codes, i);
        const float scale = absmax(i >> log2_blocksize);
        float f[N];
#pragma unroll
        for (int k = 0; k < N; k++) f[k] = __fmul_rn(decode.value(packed, k), scale);
        *reinterpret_cast<uint4*>(out + i) = E::pack(f);
    }
#pragma unroll 1
    for (i64 i = start + whole + threadIdx.x; i < end; i += THREADS)
        out[i] = E::narrow(__fmul_rn(decode.value_at(codes, i), absmax(i >> log2_blocksize)));
}

template <class E, class Decode, class Absmax>
__device__ __forceinline__ void dequantize(const u8* codes, const Decode& decode, const Absmax& absmax,
                                           typename E::storage* out, i64 n, int log2_blocksize, int rows) {
    constexpr int N = E::PER_VECTOR;
    constexpr int ROW = THREADS * N;       // elements of one vector a thread
    constexpr int TILE = UNROLL * ROW;     // a multiple of every block size
    static_assert(TILE % 4096 == 0, "a tile starts on a block");
    const bool aligned = is_aligned(codes, 8) && is_aligned(out, 16);
    const int size = rows * ROW;  // TILE, or one row where whole tiles would leave multiprocessors idle
    for (i64 tile = blockIdx.x; tile * size < n; tile += gridDim.x) {
        const i64 start = tile * size;
        if (!aligned || rows != UNROLL || start + TILE > n) {
            dequantize_some<E>(codes, decode, absmax, out, start, min(n, start + size), aligned, log2_blocksize);
            continue;
        }
        const int own = threadIdx.x * N;
        const i64 block = start >> log2_blocksize;
        uint2 packed[UNROLL];
        float scale[UNROLL];
        // All loads before the first use.
#pragma unroll
        for (int u = 0; u < UNROLL; u++) packed[u] = Decode::template load<N>(codes, start + own + u * ROW);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) scale[u] = absmax(block + ((own + u * ROW) >> log2_blocksize));
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float f[N];
#pragma unroll
            for (int i = 0; i < N; i++) f[i] = __fmul_rn(decode.value(packed[u], i), scale[u]);
            *reinterpret_cast<uint4*>(out + start + own + u * ROW) = E::pack(f);
        }
    }
}

// Asks for this thread's first codes and their scale while tables are being written. A small tensor is bound by such latencies; a
// large one would only pay for the instructions.
template <class E, class Absmax>
__device__ __forceinline__ void prefetch_first(const u8* codes, const Absmax& absmax, i64 n, int codes_a_byte,
                                               int log2_blocksize, int rows) {
    const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * E::PER_VECTOR;
    if (rows > 1 || first >= n) return;
    prefetch(codes + first / codes_a_byte);
    absmax.prefetch_block(first >> log2_blocksize);
}

// A thread's value, COPIES times: in 16-byte stores, as the threads' words lie in four banks.
__device__ __forceinline__ void copy_value(float (&values)[256 * COPIES], float value) {
#pragma unroll
    for (int copy = 0; copy < COPIES; copy += 4)
        *reinterpret_cast<float4*>(values + threadIdx.x * COPIES + copy) = make_float4(value, value, value, value);
}

#define DEQUANTIZE(DTYPE, E)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_4bit_##DTYPE(                                       \
        const u8* codes, const float* absmax, E::storage* out, i64 n, int log2_blocksize, int quant_type, int rows) {    \
        __shared__ float values[16];                                                                                     \
        const PlainAbsmax scale{absmax};                                                                                 \
        const Decode4 decode = load_values_4bit(values, quant_type);                                                     \
        wait_for_previous_kernel();                                                                                      \
        let_next_kernel_start();                                                                                         \
        prefetch_first<E>(codes, scale, n, 2, log2_blocksize, rows);                                                     \
        __syncthreads();                                                                                                 \
        dequantize<E>(codes, decode, scale, out, n, log2_blocksize, rows);                                               \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_4bit_nested_##DTYPE(                                \
        const u8* codes, const u8* absmax_codes, const float* nested_code, const float* nested_absmax,                   \
        int log2_nested_blocksize, const float* offset, E::storage* out, i64 n, int log2_blocksize, int quant_type,      \
        int rows) {                                                                                                      \
        __shared__ float values[16], nested[256];                                                                        \
        const Decode4 decode = load_values_4bit(values, quant_type);                                                     \
        if (!nested_code) load_nested_code(nested, nullptr);                                                             \
        wait_for_previous_kernel();                                                                                      \
        let_next_kernel_start();                                                                                         \
        const NestedAbsmax scale{absmax_codes, nested, nested_absmax, log2_nested_blocksize, *offset};                   \
        prefetch_first<E>(codes, scale, n, 2, log2_blocksize, rows);                                                     \
        if (nested_code) load_nested_code(nested, nested_code);                                                          \
        __syncthreads();                                                                                                 \
        dequantize<E>(codes, decode, scale, out, n, log2_blocksize, rows);                                               \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_8bit_##DTYPE(                                       \
        const u8* codes, const float* code, const float* absmax, E::storage* out, i64 n, int log2_blocksize, int rows) { \
        __shared__ __align__(16) float values[256 * COPIES];                                                             \
        const PlainAbsmax scale{absmax};                                                                                 \
        if (!code) copy_value(values, DYNAMIC_VALUES[threadIdx.x]);                                                      \
        wait_for_previous_kernel();                                                                                      \
        let_next_kernel_start();                                                                                         \
        prefetch_first<E>(codes, scale, n, 1, log2_blocksize, rows);                                                     \
        if (code) copy_value(values, code[threadIdx.x]);                                                                 \
        __syncthreads();                                                                                                 \
        const Decode8 decode{values + threadIdx.x % COPIES};                                                             \
        dequantize<E>(codes, decode, scale, out, n, log2_blocksize, rows);                                               \
    }

DEQUANTIZE(f32, F32)
DEQUANTIZE(f16, F16)
DEQUANTIZE(bf16, BF16)
