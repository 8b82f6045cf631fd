// One optimizer step of many tensors whose states are float32, in one launch.
//
//   p, g, state   n elements each; AdEMAMix has two averages in the first state, one after the other
//
// The table of tensors, the tiles and who does which work: optim.cuh. Bytes a parameter, bfloat16: AdamW 22, Lion 14, AdEMAMix
// 30. The launch is bound by memory, so every load of a block is in flight before the first is used; lanes have four elements
// of each half of a block, so that every access of a warp is to neighbouring bytes. Warps with registers for all of it are worth
// more than more warps.
#include "optim_rules.cuh"

constexpr int THREADS = 320;  // 96 registers each in two blocks a multiprocessor
constexpr int V = 4;

template <class Rule>
__device__ __forceinline__ float* state_address(const Slot& slot, int k) {
    if (k == 0) return slot.address<float>(STATE1);
    return slot.address<float>((k == 1) != Rule::HALVES ? STATE2 : STATE3);
}

template <class Rule, class TypeP, class TypeG>
__device__ __forceinline__ void update_block(const Step& launch, const Slot& slot, unsigned block, float scale) {
    constexpr int STATES = Rule::STATES_32BIT;
    const Known<F32> type_s(0);
    const TypeP type_p(launch.dtype_p);
    const TypeG type_g(launch.dtype_g);
    const Coefficients c = slot.c;
    const bool whole = block < slot.whole_blocks;

    Raw raw_p, raw_g, raw_s[STATES] = {};
    if (whole) {
        raw_p = type_p.template load<V>(slot.address<void>(P), block);
        raw_g = type_g.template load<V>(slot.address<void>(GRADIENT), block);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (Rule::has(c, k)) raw_s[k] = type_s.load<V>(state_address<Rule>(slot, k), block);
    } else {
        const i64 first = (i64)block * BLOCK, n = slot.field[N];
        raw_p = load_some<V>(slot.address<void>(P), first, n, type_p.size());
        raw_g = load_some<V>(slot.address<void>(GRADIENT), first, n, type_g.size());
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (Rule::has(c, k)) raw_s[k] = load_some<V>(state_address<Rule>(slot, k), first, n, 4);
    }

    float p[RUN], g[RUN], s[STATES][RUN];
    type_p.unpack(raw_p, p);
    type_g.unpack(raw_g, g);
    if (launch.control) {
#pragma unroll
        for (int i = 0; i < RUN; i++) g[i] = __fmul_rn(g[i], scale);
    }
#pragma unroll
    for (int k = 0; k < STATES; k++) type_s.unpack(raw_s[k], s[k]);
    unsigned largest[Rule::STATES];
    Rule::update(c, p, g, s, largest);
    const Raw packed = round_and_pack<V>(type_p, launch, slot, block, p);
    if (whole) {
        type_p.template store<V>(packed, slot.address<void>(P), block);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (Rule::has(c, k)) type_s.store<V>(type_s.pack(s[k]), state_address<Rule>(slot, k), block);
    } else {
        const i64 first = (i64)block * BLOCK, n = slot.field[N];
        store_some<V>(packed, slot.address<void>(P), first, n, type_p.size());
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (Rule::has(c, k)) store_some<V>(type_s.pack(s[k]), state_address<Rule>(slot, k), first, n, 4);
    }
}

template <class Rule, class TypeP, class TypeG>
__device__ __forceinline__ void step32(const Step& launch) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    float scale;
    if (is_skipped(launch.control, scale)) return;
    walk<Rule, THREADS / WARP, 4, 0>(launch, [&](const Slot& slot, unsigned block, unsigned) {
        update_block<Rule, TypeP, TypeG>(launch, slot, block, scale);
    });
    advance_counters(launch);
}

#define STEP32(NAME, RULE, TYPE_P, TYPE_G)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) optim32_##NAME(const __grid_constant__ Step launch) { \
        step32<RULE, TYPE_P, TYPE_G>(launch);                                                                       \
    }

// Types that differ, and rules that few use, share one instance a rule that asks for the types as it runs.
STEP32(adam_f32, Adam, Known<F32>, Known<F32>)
STEP32(adam_bf16, Adam, Known<BF16>, Known<BF16>)
STEP32(adam, Adam, Named, Named)
STEP32(ademamix, Ademamix, Named, Named)
STEP32(lion, Lion, Named, Named)
STEP32(sgd, Sgd, Named, Named)
STEP32(rmsprop, Rmsprop, Named, Named)
STEP32(adagrad, Adagrad, Named, Named)
STEP32(lamb, Lamb, Named, Named)
