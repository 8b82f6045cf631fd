// One optimizer step of many tensors whose states are 8-bit: decode, update, encode, in one launch.
//
//   p, g       n elements of their types        state   n codes, one a byte, and ceil(n / 256) float32 scales
//
// The table of tensors, the tiles and who does which work: optim.cuh. Bytes a parameter, bfloat16: AdamW 10 (p read and
// written, g read, two states read and written), Lion 8, AdEMAMix 12, and 8 / 256 a state for the scales. On an H200 the bytes
// allow about 65 instructions a parameter, so the arithmetic is what is saved: decoding is three instructions, encoding five or
// seven, and the checks of roots and quotients are shared by eight elements. 32 warps a multiprocessor, in one block, so that the
// tables stand in shared memory once; a warp has the next block's loads in flight while it looks for codes.
//
// A warp takes up to 16 neighbouring blocks at a time and keeps their scales in shared memory: memory reads and writes 32 bytes,
// and stores of one scale each, by eight warps, take as long as all the codes do.
#include "optim_codes.cuh"
#include "optim_rules.cuh"

constexpr int THREADS = 1024;
constexpr int LONGEST = 4, PIECE = 1 << LONGEST;  // blocks that a warp takes at a time

// Where state k and its scales lie.
template <class Rule>
__device__ __forceinline__ u8* state_codes(const Slot& slot, int k) {
    return slot.address<u8>(k == 0 ? STATE1 : k == Rule::UNSIGNED ? STATE2 : STATE3);
}

template <class Rule>
__device__ __forceinline__ float* state_scales(const Slot& slot, int k) {
    if (k == 0) return slot.address<float>(ABSMAX1);
    if (k == Rule::UNSIGNED) return slot.address<float>(ABSMAX2);
    return slot.address<float>(ABSMAX1) + (slot.field[N] + BLOCK - 1) / BLOCK;
}

// Where a warp has the scale of state k of block i of its piece: in shared memory, behind the tables.
template <class Rule>
__device__ __forceinline__ unsigned scale_address(unsigned tables, int k, unsigned i) {
    const unsigned warp = threadIdx.x / WARP;
    return tables + (unsigned)sizeof(CodeTables) + ((warp * Rule::STATES + k) * PIECE + i) * 4;
}

// A lane's elements of a block as they lie in memory.
template <class Rule>
struct Elements {
    Raw p, g;
    uint2 codes[Rule::STATES];
};

template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void load_block(const Step& launch, const Slot& slot, unsigned block, Elements<Rule>& x) {
    x.p = TypeP(launch.dtype_p).template load<V>(slot.address<void>(P), block);
    x.g = TypeG(launch.dtype_g).template load<V>(slot.address<void>(GRADIENT), block);
#pragma unroll
    for (int k = 0; k < Rule::STATES; k++)
        if (Rule::has(slot.c, 0)) x.codes[k] = load_codes<V>(state_codes<Rule>(slot, k), block);
}

template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void load_part(const Step& launch, const Slot& slot, unsigned block, Elements<Rule>& x) {
    const i64 first = (i64)block * BLOCK, n = slot.field[N];
    x.p = load_some<V>(slot.address<void>(P), first, n, TypeP(launch.dtype_p).size());
    x.g = load_some<V>(slot.address<void>(GRADIENT), first, n, TypeG(launch.dtype_g).size());
#pragma unroll
    for (int k = 0; k < Rule::STATES; k++) {
        const unsigned zero = k == Rule::UNSIGNED ? 0 : 127;
        if (Rule::has(slot.c, 0)) x.codes[k] = load_some_codes<V>(state_codes<Rule>(slot, k), first, n, zero);
    }
}

// Whether a block's loads are under way while the one before is encoded: where there are registers for them.
template <class Rule, int V>
constexpr bool LOADS_AHEAD = V == 8 && Rule::STATES < 3;

// Block i of the piece that starts with `first`. `x` has the block, if it is whole and loaded ahead, and then the next one.
template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void update_block(const Step& launch, unsigned tables, const Slot& slot, unsigned first, unsigned i,
                                             bool is_last, float scale, Elements<Rule>& x) {
    constexpr int STATES = Rule::STATES;
    const TypeP type_p(launch.dtype_p);
    const TypeG type_g(launch.dtype_g);
    const Coefficients c = slot.c;
    const unsigned block = first + i;
    const bool whole = block < slot.whole_blocks, has_states = Rule::has(c, 0);
    if (!whole) {
        load_part<Rule, TypeP, TypeG, V>(launch, slot, block, x);
    } else if (!LOADS_AHEAD<Rule, V>) {
        load_block<Rule, TypeP, TypeG, V>(launch, slot, block, x);
    }

    float p[RUN], g[RUN], s[STATES][RUN];
    type_p.unpack(x.p, p);
    type_g.unpack(x.g, g);
    if (launch.control) {
#pragma unroll
        for (int j = 0; j < RUN; j++) g[j] = __fmul_rn(g[j], scale);
    }
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        const float old = has_states ? __uint_as_float(load_shared(scale_address<Rule>(tables, k, i))) : 0.0f;
        if (k == Rule::UNSIGNED) {
            decode<false>(tables, x.codes[k], old, s[k]);
        } else {
            decode<true>(tables, x.codes[k], old, s[k]);
        }
    }
    unsigned largest[STATES];
    const bool plain = Rule::update(c, p, g, s, largest);
    const Raw packed = round_and_pack<V>(type_p, launch, slot, block, p);
    if (LOADS_AHEAD<Rule, V> && !is_last && block + 1 < slot.whole_blocks)
        load_block<Rule, TypeP, TypeG, V>(launch, slot, block + 1, x);

    uint2 codes[STATES];
    if (has_states) {
        __syncwarp();  // the old scales have been read
#pragma unroll
        for (int k = 0; k < STATES; k++) {
            codes[k] = k == Rule::UNSIGNED ? encode<false>(tables, s[k], largest[k], plain)
                                           : encode<true>(tables, s[k], largest[k], plain);
            if (threadIdx.x % WARP == 0) store_shared(scale_address<Rule>(tables, k, i), __uint_as_float(largest[k]));
        }
    }
    if (whole) {
        type_p.template store<V>(packed, slot.address<void>(P), block);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) store_codes<V>(codes[k], state_codes<Rule>(slot, k), block);
    } else {
        const i64 start = (i64)block * BLOCK, n = slot.field[N];
        store_some<V>(packed, slot.address<void>(P), start, n, type_p.size());
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) store_some_codes<V>(codes[k], state_codes<Rule>(slot, k), start, n);
    }
}

// Blocks `first` to before `end`, at most PIECE of them; a lane brings and takes one block's scales.
template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void update_piece(const Step& launch, unsigned tables, const Slot& slot, unsigned first, unsigned end,
                                             float scale) {
    const unsigned lane = threadIdx.x % WARP, count = end - first;
    const bool has_scales = lane < count && Rule::has(slot.c, 0);
    Elements<Rule> x = {};
    if (LOADS_AHEAD<Rule, V> && first < slot.whole_blocks) load_block<Rule, TypeP, TypeG, V>(launch, slot, first, x);
    if (has_scales) {
        float scales[Rule::STATES];
#pragma unroll
        for (int k = 0; k < Rule::STATES; k++) scales[k] = __ldcs(state_scales<Rule>(slot, k) + (first + lane));
#pragma unroll
        for (int k = 0; k < Rule::STATES; k++) store_shared(scale_address<Rule>(tables, k, lane), scales[k]);
    }
    __syncwarp();
#pragma unroll 1
    for (unsigned i = 0; i < count; i++)
        update_block<Rule, TypeP, TypeG, V>(launch, tables, slot, first, i, i + 1 == count, scale, x);
    __syncwarp();
    if (has_scales) {
#pragma unroll
        for (int k = 0; k < Rule::STATES; k++) {
            const float found = __uint_as_float(load_shared(scale_address<Rule>(tables, k, lane)));
            __stcs(state_scales<Rule>(slot, k) + (first + lane), found);
        }
    }
}

template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void step8(const Step& launch) {
    extern __shared__ __align__(16) unsigned char shared[];
    CodeTables& code_tables = *reinterpret_cast<CodeTables*>(shared);
    load_code_tables<(Rule::UNSIGNED >= 0)>(code_tables);
    let_next_kernel_start();
    wait_for_previous_kernel();
    __syncthreads();
    float scale;
    if (is_skipped(launch.control, scale)) return;
    const unsigned tables = tables_address(code_tables);
    walk<Rule, THREADS / WARP, 1, LONGEST>(launch, [&](const Slot& slot, unsigned first, unsigned end) {
        update_piece<Rule, TypeP, TypeG, V>(launch, tables, slot, first, end, scale);
    });
    advance_counters(launch);
}

#define STEP8(NAME, RULE, TYPE_P, TYPE_G, V)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) optim8_##NAME(const __grid_constant__ Step launch) { \
        step8<RULE, TYPE_P, TYPE_G, V>(launch);                                                                \
    }

// Types that differ, and rules that few use, share one instance a rule that asks for the types as it runs.
STEP8(adam_f32, Adam, Known<F32>, Known<F32>, 4)
STEP8(adam_bf16, Adam, Known<BF16>, Known<BF16>, 8)
STEP8(adam, Adam, Named, Named, 4)
STEP8(ademamix_bf16, Ademamix, Known<BF16>, Known<BF16>, 8)
STEP8(ademamix, Ademamix, Named, Named, 4)
STEP8(lion_bf16, Lion, Known<BF16>, Known<BF16>, 8)
STEP8(lion, Lion, Named, Named, 4)
STEP8(sgd, Sgd, Named, Named, 4)
STEP8(rmsprop, Rmsprop, Named, Named, 4)
STEP8(adagrad, Adagrad, Named, Named, 4)
STEP8(lamb, Lamb, Named, Named, 4)
