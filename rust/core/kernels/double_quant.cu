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
// The sum has one shape on every device (core/src/double_quant.rs): groups of 1024, that is four nested blocks; lane l adds
// elements 8 l ... 8 l + 7 of each of them in turn, the lanes meet in a butterfly; the group sums are summed the same way until
// one is left.
//
// Work: a warp sums groups, then encodes their nested blocks; the group it summed last it still has in registers. Everybody must
// know the mean before anybody encodes, so the grid meets once at `counter`; it is launched cooperatively, with at most as many
// blocks as the device holds at once.
#include "nearest.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int NESTED = 256;
constexpr int BLOCKS = 4;  // nested blocks of a group
constexpr int GROUP = BLOCKS * NESTED;
constexpr int RUN = NESTED / WARP;  // elements a lane of a nested block
constexpr int MAX_SUMS = 1024;      // of the second level: 2^30 maxima, checked by the caller

// The lanes' sums added up in a butterfly, in every lane.
__device__ __forceinline__ double warp_sum(double sum) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        sum = __dadd_rn(sum, __shfl_xor_sync(FULL_WARP, sum, distance));
    return sum;
}

// A lane's share of a nested block of `values`, 0 past the end.
template <class T>
__device__ __forceinline__ void load_run(const T* values, i64 block, i64 count, bool aligned, T (&v)[RUN]) {
    const i64 first = block * NESTED + threadIdx.x % WARP * RUN;
    if (aligned && first + RUN <= count) {
#pragma unroll
        for (int i = 0; i < RUN; i += 16 / sizeof(T))
            *reinterpret_cast<uint4*>(v + i) = *reinterpret_cast<const uint4*>(values + first + i);
        return;
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) v[i] = first + i < count ? values[first + i] : T(0);
}

template <class T>
__device__ __forceinline__ double add_run(double sum, const T (&v)[RUN]) {
#pragma unroll
    for (int i = 0; i < RUN; i++) sum = __dadd_rn(sum, (double)v[i]);
    return sum;
}

// Out of line: the division is long and next to never needed.
__device__ __noinline__ float rare_quotient(Divisor divisor, float x) { return divisor.quotient(x); }

// Codes of a nested block.
__device__ __forceinline__ void encode_block(const Nearest& table, const float (&v)[RUN], i64 block, i64 count, float mean,
                                             u8* absmax_codes, float* nested_absmax, bool aligned) {
    const i64 first = block * NESTED + threadIdx.x % WARP * RUN;
    const int length = (int)max((i64)0, min((i64)RUN, count - first));
    float r[RUN];
    unsigned m = 0;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        r[i] = i < length ? __fsub_rn(v[i], mean) : 0.0f;
        m = max(m, magnitude(r[i]));
    }
    m = max_over_lanes(m, WARP);
    if (threadIdx.x % WARP == 0 && block * NESTED < count) nested_absmax[block] = __uint_as_float(m);
    if (is_plain(m)) {
        const float inverse = reciprocal(__uint_as_float(m));
#pragma unroll
        for (int i = 0; i < RUN; i++) r[i] = __fmul_rn(__fmul_rn(r[i], inverse), table.scale);
    } else {
        const Divisor divisor(__uint_as_float(m));
#pragma unroll
        for (int i = 0; i < RUN; i++) r[i] = __fmul_rn(rare_quotient(divisor, r[i]), table.scale);
    }
    const uint2 codes = make_uint2(nearest_four(table, r[0], r[1], r[2], r[3]), nearest_four(table, r[4], r[5], r[6], r[7]));
    if (aligned && length == RUN) {
        *reinterpret_cast<uint2*>(absmax_codes + first) = codes;
        return;
    }
#pragma unroll
    for (int i = 0; i < RUN; i++)
        if (i < length) absmax_codes[first + i] = (u8)((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
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

// Sum of a group of partials, in every lane. They start on 16 bytes.
__device__ __forceinline__ double group_sum(const double* level, i64 group, i64 length) {
    double sum = 0.0;
#pragma unroll 1
    for (int b = 0; b < BLOCKS; b++) {
        double v[RUN];
        load_run(level, group * BLOCKS + b, length, true, v);
        sum = add_run(sum, v);
    }
    return warp_sum(sum);
}

// The sum of the partials. Every block adds them up for itself: the same additions, so the same sum.
__device__ __forceinline__ double total(const double* level, i64 length, double* sums) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (length == 1) return level[0];
    const i64 groups = (length + GROUP - 1) / GROUP;
#pragma unroll 1
    for (i64 group = warp; group < groups; group += WARPS) {
        const double sum = group_sum(level, group, length);
        if (lane == 0) sums[group] = sum;
    }
    __syncthreads();
    if (groups > RUN) return group_sum(sums, 0, groups);
    // These all lie in the first lane's run: what the others would add is 0.
    double sum = 0.0;
    for (int i = 0; i < groups; i++) sum = __dadd_rn(sum, sums[i]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_absmax(const float* absmax, i64 count, double* partials, unsigned* counter, float* offset, u8* absmax_codes,
                    float* nested_absmax) {
    __shared__ __align__(16) unsigned entries[DYNAMIC_PADDED];
    __shared__ __align__(16) double sums[MAX_SUMS];
    load_table(entries, DYNAMIC_ENTRIES, DYNAMIC_LENGTH);
    wait_for_previous_kernel();

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 groups = (count + GROUP - 1) / GROUP;
    // Neighbouring groups go to different multiprocessors, so that few groups also keep all of them busy.
    const i64 first = (i64)warp * gridDim.x + blockIdx.x, stride = (i64)gridDim.x * WARPS;
    const bool aligned = is_aligned(absmax, 16) && is_aligned(absmax_codes, 8);
    float own[BLOCKS][RUN];
    // From the last to the first, which then is in registers.
#pragma unroll 1
    for (i64 group = first < groups ? first + (groups - 1 - first) / stride * stride : -1; group >= first; group -= stride) {
        double sum = 0.0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) load_run(absmax, group * BLOCKS + b, count, aligned, own[b]);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) sum = add_run(sum, own[b]);
        sum = warp_sum(sum);
        if (lane == 0) partials[group] = sum;
    }
    if (gridDim.x > 1)
        meet(counter);
    else
        __syncthreads();
    const float mean = (float)(total(partials, groups, sums) / (double)count);
    if (blockIdx.x == 0 && threadIdx.x == 0) *offset = mean;

    const Nearest table{entries + DYNAMIC_ORIGIN, DYNAMIC_SCALE};
#pragma unroll 1
    for (i64 group = first; group < groups; group += stride) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const i64 block = group * BLOCKS + b;
            if (group != first) load_run(absmax, block, count, aligned, own[b]);
            encode_block(table, own[b], block, count, mean, absmax_codes, nested_absmax, aligned);
        }
    }
}
