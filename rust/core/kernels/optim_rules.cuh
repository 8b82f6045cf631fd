// The update rules, eight elements a lane: the formulas of tests/oracle_optim.py, one rounding a sign, nothing fused.
//
// A rule says which states it has, computes its coefficients, and updates p and the states from g. State k of a rule is `s[k]`;
// the maps of 8-bit states are signed but for state `UNSIGNED`. `update` also gives the lane's `largest_magnitude` of each of
// the first STATES states, and says whether the unsigned one, of which it gives `largest_bits`, is finite and not negative.
#pragma once
#include "optim.cuh"

// p and g, and what decay adds to g.
__device__ __forceinline__ void add_decay(const Coefficients& c, const Lanes& p, Lanes& g) {
    if (!(c.flags & INTO_GRADIENT)) return;
#pragma unroll
    for (int i = 0; i < RUN; i++) g[i] = __fadd_rn(g[i], __fmul_rn(c.weight_decay, p[i]));
}

__device__ __forceinline__ float average(float beta, float old, float rest, float value) {
    return __fadd_rn(__fmul_rn(beta, old), __fmul_rn(rest, value));
}

__device__ __forceinline__ float average_square(float beta, float old, float rest, float value) {
    return __fadd_rn(__fmul_rn(beta, old), __fmul_rn(__fmul_rn(rest, value), value));
}

__device__ __forceinline__ bool divide_by_roots(const Coefficients& c, Lanes& a, const Lanes& v, unsigned largest_a,
                                                unsigned largest_v) {
    return divide_by_roots(a, v, largest_a, largest_v, c.inverse2, c.eps, c.flags & PLAIN_DIVISOR, c.flags & ZEROS);
}

// What all rules have in common.
__device__ __forceinline__ Coefficients common_coefficients(const Group& group) {
    Coefficients c = {};
    c.keep = c.inverse1 = c.inverse2 = 1.0f;
    c.weight_decay = (float)group.weight_decay;
    c.beta1 = (float)group.beta1, c.rest1 = (float)(1.0 - group.beta1);
    c.beta2 = (float)group.beta2, c.rest2 = (float)(1.0 - group.beta2);
    c.eps = (float)group.eps;
    c.step = (float)group.rate();
    c.flags = (unsigned)group.flags & 31;
    return c;
}

__device__ __forceinline__ void finish(Coefficients& c, const Group& group, bool decay_into_gradient, bool momentum) {
    if (decay_into_gradient && group.weight_decay != 0.0) c.flags |= INTO_GRADIENT;
    if (momentum) c.flags |= MOMENTUM;
    c.flags |= divisor_flags(c.inverse2, c.eps, PLAIN_DIVISOR, ZEROS);
}

struct Adam {
    static constexpr int STATES = 2, STATES_32BIT = 3, UNSIGNED = 1;
    static constexpr bool HALVES = false;
    // Which of three addresses state k has, and whether the rule has it at all.
    static __device__ __forceinline__ bool has(const Coefficients& c, int k) { return k < 2 || c.flags & AMSGRAD; }

    static __device__ Coefficients coefficients(const Group& group, i64 t) {
        Coefficients c = common_coefficients(group);
        const double lr = group.rate();
        if (group.flags & DECOUPLED) c.keep = (float)(1.0 - lr * group.weight_decay);
        c.inverse2 = (float)(1.0 / sqrt(1.0 - power(group.beta2, t)));
        c.step = (float)(lr / (1.0 - power(group.beta1, t)));
        finish(c, group, !(group.flags & DECOUPLED), false);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fmul_rn(p[i], c.keep);
        add_decay(c, p, g);
        float u[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            s[0][i] = u[i] = average(c.beta1, s[0][i], c.rest1, g[i]);
            s[1][i] = average_square(c.beta2, s[1][i], c.rest2, g[i]);
        }
        largest[0] = largest_magnitude(s[0]);
        largest[1] = largest_bits(s[1]);
        bool plain;
        if (COUNT == STATES) {
            plain = divide_by_roots(c, u, s[1], largest[0], largest[1]);
        } else {
            float v[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                float& w = s[COUNT - 1][i];
                if (c.flags & AMSGRAD) w = w >= s[1][i] || w != w ? w : s[1][i];
                v[i] = c.flags & AMSGRAD ? w : s[1][i];
            }
            plain = divide_by_roots(c, u, v, largest[0], largest_bits(v));
        }
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(p[i], __fmul_rn(c.step, u[i]));
        return plain;
    }
};

struct Ademamix {
    static constexpr int STATES = 3, STATES_32BIT = 3, UNSIGNED = 2;
    static constexpr bool HALVES = true;  // states 0 and 1 are halves of one tensor
    static __device__ __forceinline__ bool has(const Coefficients&, int) { return true; }

    static __device__ double beta3(const Group& group, i64 t) {
        if (group.t_beta3 == 0.0) return group.beta3;
        const double part = (double)t / group.t_beta3;
        const double fast = group.log_beta1, slow = group.log_beta3;
        const double risen = exponential(fast * slow / ((1.0 - part) * slow + part * fast));
        return risen < group.beta3 ? risen : group.beta3;
    }
    static __device__ double alpha(const Group& group, i64 t) {
        if (group.t_alpha == 0.0) return group.alpha;
        const double risen = (double)t * group.alpha / group.t_alpha;
        return risen < group.alpha ? risen : group.alpha;
    }
    static __device__ Coefficients coefficients(const Group& group, i64 t) {
        Coefficients c = common_coefficients(group);
        c.keep = (float)(1.0 - group.rate() * group.weight_decay);
        const double slow = beta3(group, t);
        c.beta3 = (float)slow, c.rest3 = (float)(1.0 - slow);
        c.alpha = (float)alpha(group, t);
        c.inverse1 = (float)(1.0 / (1.0 - power(group.beta1, t)));
        c.inverse2 = (float)(1.0 / sqrt(1.0 - power(group.beta2, t)));
        finish(c, group, false, false);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        float u[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            s[0][i] = average(c.beta1, s[0][i], c.rest1, g[i]);
            s[1][i] = average(c.beta3, s[1][i], c.rest3, g[i]);
            s[2][i] = average_square(c.beta2, s[2][i], c.rest2, g[i]);
            u[i] = __fadd_rn(__fmul_rn(s[0][i], c.inverse1), __fmul_rn(c.alpha, s[1][i]));
        }
#pragma unroll
        for (int k = 0; k < 2; k++) largest[k] = largest_magnitude(s[k]);
        largest[2] = largest_bits(s[2]);
        const bool plain = divide_by_roots(c, u, s[2], largest_magnitude(u), largest[2]);
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(__fmul_rn(p[i], c.keep), __fmul_rn(c.step, u[i]));
        return plain;
    }
};

struct Lion {
    static constexpr int STATES = 1, STATES_32BIT = 1, UNSIGNED = -1;
    static constexpr bool HALVES = false;
    static __device__ __forceinline__ bool has(const Coefficients&, int) { return true; }

    static __device__ Coefficients coefficients(const Group& group, i64) {
        Coefficients c = common_coefficients(group);
        c.keep = (float)(1.0 - group.rate() * group.weight_decay);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        const float none = __fmul_rn(c.step, 0.0f);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const float u = average(c.beta1, s[0][i], c.rest1, g[i]);
            // lr * sign(u); NaN stays.
            float step = u > 0.0f ? c.step : none;
            step = u < 0.0f ? -c.step : step;
            step = u != u ? u : step;
            p[i] = __fsub_rn(__fmul_rn(p[i], c.keep), step);
            s[0][i] = average(c.beta2, s[0][i], c.rest2, g[i]);
        }
        largest[0] = largest_magnitude(s[0]);
        return true;
    }
};

// SGD, and LARS, whose gradient has a trust ratio.
struct Sgd {
    static constexpr int STATES = 1, STATES_32BIT = 1, UNSIGNED = -1;
    static constexpr bool HALVES = false;
    static __device__ __forceinline__ bool has(const Coefficients& c, int) { return c.flags & MOMENTUM; }

    static __device__ Coefficients coefficients(const Group& group, i64 t) {
        Coefficients c = common_coefficients(group);
        c.rest1 = (float)(1.0 - group.dampening);
        if (t == 1) c.flags |= FIRST_STEP;
        finish(c, group, true, group.beta1 != 0.0);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        add_decay(c, p, g);
#pragma unroll
        for (int i = 0; i < RUN; i++) g[i] = __fmul_rn(g[i], c.ratio);  // 1 changes nothing
        if (c.flags & MOMENTUM) {
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                s[0][i] = c.flags & FIRST_STEP ? g[i] : average(c.beta1, s[0][i], c.rest1, g[i]);
                g[i] = c.flags & NESTEROV ? __fadd_rn(g[i], __fmul_rn(c.beta1, s[0][i])) : s[0][i];
            }
        }
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(p[i], __fmul_rn(c.step, g[i]));
        largest[0] = largest_magnitude(s[0]);
        return true;
    }
};

// State 1 is the momentum, state 2 the average that centers; 8-bit states have neither.
struct Rmsprop {
    static constexpr int STATES = 1, STATES_32BIT = 3, UNSIGNED = -1;
    static constexpr bool HALVES = false;
    static __device__ __forceinline__ bool has(const Coefficients& c, int k) {
        return k == 0 || c.flags & (k == 1 ? MOMENTUM : CENTERED);
    }

    static __device__ Coefficients coefficients(const Group& group, i64) {
        Coefficients c = common_coefficients(group);
        finish(c, group, true, group.beta2 != 0.0);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        add_decay(c, p, g);
        float v[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) s[0][i] = v[i] = average_square(c.beta1, s[0][i], c.rest1, g[i]);
        if (COUNT == 3 && c.flags & CENTERED) {
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                float& h = s[COUNT - 1][i];
                h = __fadd_rn(h, __fmul_rn(c.rest1, __fsub_rn(g[i], h)));
                v[i] = __fsub_rn(v[i], __fmul_rn(h, h));
            }
        }
        largest[0] = largest_magnitude(s[0]);
        divide_by_roots(c, g, v, largest_magnitude(g), largest_magnitude(v));
        if (COUNT == 3 && c.flags & MOMENTUM) {
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                float& b = s[COUNT / 2][i];
                g[i] = b = __fadd_rn(__fmul_rn(c.beta2, b), g[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(p[i], __fmul_rn(c.step, g[i]));
        return true;
    }
};

struct Adagrad {
    static constexpr int STATES = 1, STATES_32BIT = 1, UNSIGNED = -1;
    static constexpr bool HALVES = false;
    static __device__ __forceinline__ bool has(const Coefficients&, int) { return true; }

    static __device__ Coefficients coefficients(const Group& group, i64 t) {
        Coefficients c = common_coefficients(group);
        c.step = (float)(group.rate() / (1.0 + ((double)t - 1.0) * group.lr_decay));
        finish(c, group, true, false);
        return c;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        add_decay(c, p, g);
#pragma unroll
        for (int i = 0; i < RUN; i++) s[0][i] = __fadd_rn(s[0][i], __fmul_rn(g[i], g[i]));
        largest[0] = largest_magnitude(s[0]);
        divide_by_roots(c, g, s[0], largest_magnitude(g), largest[0]);
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(p[i], __fmul_rn(c.step, g[i]));
        return true;
    }
};

struct Lamb {
    static constexpr int STATES = 2, STATES_32BIT = 2, UNSIGNED = 1;
    static constexpr bool HALVES = false;
    static __device__ __forceinline__ bool has(const Coefficients&, int) { return true; }

    static __device__ Coefficients coefficients(const Group& group, i64 t) {
        Coefficients c = common_coefficients(group);
        if (group.flags & BIAS_CORRECTION) {
            c.inverse1 = (float)(1.0 / (1.0 - power(group.beta1, t)));
            c.inverse2 = (float)(1.0 / sqrt(1.0 - power(group.beta2, t)));
        }
        finish(c, group, true, false);
        return c;
    }

    // The update before its trust ratio, in place of g, and the new states.
    static __device__ __forceinline__ bool direction(const Coefficients& c, const Lanes& p, Lanes& g, Lanes (&s)[2],
                                                     unsigned (&largest)[2]) {
        if (!(c.flags & DECOUPLED)) add_decay(c, p, g);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            s[0][i] = average(c.beta1, s[0][i], c.rest1, g[i]);
            s[1][i] = average_square(c.beta2, s[1][i], c.rest2, g[i]);
            g[i] = __fmul_rn(s[0][i], c.inverse1);
        }
        largest[0] = largest_magnitude(s[0]);
        largest[1] = largest_bits(s[1]);
        const bool plain = divide_by_roots(c, g, s[1], largest_magnitude(g), largest[1]);
        if (c.flags & DECOUPLED) add_decay(c, p, g);
        return plain;
    }

    template <int COUNT>
    static __device__ __forceinline__ bool update(const Coefficients& c, Lanes& p, Lanes& g, Lanes (&s)[COUNT],
                                                  unsigned (&largest)[STATES]) {
        const bool plain = direction(c, p, g, s, largest);
        const float step = __fmul_rn(c.step, c.ratio);
#pragma unroll
        for (int i = 0; i < RUN; i++) p[i] = __fsub_rn(p[i], __fmul_rn(step, g[i]));
        return plain;
    }
};
