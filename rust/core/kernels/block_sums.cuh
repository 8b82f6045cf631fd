// How the blocks of quantize.cu hand the sums of their maxima to double_quant.cu.
//
// The second launch starts while the first one runs (once all of its blocks do), and waits for each block's sum instead of the
// launch's end. Whoever has seen a sum sees the maxima, too. No block of the first launch ever waits for another.
#pragma once
#include "exact_sum.cuh"

struct Sums {
    unsigned blocks;  // of the first launch
    unsigned unused[3];
    // The bits of each block's sum in float64; PENDING until it is known, INEXACT where float64 does not hold it.
    u64 plain[MAX_SUMS];
    // The same sums limb by limb.
    unsigned limbs[LIMBS][MAX_SUMS];
};
constexpr u64 PENDING = ~0ull, INEXACT = 1ull << 63;

// The maxima that a thread writes.
struct OwnMaxima {
    double sum = 0.0;
    unsigned smallest = ~0u;  // bits of the smallest but for zeros, less one

    __device__ __forceinline__ void add(unsigned bits) {
        sum += (double)__uint_as_float(bits);
        smallest = min(smallest, bits - 1);
    }
    __device__ __forceinline__ PlainSum plain() const {
        PlainSum plain;
        plain.value = sum;
        plain.low = max(PlainSum::TOP + 150 - max((int)(smallest >> 23), 1), 0);
        return plain;
    }
};

// Says that this block's sum is not known yet. Called by one warp, before it lets the next launch start.
__device__ __forceinline__ void open_sum(Sums* sums) {
    if (threadIdx.x % WARP == 0) {
        store_relaxed(sums->plain + blockIdx.x, PENDING);
        if (blockIdx.x == 0) sums->blocks = gridDim.x;
        fence();
    }
    __syncwarp();
}

// Writes the sum of this block's maxima, which lie as `sum_limbs` reads them. Called by all threads.
__device__ __forceinline__ void store_sum(const OwnMaxima& own, const float* absmax, i64 count, int log2_unit, Sums* sums) {
    __shared__ double values[WARP];
    __shared__ unsigned lows[WARP], limbs[LIMBS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    PlainSum sum = warp_sum(own.plain());
    if (lane == 0) values[warp] = sum.value, lows[warp] = sum.low;
    __syncthreads();  // also: all maxima are written
    if (warp == 0) {
        sum = PlainSum();
        if (lane < blockDim.x / WARP) sum.value = values[lane], sum.low = lows[lane];
        sum = warp_sum(sum);
        if (sum.is_exact()) {
            if (lane < LIMBS) sums->limbs[lane][blockIdx.x] = limb_of(sum.value, lane);
            __syncwarp();
            if (lane == 0) store_release(sums->plain + blockIdx.x, __double_as_longlong(sum.value));
        }
    }
    if (__syncthreads_and(warp != 0 || sum.is_exact())) return;
    sum_limbs(absmax, count, log2_unit, limbs);
    if (warp != 0) return;
    if (lane < LIMBS) sums->limbs[lane][blockIdx.x] = limbs[lane];
    __syncwarp();
    if (lane == 0) store_release(sums->plain + blockIdx.x, INEXACT);
}

// Waits for the sums of all blocks; a lane's share of them. Called by one warp.
__device__ __forceinline__ PlainSum wait_for_sums(const Sums* sums) {
    constexpr int LOADS = 9;  // at a time: of two blocks a multiprocessor
    const int blocks = load_l2(&sums->blocks);
    PlainSum sum;
#pragma unroll 1
    for (int first = threadIdx.x % WARP; first < blocks; first += LOADS * WARP) {
        u64 bits[LOADS];
        bool pending;
        do {
            pending = false;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                bits[i] = first + i * WARP < blocks ? load_relaxed(sums->plain + first + i * WARP) : 0;
                pending |= bits[i] == PENDING;
            }
        } while (pending);
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (bits[i] == 0) continue;
            const int exponent = (int)(bits[i] >> 52) - 1023 - 52, zeros = min(__ffsll(bits[i]) - 1, 52);
            sum.value += __longlong_as_double(bits[i]);
            sum.low = max(sum.low, bits[i] == INEXACT ? PlainSum::UNKNOWN : PlainSum::TOP - (exponent + zeros));
        }
    }
    fence();
    __syncwarp();
    return sum;
}
