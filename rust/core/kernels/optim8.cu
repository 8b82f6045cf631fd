// One optimizer step of many tensors whose states are 8-bit: decode, update, encode, in one launch.
//
//   p, g       n elements of their types        state   n codes, one a byte, and ceil(n / 256) float32 scales
//
// The table of tensors, the tiles and who does which work: optim.cuh. Bytes a parameter, bfloat16: AdamW 10 (p read and
// written, g read, two states read and written), Lion 8, AdEMAMix 12, and 8 / 256 a state for the scales. On an H200 the bytes
// allow about 65 instructions a parameter, so the arithmetic is what is saved: decoding is three instructions, encoding five or
// seven, and the checks of roots and quotients are shared by eight elements. Every load of a block is in flight before the
// first is used, and 32 warps a multiprocessor hide the rest: one block of them, so that the tables stand in shared memory once.
#include "optim_codes.cuh"
#include "optim_rules.cuh"

constexpr int THREADS = 1024;

// Where state k and its scales lie.
template <class Rule>
__device__ __forceinline__ u8* state_codes(const Slot& slot, int k) {
    if (k == 0) return slot.address<u8>(STATE1);
    if (k == Rule::UNSIGNED) return slot.address<u8>(STATE2);
    return slot.address<u8>(STATE1) + slot.field[N];
}

template <class Rule>
__device__ __forceinline__ float* state_scales(const Slot& slot, int k) {
    if (k == 0) return slot.address<float>(ABSMAX1);
    if (k == Rule::UNSIGNED) return slot.address<float>(ABSMAX2);
    return slot.address<float>(ABSMAX1) + (slot.field[N] + BLOCK - 1) / BLOCK;
}

template <class Rule, class TypeP, class TypeG, int V>
__device__ __forceinline__ void update_block(const Step& launch, unsigned tables, const Slot& slot, unsigned block,
                                             float scale) {
    constexpr int STATES = Rule::STATES;
    const TypeP type_p(launch.dtype_p);
    const TypeG type_g(launch.dtype_g);
    const Coefficients c = slot.c;
    const bool whole = block < slot.whole_blocks, has_states = Rule::has(c, 0);

    Raw raw_p, raw_g;
    uint2 codes[STATES] = {};
    float scales[STATES] = {};
    if (has_states) {
#pragma unroll
        for (int k = 0; k < STATES; k++) scales[k] = __ldcs(state_scales<Rule>(slot, k) + block);
    }
    if (whole) {
        raw_p = type_p.template load<V>(slot.address<void>(P), block);
        raw_g = type_g.template load<V>(slot.address<void>(GRADIENT), block);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) codes[k] = load_codes<V>(state_codes<Rule>(slot, k), block);
    } else {
        const i64 first = (i64)block * BLOCK, n = slot.field[N];
        raw_p = load_some<V>(slot.address<void>(P), first, n, type_p.size());
        raw_g = load_some<V>(slot.address<void>(GRADIENT), first, n, type_g.size());
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) codes[k] = load_some_codes<V>(state_codes<Rule>(slot, k), first, n, k == Rule::UNSIGNED ? 0 : 127);
    }

    float p[RUN], g[RUN], s[STATES][RUN];
    type_p.unpack(raw_p, p);
    type_g.unpack(raw_g, g);
    if (launch.control) {
#pragma unroll
        for (int i = 0; i < RUN; i++) g[i] = __fmul_rn(g[i], scale);
    }
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        if (k == Rule::UNSIGNED) {
            decode<false>(tables, codes[k], scales[k], s[k]);
        } else {
            decode<true>(tables, codes[k], scales[k], s[k]);
        }
    }
    unsigned largest[STATES];
    const bool plain = Rule::update(c, p, g, s, largest);
    const Raw packed = round_and_pack<V>(type_p, launch, slot, block, p);
    if (has_states) {
#pragma unroll
        for (int k = 0; k < STATES; k++) {
            codes[k] = k == Rule::UNSIGNED ? encode<false>(tables, s[k], largest[k], plain)
                                           : encode<true>(tables, s[k], largest[k], plain);
        }
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int k = 0; k < STATES; k++) __stcs(state_scales<Rule>(slot, k) + block, __uint_as_float(largest[k]));
        }
    }
    if (whole) {
        type_p.template store<V>(packed, slot.address<void>(P), block);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) store_codes<V>(codes[k], state_codes<Rule>(slot, k), block);
    } else {
        const i64 first = (i64)block * BLOCK, n = slot.field[N];
        store_some<V>(packed, slot.address<void>(P), first, n, type_p.size());
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (has_states) store_some_codes<V>(codes[k], state_codes<Rule>(slot, k), first, n);
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
    walk<Rule, THREADS / WARP, 1>(launch, [&](const Slot& slot, unsigned block) {
        update_block<Rule, TypeP, TypeG, V>(launch, tables, slot, block, scale);
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
