// The second launch of double quantization: the block maxima themselves become 8-bit codes.
//
//   offset        = float32(sum(absmax) / count), the sum in float64
//   absmax_codes  = 8-bit blockwise codes of absmax - offset, blocks of 256, signed dynamic map
//
//   absmax        count float32, written by the launch before
//   partials      ceil(count / 1024) float64 of workspace
//   counter       0 when this kernel starts (the launch before clears it)
//   nested_absmax ceil(count / 256) float32
//
// The sum has one shape on every device (core/src/double_quant.rs): groups of 1024, in a group lane l adds elements l, l + 32, ...
// in order, the lanes meet in a butterfly; the group sums are summed the same way until one is left.
//
// Work: a warp sums groups of 1024, then encodes nested blocks. Everybody must know the mean before anybody encodes, so the
// grid meets once at `counter`; it is launched cooperatively, with at most as many blocks as the device holds at once.
#include "nearest.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int GROUP = 1024;
constexpr int PER_LANE = GROUP / WARP;
constexpr int NESTED = 256;
constexpr int PER_THREAD = NESTED / WARP;
constexpr int MAX_SUMS = 1024;       // of the second level: 2^30 maxima, checked by the caller

// The lanes' sums added up in a butterfly, in every lane.
__device__ __forceinline__ double warp_sum(double sum) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        sum = __dadd_rn(sum, __shfl_xor_sync(FULL_WARP, sum, distance));
    return sum;
}

// Sum of group `group` of `values`, in every lane.
template <class T>
__device__ __forceinline__ double group_sum(const T* values, i64 group, i64 count) {
    const T* own = values + group * GROUP + threadIdx.x % WARP;
    double sum = 0.0;
    if ((group + 1) * GROUP <= count) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) sum = __dadd_rn(sum, (double)own[i * WARP]);
    } else {
        const int left = (int)(count - group * GROUP) - threadIdx.x % WARP;
#pragma unroll 1
        for (int i = 0; i * WARP < left; i++) sum = __dadd_rn(sum, (double)own[i * WARP]);
    }
    return warp_sum(sum);
}

// Out of line: the division is long and next to never needed.
__device__ __noinline__ float rare_quotient(Divisor divisor, float x) { return divisor.quotient(x); }

// Eight maxima of nested block `block` a lane; past the end, `filler`.
struct Share {
    float r[PER_THREAD];
    i64 first;
    int length;

    __device__ __forceinline__ Share(const float* absmax, i64 block, i64 count, float filler, bool aligned) {
        first = block * NESTED + (threadIdx.x % WARP) * PER_THREAD;
        length = (int)max((i64)0, min((i64)PER_THREAD, count - first));
        if (aligned && length == PER_THREAD) {
            const float4 low = reinterpret_cast<const float4*>(absmax + first)[0];
            const float4 high = reinterpret_cast<const float4*>(absmax + first)[1];
            r[0] = low.x, r[1] = low.y, r[2] = low.z, r[3] = low.w;
            r[4] = high.x, r[5] = high.y, r[6] = high.z, r[7] = high.w;
        } else {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) r[i] = i < length ? absmax[first + i] : filler;
        }
    }
};

// Codes of a nested block.
__device__ __forceinline__ void encode_block(const Nearest& table, Share share, i64 block, float mean, u8* absmax_codes,
                                             float* nested_absmax, bool aligned) {
    float(&r)[PER_THREAD] = share.r;
    unsigned m = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        r[i] = __fsub_rn(r[i], mean);
        m = max(m, magnitude(r[i]));
    }
    m = max_over_lanes(m, WARP);
    if (threadIdx.x % WARP == 0) nested_absmax[block] = __uint_as_float(m);
    if (is_plain(m)) {
        const float inverse = reciprocal(__uint_as_float(m));
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) r[i] = __fmul_rn(__fmul_rn(r[i], inverse), table.scale);
    } else {
        const Divisor divisor(__uint_as_float(m));
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) r[i] = __fmul_rn(rare_quotient(divisor, r[i]), table.scale);
    }
    const uint2 codes = make_uint2(nearest_four(table, r[0], r[1], r[2], r[3]), nearest_four(table, r[4], r[5], r[6], r[7]));
    if (aligned && share.length == PER_THREAD) {
        *reinterpret_cast<uint2*>(absmax_codes + share.first) = codes;
    } else {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            if (i < share.length) absmax_codes[share.first + i] = (u8)((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
    }
}

// Waits until every block of the grid has come here.
__device__ __forceinline__ void meet(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
        while (*reinterpret_cast<volatile unsigned*>(counter) < gridDim.x) {
        }
        __threadfence();
    }
    __syncthreads();
}

// The sum of the partials. Every block adds them up for itself: the same additions, so the same sum.
__device__ __forceinline__ double total(const double* level, i64 length, double* sums) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (length == 1) return level[0];
    const i64 groups = (length + GROUP - 1) / GROUP;
    for (i64 group = warp; group < groups; group += WARPS) {
        const double sum = group_sum(level, group, length);
        if (lane == 0) sums[group] = sum;
    }
    __syncthreads();
    return groups == 1 ? sums[0] : group_sum(sums, 0, groups);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_absmax(const float* absmax, i64 count, double* partials, unsigned* counter, float* offset, u8* absmax_codes,
                    float* nested_absmax) {
    __shared__ unsigned entries[DYNAMIC_LENGTH];
    __shared__ double sums[MAX_SUMS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 groups = (count + GROUP - 1) / GROUP;
    // Neighbouring groups go to different multiprocessors, so that few groups also keep all of them busy.
    const i64 first = (i64)warp * gridDim.x + blockIdx.x, stride = (i64)gridDim.x * WARPS;
    load_table(entries, DYNAMIC_ENTRIES, DYNAMIC_LENGTH);
    for (i64 group = first; group < groups; group += stride) {
        const double sum = group_sum(absmax, group, count);
        if (lane == 0) partials[group] = sum;
    }
    if (gridDim.x > 1)
        meet(counter);
    else
        __syncthreads();
    const float mean = (float)(total(partials, groups, sums) / (double)count);
    if (blockIdx.x == 0 && threadIdx.x == 0) *offset = mean;

    const Nearest table{entries + DYNAMIC_ORIGIN, DYNAMIC_SCALE};
    const bool aligned = is_aligned(absmax, 16) && is_aligned(absmax_codes, 8);
    const i64 blocks = (count + NESTED - 1) / NESTED;
    // The next block's loads are under way while this one is encoded.
    Share next(absmax, first, count, mean, aligned);
#pragma unroll 1
    for (i64 block = first; block < blocks; block += stride) {
        const Share share = next;
        next = Share(absmax, block + stride, count, mean, aligned);
        encode_block(table, share, block, mean, absmax_codes, nested_absmax, aligned);
    }
}
