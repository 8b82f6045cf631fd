// What the products by mma.sync share: the float32 scales of a weight's blocks.
#pragma once
#include "matmul4_fragments.cuh"
#include "matmul4_problem.cuh"

// The float32 scale of a block. Loads and arithmetic are apart, so that the loads can be under way early.
struct PlainScales {
    typedef float Raw;
    static constexpr bool NESTED = false;
    const float* absmax;
    float inverse_factor;

    __device__ __forceinline__ PlainScales(const Problem& p, const float*, float inverse_factor)
        : absmax((const float*)p.absmax), inverse_factor(inverse_factor) {}
    __device__ __forceinline__ Raw none() const { return 0.0f; }
    __device__ __forceinline__ Raw load(i64 block) const { return __ldg(absmax + block); }
    __device__ __forceinline__ float value(Raw raw) const { return raw * inverse_factor; }
};

struct NestedScales {
    struct Raw {
        unsigned code;  // 256 where there is no block
        float absmax;
    };
    static constexpr bool NESTED = true;
    const u8* codes;
    const float* code;  // 256 values in shared memory
    NestedSource source;
    float offset, inverse_factor;

    __device__ __forceinline__ NestedScales(const Problem& p, const float* code, float inverse_factor)
        : codes((const u8*)p.absmax), code(code), source(p.nested), offset(__ldg(p.nested.offset)), inverse_factor(inverse_factor) {}
    __device__ __forceinline__ Raw none() const { return Raw{256, 0.0f}; }
    __device__ __forceinline__ Raw load(i64 block) const { return Raw{__ldg(codes + block), source.absmax_of(block)}; }
    __device__ __forceinline__ float value(Raw raw) const {
        return raw.code > 255 ? 0.0f : nested_scale(code[raw.code], raw.absmax, offset) * inverse_factor;
    }
};
