// What the optimizers' kernels share: the tables that describe a launch, a tensor's coefficients, and the walk over tiles.
//
// A launch is a list of tiles of 16 runs of 256 elements; tile j of the list belongs to row tiles[j] of a table of tensors. A
// warp takes a run, eight elements a lane, or a piece of a few neighbouring ones at a time, and walks alone: it keeps its tensor's
// row and coefficients in a slot of shared memory of its own and reads them anew where the row changes.
#pragma once
#include "element.cuh"
#include "optim_vectors.cuh"

constexpr int BLOCK = 256;  // elements that share a scale of 8-bit state
constexpr int TILE_RUNS = 16;
constexpr int TILE = TILE_RUNS * BLOCK;
constexpr int FIELDS = 16;
constexpr int GROUPS = 16;
// Vectors are numbered with 32 bits; what lies past those blocks goes element by element.
constexpr unsigned MAX_WHOLE_BLOCKS = 1u << 26;

// A row of the table of tensors; GRADIENT, and STATE3 where state 1 is two halves, are filled in by `open_entry`.
enum Field { P, STATE1, STATE2, STATE3, ABSMAX1, ABSMAX2, N, STEP, FIRST_TILE, GROUP, ORDINAL, FIRST, ADVANCE, GRADIENT };

// Flags of a group.
constexpr unsigned DECOUPLED = 1, AMSGRAD = 2, NESTEROV = 4, CENTERED = 8, BIAS_CORRECTION = 16;
// Flags of coefficients besides those.
constexpr unsigned INTO_GRADIENT = 32;   // weight decay is added to the gradient
constexpr unsigned MOMENTUM = 64;        // there is some
constexpr unsigned FIRST_STEP = 128;
constexpr unsigned PLAIN_DIVISOR = 256;  // optim_vectors.cuh's `divide_by_roots`
constexpr unsigned ZEROS = 512;          // the same

struct Group {
    double lr;
    const float* lr_address;
    double beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, dampening, lr_decay, trust;
    u64 flags;
    double log_beta1, log_beta3;  // the host's logarithms

    __device__ __forceinline__ double rate() const { return lr_address ? (double)*lr_address : lr; }
};

// A launch, by value.
struct Step {
    const i64* tensors;
    const i64* gradients;
    const int* tiles;
    unsigned* ticket;
    const float* control;
    const float* ratios;
    double* partials;  // of the norms
    u64 seed;
    int count, tile_count, stochastic, dtype_p, dtype_g;
    Group groups[GROUPS];
};

// What a rule computes once a tensor, in float64, then rounded once.
struct __align__(16) Coefficients {
    float keep, weight_decay, beta1, rest1;
    float beta2, rest2, beta3, rest3;
    float inverse1, inverse2, eps, step;
    float alpha, ratio;
    unsigned flags, spare;
};

struct __align__(16) Slot {
    i64 field[FIELDS];  // STEP is the step's number
    Coefficients c;
    int first_tile;
    unsigned whole_blocks, blocks;  // that can be read by vectors, and all

    template <class T>
    __device__ __forceinline__ T* address(Field name) const {
        return reinterpret_cast<T*>(field[name]);
    }
};

// base^exponent by squaring: the same products in the same order on every device.
__device__ __forceinline__ double power(double base, u64 exponent) {
    double result = 1.0;
#pragma unroll 1
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

// e^x for x <= 0: the same operations on every device (core/src/cpu/optim_coefficients.rs).
__device__ __forceinline__ double exponential(double x) {
    const double k = fmin(fmax(rint(x * 1.4426950408889634), -1000.0), 1000.0);
    const double r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
    double sum = 1.0;
#pragma unroll 1
    for (int i = 14; i > 0; i--) sum = 1.0 + sum * r / (double)i;
    return sum * __longlong_as_double((1023 + (i64)k) << 52);
}

// Reads a row into a warp's slot, and computes its coefficients unless the slot or `known` has them. STATE_SIZE: bytes of an
// element of state.
template <class Rule, int STATE_SIZE>
__device__ __noinline__ void open_entry(const Step& step, int entry, Slot& slot, const Slot* known) {
    constexpr int STATE_ALIGNMENT = STATE_SIZE == 1 ? 8 : 16;
    const int lane = threadIdx.x % WARP;
    const i64 group_before = slot.field[GROUP], step_before = slot.field[STEP];
    __syncwarp();
    bool aligned = true;
    if (lane <= GRADIENT) {
        i64 value = lane == GRADIENT ? step.gradients[entry] : step.tensors[(i64)entry * FIELDS + lane];
        const bool is_state = lane == STATE1 || lane == STATE2 || lane == STATE3;
        if (lane == P || lane == GRADIENT) aligned = (value & 15) == 0;
        // State 1 of two halves: the second one's address too.
        if (is_state || (lane == N && Rule::HALVES)) aligned = (value & (STATE_ALIGNMENT - 1)) == 0;
        if (lane == STEP) value = *reinterpret_cast<const i64*>(value) + 1;
        slot.field[lane] = value;
    }
    aligned = __all_sync(FULL_WARP, aligned);
    __syncwarp();
    const i64 group = slot.field[GROUP], t = slot.field[STEP];
    if (lane == 0) {
        if (group != group_before || t != step_before) {
            if (known && known->field[GROUP] == group && known->field[STEP] == t) {
                slot.c = known->c;
            } else {
                slot.c = Rule::coefficients(step.groups[group], t);
            }
        }
        slot.c.ratio = step.ratios ? step.ratios[entry] : 1.0f;
        const i64 n = slot.field[N];
        if (Rule::HALVES) slot.field[STATE3] = slot.field[STATE1] + n * STATE_SIZE;
        slot.first_tile = (int)slot.field[FIRST_TILE];
        slot.blocks = (unsigned)((n + BLOCK - 1) / BLOCK);
        slot.whole_blocks = aligned ? (unsigned)min(n / BLOCK, (i64)MAX_WHOLE_BLOCKS) : 0;
    }
    __syncwarp();
}

// Adds 1 to the counters once all blocks have read them. Called by all threads; leaves the ticket as it was.
__device__ __forceinline__ void advance_counters(const Step& step) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(step.ticket, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
#pragma unroll 1
    for (int entry = threadIdx.x; entry < step.count; entry += blockDim.x) {
        const i64* row = step.tensors + (i64)entry * FIELDS;
        if (row[ADVANCE]) *reinterpret_cast<i64*>(row[STEP]) += 1;
    }
}

// Whether the step is left out, and else what the gradients are multiplied by.
__device__ __forceinline__ bool is_skipped(const float* control, float& scale) {
    scale = 1.0f;
    if (!control) return false;
    scale = control[0];
    return __float_as_uint(control[1]) != 0;
}

// Calls work(slot, first, end) for this warp's runs of 256 elements, `first` to before `end`: a piece of up to 2^LONGEST of them
// at a time, and shorter ones where a warp has few runs in all. WARPS: of a block.
//
// With pieces, a block has an unbroken share of the launch's runs, so that it meets few rows: opening one takes three trips to
// memory, one after the other. Without, the launch goes over memory as one front, which takes 1 % less time.
template <class Rule, int WARPS, int STATE_SIZE, int LONGEST, class Work>
__device__ __forceinline__ void walk(const Step& step, const Work& work) {
    constexpr int ENOUGH = 2;  // a warp has 2^ENOUGH pieces, or pieces of one run
    __shared__ Slot slots[WARPS + 1];
    const int warp = threadIdx.x / WARP;
    const u64 runs = (u64)step.tile_count * TILE_RUNS;
    int log = LONGEST;
    while (log > 0 && runs >> (log + ENOUGH) < gridDim.x * WARPS) log--;
    // This block's pieces, and how many warps share them.
    u64 first_piece = (u64)blockIdx.x * WARPS, end_piece = runs;
    unsigned warps = gridDim.x * WARPS;
    if (LONGEST > 0) {
        const u64 pieces = runs >> log, share = pieces / gridDim.x, rest = pieces % gridDim.x;
        first_piece = share * blockIdx.x + min((u64)blockIdx.x, rest);
        end_piece = first_piece + share + (blockIdx.x < rest);
        warps = WARPS;
    }
    const unsigned piece = 1 << log, stride = warps << log;
    const u64 count = end_piece << log;
    u64 run = first_piece + warp << log;
    Slot& slot = slots[warp];
    int entry = run < count ? step.tiles[run / TILE_RUNS] : 0;
    // One warp computes for all: most of them start with the same group and step. It has the block's first run.
    if (warp == 0 && run < count) {
        slots[WARPS].field[GROUP] = -1;
        __syncwarp();
        open_entry<Rule, STATE_SIZE>(step, entry, slots[WARPS], nullptr);
    }
    slot.field[GROUP] = -1;
    __syncthreads();
#pragma unroll 1
    while (run < count) {
        open_entry<Rule, STATE_SIZE>(step, entry, slot, slots + WARPS);
        // The first run past the row, whose own row is asked for now. The last tile of a row may have fewer runs than others:
        // those that it lacks are passed over.
        const u64 before = (u64)slot.first_tile * TILE_RUNS;
        const unsigned end = (slot.blocks + TILE_RUNS - 1) / TILE_RUNS * TILE_RUNS;
        const unsigned blocks = (unsigned)min((u64)slot.blocks, count - before);
        unsigned block = (unsigned)(run - before);
        run += (u64)(((end - block >> log) + warps - 1) / warps) * stride;
        if (run < count) entry = step.tiles[run / TILE_RUNS];
#pragma unroll 1
        for (; block < blocks; block += stride) work(slot, block, min(block + piece, blocks));
    }
}

// A block's parameters as they are stored.
template <int V, class Type>
__device__ __forceinline__ Raw round_and_pack(const Type& type, const Step& launch, const Slot& slot, unsigned block,
                                              Lanes& p) {
    if (type.is_bf16() && launch.stochastic) {
        const u64 first = slot.field[FIRST] + (i64)block * BLOCK;
        return round_stochastically<V>(p, first, (unsigned)slot.field[STEP], (unsigned)slot.field[ORDINAL], launch.seed);
    }
    return type.pack(p);
}
