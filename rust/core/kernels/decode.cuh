// Packed 4-bit codes and block scales, as dequantize.cu and panel.cu read them; the scales' formula for all.
#pragma once
#include "element.cuh"
#include "tables.cuh"

// A block scale from its 8-bit code's value: two float32 operations.
__device__ __forceinline__ float nested_scale(float value, float absmax, float offset) {
    return __fadd_rn(__fmul_rn(value, absmax), offset);
}

struct PlainAbsmax {
    const float* absmax;

    __device__ __forceinline__ float operator()(i64 block) const { return absmax[block]; }
    __device__ __forceinline__ void prefetch_block(i64 block) const { prefetch(absmax + block); }
};

struct NestedAbsmax {
    const u8* codes;
    const float* code;  // 256 values in shared memory
    const float* absmax;
    int log2_blocksize;
    float offset;

    __device__ __forceinline__ float operator()(i64 block) const {
        return nested_scale(code[codes[block]], absmax[block >> log2_blocksize], offset);
    }
    __device__ __forceinline__ void prefetch_block(i64 block) const {
        prefetch(codes + block);
        prefetch(absmax + (block >> log2_blocksize));
    }
};

// Two codes a byte.
struct Decode4 {
    const float* values;  // 16, in shared memory

    // The codes of N elements from element `first` on.
    template <int N>
    static __device__ __forceinline__ uint2 load(const u8* codes, i64 first) {
        if (N == 8) return make_uint2(*reinterpret_cast<const unsigned*>(codes + first / 2), 0);
        return make_uint2(*reinterpret_cast<const unsigned short*>(codes + first / 2), 0);
    }
    // Value of element i of them.
    __device__ __forceinline__ float value(const uint2& packed, int i) const {
        return values[packed.x >> ((i ^ 1) * 4) & 15];
    }
    // Value of one element of the tensor.
    __device__ __forceinline__ float value_at(const u8* codes, i64 i) const {
        return values[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
};

__device__ __forceinline__ Decode4 load_values_4bit(float (&shared)[16], int quant_type) {
    if (threadIdx.x < 16) shared[threadIdx.x] = (quant_type == QUANT_TYPE_FP4 ? FP4_VALUES : NF4_VALUES)[threadIdx.x];
    return Decode4{shared};
}

// Copies the 256 values of the code of nested scales into shared memory; no code means the signed dynamic map. The caller
// synchronizes.
__device__ __forceinline__ void load_nested_code(float* shared, const float* code) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared[i] = code ? code[i] : DYNAMIC_VALUES[i];
}
