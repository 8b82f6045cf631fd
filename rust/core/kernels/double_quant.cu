// The second launch of double quantization: the block maxima themselves become 8-bit codes.
//
//   offset        = float32(sum(absmax) / count), the sum exact, then rounded to float64
//   absmax_codes  = 8-bit blockwise codes of absmax - offset, blocks of 256, signed dynamic map
//
//   absmax        count float32, written by the launch before
//   sums          its blocks' sums of them (block_sums.cuh)
//   nested_absmax ceil(count / 256) float32
//
// Work: the launch is bound by its latencies, not by bytes or instructions. It starts while the one before ends, loads its table and
// waits for the sums. Every block adds those up for itself, one warp of it, while the others load maxima. A warp then takes nested
// blocks, the next one's loads ahead of it.
#include "block_sums.cuh"
#include "nearest.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int NESTED = 256;
constexpr int RUN = NESTED / WARP;  // elements a lane of a nested block

// Largest maximum up to which its reciprocal takes the scale in exactly.
constexpr float FOLD_LIMIT = DYNAMIC_SCALE * 0x1p126f;

// A lane's share of a whole nested block.
__device__ __forceinline__ void load_run(const float* absmax, i64 block, float (&v)[RUN]) {
    const float4* from = reinterpret_cast<const float4*>(absmax + block * NESTED) + threadIdx.x % WARP * 2;
    const float4 low = from[0], high = from[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// A nested block of any length at any address, and of any values, one of them a lane at a time.
__device__ __noinline__ void encode_carefully(const Nearest& table, const float* absmax, i64 block, i64 count, float mean,
                                              u8* absmax_codes, float* nested_absmax) {
    const i64 start = block * NESTED + threadIdx.x % WARP, end = min(count, (block + 1) * NESTED);
    unsigned m = 0;
#pragma unroll 1
    for (i64 i = start; i < end; i += WARP) m = max(m, magnitude(__fsub_rn(absmax[i], mean)));
    m = warp_max(m);
    if (threadIdx.x % WARP == 0) nested_absmax[block] = __uint_as_float(m);
    const Divisor divisor(__uint_as_float(m));
#pragma unroll 1
    for (i64 i = start; i < end; i += WARP) {
        const float t = divisor.quotient(__fsub_rn(absmax[i], mean));
        absmax_codes[i] = (u8)(nearest_8bit(table, __fmul_rn(t, table.scale)) >> 24);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_absmax(const float* absmax, i64 count, const Sums* sums, float* offset, u8* absmax_codes, float* nested_absmax) {
    __shared__ __align__(16) unsigned entries[DYNAMIC_PADDED];
    __shared__ float shared_mean;
    __shared__ bool exact;
    load_table(entries, DYNAMIC_ENTRIES, DYNAMIC_LENGTH);

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 blocks = (count + NESTED - 1) / NESTED, stride = (i64)gridDim.x * WARPS;
    const i64 whole = is_aligned(absmax, 16) && is_aligned(absmax_codes, 8) ? count / NESTED : 0;
    // Few nested blocks go to as many multiprocessors; of more, the blocks that start last have fewer.
    i64 block = blocks <= stride ? (i64)warp * gridDim.x + blockIdx.x : (i64)blockIdx.x * WARPS + warp;
    PlainSum sum;
    if (warp == 0) sum = wait_for_sums(sums);
    __syncthreads();
    float next[RUN] = {};
    if (block < whole) load_run(absmax, block, next);
    if (warp == 0) {
        sum = warp_sum(sum);
        if (lane == 0) shared_mean = (float)(sum.value / (double)count), exact = sum.is_exact();
    }
    __syncthreads();
    if (!exact) {
        const double total = total_of_limbs(sums->limbs, sums->blocks);
        if (threadIdx.x == 0) shared_mean = (float)(total / (double)count);
        __syncthreads();
    }
    const float mean = shared_mean;
    if (blockIdx.x == 0 && threadIdx.x == 0) *offset = mean;

    const Nearest table{entries + DYNAMIC_ORIGIN, DYNAMIC_SCALE};
#pragma unroll 1
    for (; block < whole; block += stride) {
        float r[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) r[i] = __fsub_rn(next[i], mean);
        if (block + stride < whole) load_run(absmax, block + stride, next);
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < RUN; i++) largest = fmaxf(largest, fabsf(r[i]));
        const unsigned m = warp_max(__float_as_uint(largest));
        if (!is_plain(m) || __uint_as_float(m) >= FOLD_LIMIT) {
            encode_carefully(table, absmax, block, count, mean, absmax_codes, nested_absmax);
            continue;
        }
        const float inverse = __fmul_rn(reciprocal(__uint_as_float(m)), table.scale);
#pragma unroll
        for (int i = 0; i < RUN; i++) r[i] = __fmul_rn(r[i], inverse);
        if (lane == 0) nested_absmax[block] = __uint_as_float(m);
        reinterpret_cast<uint2*>(absmax_codes + block * NESTED)[lane] =
            make_uint2(nearest_four(table, r[0], r[1], r[2], r[3]), nearest_four(table, r[4], r[5], r[6], r[7]));
    }
#pragma unroll 1
    for (; block < blocks; block += stride)
        encode_carefully(table, absmax, block, count, mean, absmax_codes, nested_absmax);
    wait_for_previous_kernel();  // so that its end is part of this one's
}
