// Norms for gradient clipping and trust ratios: sums of squares of every tile, and what follows from them.
//
//   partials   one float64 a tile (gradients), or two (parameter, update)
//
// All sums are float64 of one shape, the same on every device: in a block of 256 lane l adds elements 8 l to 8 l + 7 and the
// lanes fold by halves; a tile adds its blocks in order; sums of tiles are taken by 1024 lanes, each of every 1024th, which
// fold by halves. A warp takes a tile, so that no barrier is needed. The square of a float32 is exact in float64, so a fused
// multiply-add rounds as an addition does.
#include "optim_rules.cuh"
#include "tables.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int V = 8;
constexpr int FOLD = 1024;  // threads of the kernels that add tiles up

__device__ __forceinline__ double block_sum(const Lanes& x) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < RUN; i++) sum = __fma_rn((double)x[i], (double)x[i], sum);
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
    return sum;
}

// A block of one tensor; past its end are zeros.
__device__ __forceinline__ Raw load_block(const Named& type, const void* x, unsigned block, i64 n, bool whole) {
    if (whole) return type.load<V>(x, block);
    const i64 first = (i64)block * BLOCK;
    return first < n ? load_some<V>(x, first, n, type.size()) : Raw{};
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) optim_norm_gradient(const __grid_constant__ Step launch) {
    constexpr int AHEAD = 4;
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Named type(launch.dtype_g);
    const int warp = blockIdx.x * WARPS + threadIdx.x / WARP;
#pragma unroll 1
    for (i64 tile = warp; tile < launch.tile_count; tile += (i64)gridDim.x * WARPS) {
        const int entry = launch.tiles[tile];
        const i64* row = launch.tensors + (i64)entry * FIELDS;
        const void* g = reinterpret_cast<const void*>(launch.gradients[entry]);
        const i64 n = row[N];
        const unsigned first = (unsigned)(tile - row[FIRST_TILE]) * TILE_RUNS;
        const i64 whole_blocks = is_aligned(g, 16) ? min(n / BLOCK, (i64)MAX_WHOLE_BLOCKS) : 0;
        double sum = 0.0;
#pragma unroll 1
        for (int k = 0; k < TILE_RUNS; k += AHEAD) {
            Raw raw[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) raw[i] = load_block(type, g, first + k + i, n, first + k + i < whole_blocks);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                float x[RUN];
                type.unpack(raw[i], x);
                sum += block_sum(x);
            }
        }
        if (threadIdx.x % WARP == 0) launch.partials[tile] = sum;
    }
}

// LAMB's states, read only.
template <bool EIGHT>
__device__ __forceinline__ void load_states(const float (&values)[2][256], const Slot& slot, unsigned block, bool whole,
                                            Lanes (&s)[2]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const Field name = k == 0 ? STATE1 : STATE2;
        if (!EIGHT) {
            Known<F32>(0).unpack(load_block(Named(0), slot.address<void>(name), block, slot.field[N], whole), s[k]);
            continue;
        }
        const float scale = slot.address<float>(k == 0 ? ABSMAX1 : ABSMAX2)[block];
        const u8* codes = slot.address<u8>(name);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const i64 at = (i64)block * BLOCK + place<V>(i);
            s[k][i] = at < slot.field[N] ? __fmul_rn(values[k][codes[at]], scale) : 0.0f;
        }
    }
}

// LARS's update is the gradient, LAMB's the direction that its step takes.
template <bool LAMB, bool EIGHT>
__device__ __forceinline__ void norm_trust(const Step& launch) {
    __shared__ Slot slots[WARPS];
    __shared__ float values[2][256];
    const int map = threadIdx.x / 256, code = threadIdx.x % 256;
    if (EIGHT) values[map][code] = map == 0 ? DYNAMIC_VALUES[code] : DYNAMIC_UNSIGNED_VALUES[code];
    __syncthreads();
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Named type_p(launch.dtype_p), type_g(launch.dtype_g);
    float scale;
    if (is_skipped(launch.control, scale)) scale = 1.0f;
    Slot& slot = slots[threadIdx.x / WARP];
    slot.field[GROUP] = -1;
    __syncwarp();
    int before = -1;
#pragma unroll 1
    for (i64 tile = blockIdx.x * WARPS + threadIdx.x / WARP; tile < launch.tile_count; tile += (i64)gridDim.x * WARPS) {
        const int entry = launch.tiles[tile];
        if (entry != before) open_entry<Lamb, EIGHT ? 1 : 4>(launch, before = entry, slot, nullptr);
        const i64 n = slot.field[N];
        double sum_p = 0.0, sum_u = 0.0;
        unsigned block = (unsigned)(tile - slot.first_tile) * TILE_RUNS;
        const unsigned end = min(block + TILE_RUNS, slot.blocks);
#pragma unroll 1
        for (; block < end; block++) {
            const bool whole = block < slot.whole_blocks;
            float p[RUN], g[RUN], s[2][RUN];
            const Raw raw_p = load_block(type_p, slot.address<void>(P), block, n, whole);
            const Raw raw_g = load_block(type_g, slot.address<void>(GRADIENT), block, n, whole);
            if (LAMB) load_states<EIGHT>(values, slot, block, whole, s);
            type_p.unpack(raw_p, p);
            type_g.unpack(raw_g, g);
#pragma unroll
            for (int i = 0; i < RUN; i++) g[i] = __fmul_rn(g[i], scale);
            if (LAMB) {
                unsigned largest[2];
                Lamb::direction(slot.c, p, g, s, largest);
#pragma unroll
                for (int i = 0; i < RUN; i++)
                    if ((i64)block * BLOCK + place<V>(i) >= n) g[i] = 0.0f;  // 0 / 0 may stand there
            }
            sum_p += block_sum(p);
            sum_u += block_sum(g);
        }
        if (threadIdx.x % WARP == 0) {
            launch.partials[2 * tile] = sum_p;
            launch.partials[2 * tile + 1] = sum_u;
        }
    }
}

#define NORM_TRUST(NAME, LAMB, EIGHT)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) optim_norm_##NAME(const __grid_constant__ Step launch) { \
        norm_trust<LAMB, EIGHT>(launch);                                                                               \
    }

NORM_TRUST(lars, false, false)
NORM_TRUST(lamb8, true, true)
NORM_TRUST(lamb32, true, false)

// The sum of `count` values that lie `stride` apart. Called by all of FOLD threads.
__device__ __forceinline__ double fold(const double* partials, i64 count, int stride) {
    __shared__ double sums[FOLD];
    double sum = 0.0;
#pragma unroll 8
    for (i64 i = threadIdx.x; i < count; i += FOLD) sum += partials[i * stride];
    sums[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll 1
    for (int width = FOLD / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
        __syncthreads();
    }
    sum = sums[0];
    __syncthreads();
    return sum;
}

// What gradients are multiplied by, and whether the step is left out.
extern "C" __global__ void __launch_bounds__(FOLD)
    optim_control(const double* partials, i64 count, double max_norm, const float* grad_scale, const float* found_inf,
                  int skip_nonfinite, float* control) {
    wait_for_previous_kernel();
    const double sum = fold(partials, count, 1);
    if (threadIdx.x > 0) return;
    const double inverse = grad_scale ? 1.0 / (double)*grad_scale : 1.0;
    double clip = max_norm > 0.0 ? max_norm / (sqrt(sum) * inverse + 1e-6) : 1.0;
    if (clip >= 1.0) clip = 1.0;  // NaN stays
    const bool skip = (found_inf && *found_inf != 0.0f) || (skip_nonfinite && !isfinite(sum));
    control[0] = (float)(inverse * clip);
    control[1] = __uint_as_float(skip);
}

// Trust ratios: a block of threads an entry.
extern "C" __global__ void __launch_bounds__(FOLD) optim_trust(const __grid_constant__ Step launch, int lamb, float* ratios) {
    wait_for_previous_kernel();
#pragma unroll 1
    for (int entry = blockIdx.x; entry < launch.count; entry += gridDim.x) {
        const i64* row = launch.tensors + (i64)entry * FIELDS;
        const double* partials = launch.partials + 2 * row[FIRST_TILE];
        const i64 tiles = (row[N] + TILE - 1) / TILE;
        const double p = sqrt(fold(partials, tiles, 2)), u = sqrt(fold(partials + 1, tiles, 2));
        if (threadIdx.x > 0) continue;
        const Group& group = launch.groups[row[GROUP]];
        const double ratio = group.trust * p / (lamb ? u : u + group.weight_decay * p);
        ratios[entry] = p == 0.0 || u == 0.0 ? 1.0f : (float)ratio;
    }
}
