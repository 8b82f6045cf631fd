// PTX instructions that CUDA C++ has no name for, one named function each.
#pragma once

// The larger of two packed pairs of bfloat16; a NaN on either side gives NaN.
__device__ __forceinline__ unsigned max_nan_bf16x2(unsigned a, unsigned b) {
    unsigned r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// The larger of two packed pairs of float16; a NaN on either side gives NaN.
__device__ __forceinline__ unsigned max_nan_f16x2(unsigned a, unsigned b) {
    unsigned r;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// The larger of two float32; a NaN on either side gives NaN.
__device__ __forceinline__ float max_nan_f32(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// 1 / x to about one unit in the last place; subnormal results become 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Four bytes of (a, b), numbered 0..3 and 4..7, by the nibbles of `selector`; a nibble's bit 3 takes the byte's sign, eight times.
__device__ __forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
    unsigned r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

// (high, low) rounded to a packed pair of bfloat16, ties to even.
__device__ __forceinline__ unsigned pack_bf16x2(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// A 16-byte load of data that is read once: it takes no room in the L1 cache and is the first to leave the L2 cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// Starts to bring the line at a global address into the caches.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

// Waits until `threads` threads of the block have come to barrier `id` (0 is __syncthreads').
__device__ __forceinline__ void barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Where a kernel may start before the previous one of its stream has ended: waits until that one has ended and its writes are
// visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start, if it was launched to do so, up to its own wait.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
