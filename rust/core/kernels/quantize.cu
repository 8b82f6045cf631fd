// Blockwise quantization to 8-bit and 4-bit codes.
//
//   absmax[b] = max |x[i]| over block b        (NaN reads as 0, infinities as FLT_MAX)
//   codes[i]  = nearest code to x[i] / absmax[b], by core/src/codebook.rs's definition
//
//   x       n elements of E                     codes   n bytes, or (n + 1) / 2 bytes of two codes, the first in the high nibble
//   absmax  ceil(n / blocksize) float32         code    256 float32, or null for the signed dynamic map
//   sums    the launch's sums of absmax (block_sums.cuh), for double_quant.cu; or null
//
// Work: a tile is VECTORS 16-byte vectors a lane of a warp. Small blocks share a warp, `lanes` lanes each; larger ones take
// several vectors of every lane, and the largest several warps, which meet in shared memory. The block size is an argument,
// so that one kernel a type serves them all.
// A multiprocessor favours its oldest warps: were each given as many tiles, the youngest would end alone. So a large tensor has one
// block a multiprocessor, whose warps take tiles as they get free; small ones have more blocks of fewer threads.
// Whole tiles of aligned, finite numbers take the fast path, in registers; the rest (tails, odd addresses, NaN, infinity,
// subnormal blocks, codes without a table) the careful one, which reads a block twice.
// Bytes an element: sizeof(E) read, 1 or 1/2 written, 4 / blocksize of absmax. Searching a code would be bound by
// instructions, hence the one-read table of nearest.cuh.
#include "block_sums.cuh"
#include "nearest.cuh"

constexpr int MAX_THREADS = 1024;  // and at least 256: the warps of a block go on together
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int VECTORS = 4;

// Four bits an element.
//
// The float of t indexes the table as a signed integer, magnitudes ascending on both sides, so the negative half lies
// 2^(31 - SHIFT) words below the positive one. An ascending float with the sign set is a descending value: the negative half
// holds complements, and NF4's nibbles of negative elements are complemented back eight at a time. FP4 is sign and magnitude.
struct Encode4 {
    static constexpr bool SUMS = true;  // double quantization asks for them
    static constexpr int GAP = 1 << (31 - SHIFT_4BIT);
    static constexpr int HALF = FP4_ORIGIN > NF4_ORIGIN ? FP4_ORIGIN : NF4_ORIGIN;  // buckets of one sign
    struct Shared {
        unsigned negative[GAP], positive[HALF];
    };

    const unsigned* entries;
    float scale, zero, fold_limit;
    bool fp4;

    __device__ __forceinline__ Encode4(Shared& shared, const float*, int quant_type) {
        fp4 = quant_type == QUANT_TYPE_FP4;
        const unsigned* table = fp4 ? FP4_ENTRIES + FP4_ORIGIN : NF4_ENTRIES + NF4_ORIGIN;
        for (int i = threadIdx.x; i < (fp4 ? FP4_ORIGIN : NF4_ORIGIN); i += blockDim.x) {
            shared.positive[i] = table[i] - (fp4 ? 8u << 28 : 0u);  // ranks 8 to 15 are magnitudes 0 to 7
            shared.negative[i] = ~table[-1 - i] + (1u << LIFT_4BIT);
        }
        entries = shared.positive;
        scale = fp4 ? FP4_SCALE : NF4_SCALE;
        // Adding +0 makes -0 into +0, FP4's code 0 and not 8. Adding -0 changes nothing: NF4 needs the sign of x.
        // A negative t that underflows keeps its sign either way.
        zero = fp4 ? 0.0f : -0.0f;
        // Up to here reciprocal * scale is exact. FP4 also tells a negative t from one that underflowed to zero: none does below 1.
        fold_limit = fp4 ? 1.0f : scale * 0x1p126f;
        __syncthreads();
    }
    static __device__ __forceinline__ bool has_table() { return true; }

    // Codes of a vector of scaled quotients, two a byte, the first in the high nibble.
    template <class E>
    __device__ __forceinline__ unsigned pack(const float (&scaled)[E::PER_VECTOR], const uint4& x) const {
        unsigned packed = 0;
        // The last element pushed ends in the lowest nibble: bytes from the last to the first, high nibble before low.
#pragma unroll
        for (int pair = E::PER_VECTOR / 2 - 1; pair >= 0; pair--) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int bits = __float_as_int(scaled[2 * pair + i]);
                packed = __funnelshift_l(entries[bits >> SHIFT_4BIT] + ((unsigned)bits << LIFT_4BIT), packed, 4);
            }
        }
        // Magnitude m of FP4 has code m ^ ((m & 2) << 1).
        return fp4 ? packed ^ ((packed & 0x22222222u) << 1) : packed ^ E::negative_nibbles(x);
    }

    // Codes of a vector that starts at element `first`, inside the tensor and on a whole address.
    template <class E>
    __device__ __forceinline__ void store(const float (&scaled)[E::PER_VECTOR], const uint4& x, u8* codes, i64 first) const {
        const unsigned packed = pack<E>(scaled, x);
        if (E::PER_VECTOR == 8)
            __stcs(reinterpret_cast<unsigned*>(codes + first / 2), packed);
        else
            __stcs(reinterpret_cast<unsigned short*>(codes + first / 2), (unsigned short)packed);
    }
    // The same byte by byte, as far as the tensor goes; what lies past its end was read as 0.
    template <class E>
    __device__ __forceinline__ void store_some(const float (&t)[E::PER_VECTOR], const uint4& x, u8* codes, i64 first,
                                               i64 n) const {
        float scaled[E::PER_VECTOR];
#pragma unroll
        for (int i = 0; i < E::PER_VECTOR; i++) scaled[i] = __fmaf_rn(t[i], scale, zero);
        const unsigned packed = pack<E>(scaled, x);
        for (int i = 0; i < E::PER_VECTOR / 2; i++)
            if (first + 2 * i < n) codes[first / 2 + i] = (u8)(packed >> (8 * i));
    }
};

// Eight bits an element, any code. The signed dynamic map goes through its bucket table, whether it is the default or was
// passed; another code is sorted here and searched.
struct Encode8 {
    static constexpr bool SUMS = false;

    Nearest table;
    float scale, zero, fold_limit;
    bool dynamic;
    const float* thresholds;
    const u8* code_of_rank;

    struct Shared {
        union {
            __align__(16) unsigned entries[DYNAMIC_PADDED];
            struct {
                float values[256], thresholds[255];
                u8 code_of_rank[256];
            } any;
        };
    };

    __device__ __forceinline__ Encode8(Shared& shared, const float* code, int) {
        bool same = true;
        if (code)
            for (int i = threadIdx.x; i < 256; i += blockDim.x)
                same &= __float_as_uint(code[i]) == __float_as_uint(DYNAMIC_VALUES[i]);
        dynamic = __syncthreads_and(same);
        thresholds = shared.any.thresholds;
        code_of_rank = shared.any.code_of_rank;
        table.entries = shared.entries + DYNAMIC_ORIGIN;
        table.scale = scale = DYNAMIC_SCALE;
        zero = 0.0f;
        fold_limit = scale * 0x1p126f;
        if (dynamic) {
            load_table(shared.entries, DYNAMIC_ENTRIES, DYNAMIC_LENGTH);
        } else {
            sort_code(shared, code);
        }
        __syncthreads();
    }

    // Ranks by counting; equal values keep their order, and zeros are equal whatever their sign (adding +0 makes them so).
    static __device__ void sort_code(Shared& shared, const float* code) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            const int key = ordered(code[i] + 0.0f);
            int rank = 0;
            for (int j = 0; j < 256; j++) {
                const int other = ordered(code[j] + 0.0f);
                rank += other < key || (other == key && j < i);
            }
            shared.any.values[rank] = code[i] + 0.0f;
            shared.any.code_of_rank[rank] = (u8)i;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 255; i += blockDim.x)
            shared.any.thresholds[i] = (float)(((double)shared.any.values[i] + (double)shared.any.values[i + 1]) / 2.0);
    }

    __device__ __forceinline__ unsigned search(float t) const {
        unsigned rank = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2)
            if (t > thresholds[rank + step - 1]) rank += step;
        return code_of_rank[rank];
    }

    __device__ __forceinline__ bool has_table() const { return dynamic; }

    template <class E>
    __device__ __forceinline__ void store(const float (&scaled)[E::PER_VECTOR], const uint4&, u8* codes, i64 first) const {
        constexpr int LAST = E::PER_VECTOR - 4;
        const unsigned low = nearest_four(table, scaled[0], scaled[1], scaled[2], scaled[3]);
        if (E::PER_VECTOR == 8) {
            const unsigned high =
                nearest_four(table, scaled[LAST], scaled[LAST + 1], scaled[LAST + 2], scaled[LAST + 3]);
            __stcs(reinterpret_cast<uint2*>(codes + first), make_uint2(low, high));
        } else {
            __stcs(reinterpret_cast<unsigned*>(codes + first), low);
        }
    }
    template <class E>
    __device__ __forceinline__ void store_some(const float (&t)[E::PER_VECTOR], const uint4&, u8* codes, i64 first,
                                               i64 n) const {
#pragma unroll
        for (int i = 0; i < E::PER_VECTOR; i++) {
            const unsigned code = dynamic ? nearest_8bit(table, __fmaf_rn(t[i], scale, zero)) >> 24 : search(t[i]);
            if (first + i < n) codes[first + i] = (u8)code;
        }
    }
};

// The careful path: one block, or where `lanes` are fewer than a warp's, the blocks of one vector a lane. `index` is this lane's
// first vector, `vectors` how many it has. Returns the bits of the maximum that this lane has written, 0 for none.
template <class E, class Encode>
__device__ __noinline__ unsigned quantize_carefully(const typename E::storage* x, i64 index, i64 n, int vectors, int lanes,
                                                    Encode encode, u8* codes, float* absmax, int log2_blocksize) {
    const bool aligned = is_aligned(x, 16);
    float f[E::PER_VECTOR];
    unsigned m = 0;
#pragma unroll 1
    for (int k = 0; k < vectors; k++) {
        E::unpack(load_vector<E>(x, index + (i64)k * WARP, n, aligned), f);
#pragma unroll
        for (int i = 0; i < E::PER_VECTOR; i++) m = max(m, magnitude(finite(f[i])));
    }
    m = max_over_lanes(m, lanes);
    const Divisor divisor(__uint_as_float(m));
#pragma unroll 1
    for (int k = 0; k < vectors; k++) {
        const i64 vector = index + (i64)k * WARP;
        E::unpack(load_vector<E>(x, vector, n, aligned), f);
#pragma unroll
        for (int i = 0; i < E::PER_VECTOR; i++) f[i] = finite(f[i]);
        const uint4 signs = E::pack(f);  // a NaN with the sign set is a plain 0 here too
#pragma unroll
        for (int i = 0; i < E::PER_VECTOR; i++) f[i] = divisor.quotient(f[i]);
        encode.template store_some<E>(f, signs, codes, vector * E::PER_VECTOR, n);
    }
    const i64 first = index * E::PER_VECTOR;
    if (first >= n || (threadIdx.x & (lanes - 1)) != 0) return 0;
    absmax[first >> log2_blocksize] = __uint_as_float(m);
    return m;
}

template <class E, class Encode>
__device__ __forceinline__ void quantize(const typename E::storage* x, const float* code, u8* codes, float* absmax,
                                         i64 n, int log2_blocksize, int quant_type, Sums* sums) {
    constexpr int N = E::PER_VECTOR;
    constexpr int SPAN = WARP * N;  // elements of one vector a lane
    constexpr int TILE = VECTORS * SPAN;
    __shared__ typename Encode::Shared shared;
    __shared__ unsigned warp_max[2][MAX_WARPS], next_slot;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    if (threadIdx.x == 0) next_slot = warps;
    const Encode encode(shared, code, quant_type);  // meets at a barrier
    if (!Encode::SUMS || !sums) {
        let_next_kernel_start();
    } else if (warp == warps - 1) {
        open_sum(sums);
        let_next_kernel_start();
    }

    const int blocksize = 1 << log2_blocksize;
    const int lanes = min(WARP, blocksize / N);
    const int per_block = max(1, blocksize / SPAN);  // vectors a lane in one block, over all of its warps
    const int block_warps = max(1, blocksize / TILE);
    // Warps that go on together; at least four, since there are not enough barriers for pairs.
    const int together = block_warps > 1 ? max(4, block_warps) : 1;
    const int tiles = (int)((n + TILE - 1) / TILE);
    const int whole_tiles = encode.has_table() && is_aligned(x, 16) && is_aligned(codes, 8) ? (int)(n / TILE) : 0;
    // A lane stores the maximum of one of its vectors, so that a warp's leave together: the one that begins at this element of the tile.
    const int own_vector = lane & (lanes - 1);
    const bool owner =
        own_vector < VECTORS && (own_vector & (per_block - 1)) == 0 && (warp & (block_warps - 1)) == 0;
    const int own_at = owner ? own_vector * SPAN + lane * N : -1;
    OwnMaxima own_maxima;
    // Slot s, a multiple of `together`, is as many tiles from s * gridDim.x + blockIdx.x * together on.
    const int first_tile = (int)blockIdx.x * together + (warp & (together - 1));
    int slot = warp & -together;
#pragma unroll 1
    while (true) {
        const int tile = slot * (int)gridDim.x + first_tile;
        const i64 index = (i64)tile * (VECTORS * WARP) + lane;
        if ((tile & -together) >= tiles) break;
        // All warps of a block decide alike.
        const bool whole = (tile | (block_warps - 1)) < whole_tiles;
        const int parity = (slot & warps) != 0;

        uint4 v[VECTORS] = {};
        unsigned m[VECTORS];
        if (whole) {
#pragma unroll
            for (int k = 0; k < VECTORS; k++) v[k] = load_once(reinterpret_cast<const uint4*>(x) + index + k * WARP);
        }
        if (block_warps > 1) {
            slot += warps;
        } else {
            if (lane == 0) slot = count_up(&next_slot);
            slot = __shfl_sync(FULL_WARP, slot, 0);
        }
#pragma unroll
        for (int k = 0; k < VECTORS; k++) m[k] = E::absmax(v[k]);
        if (per_block >= 2) m[0] = m[1] = max(m[0], m[1]), m[2] = m[3] = max(m[2], m[3]);
        if (per_block >= 4) m[0] = m[1] = m[2] = m[3] = max(m[0], m[2]);
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
            for (int k = 0; k < VECTORS; k++) m[k] = max(m[k], __shfl_xor_sync(FULL_WARP, m[k], distance));
        }
        if (block_warps > 1) {
            if (lane == 0) warp_max[parity][warp] = m[0];
            const int first = warp & -block_warps;
            barrier(1 + (together == 4 ? warp / 4 : warp / 8), together * WARP);
            m[0] = max_over_lanes(warp_max[parity][first + (lane & (block_warps - 1))], block_warps);
            m[1] = m[2] = m[3] = m[0];
        }
        const unsigned largest = max(max(m[0], m[1]), max(m[2], m[3]));
        const unsigned smallest = min(min(m[0] - 1, m[1] - 1), min(m[2] - 1, m[3] - 1)) + 1;  // but for zeros
        if (!__all_sync(FULL_WARP, whole && is_plain(smallest) && is_plain(largest))) {
            // One warp does a block that is spread over several.
            if ((warp & (block_warps - 1)) == 0 && tile < tiles) {
                const int last = max(VECTORS, per_block);
#pragma unroll 1
                for (int k = 0; k < last; k += per_block) {
                    const i64 first = index + (i64)k * WARP;
                    const unsigned own =
                        quantize_carefully<E>(x, first, n, per_block, lanes, encode, codes, absmax, log2_blocksize);
                    if (Encode::SUMS) own_maxima.add(own);
                }
            }
            continue;
        }
        if (own_at >= 0) {
            const unsigned own = own_at & 2 * SPAN ? (own_at & SPAN ? m[3] : m[2]) : (own_at & SPAN ? m[1] : m[0]);
            absmax[((i64)tile * TILE + own_at) >> log2_blocksize] = __uint_as_float(own);
            if (Encode::SUMS && sums) own_maxima.add(own);
        }
        // For small enough maxima the reciprocal takes the scale in: one product an element instead of two.
        const bool folded = __all_sync(FULL_WARP, __uint_as_float(largest) < encode.fold_limit);
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            const float inverse = reciprocal(__uint_as_float(m[k]));
            float f[N];
            E::unpack(v[k], f);
            if (folded) {
#pragma unroll
                for (int i = 0; i < N; i++) f[i] = __fmaf_rn(f[i], inverse * encode.scale, encode.zero);
            } else {
#pragma unroll
                for (int i = 0; i < N; i++) f[i] = __fmaf_rn(__fmul_rn(f[i], inverse), encode.scale, encode.zero);
            }
            encode.template store<E>(f, v[k], codes, (index + k * WARP) * N);
        }
    }
    if (Encode::SUMS && sums)
        store_sum(own_maxima, absmax, (n + blocksize - 1) >> log2_blocksize, 31 - __clz(together * TILE) - log2_blocksize, sums);
}

// One line an instantiation.
#define QUANTIZE(NAME, E, ENCODE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)                                                         \
        NAME(const E::storage* x, const float* code, u8* codes, float* absmax, i64 n, int log2_blocksize, int quant_type, \
             Sums* sums) {                                                                                               \
        quantize<E, ENCODE>(x, code, codes, absmax, n, log2_blocksize, quant_type, sums);                                \
    }

QUANTIZE(quantize_4bit_f32, F32, Encode4)
QUANTIZE(quantize_4bit_f16, F16, Encode4)
QUANTIZE(quantize_4bit_bf16, BF16, Encode4)
QUANTIZE(quantize_8bit_f32, F32, Encode8)
QUANTIZE(quantize_8bit_f16, F16, Encode8)
QUANTIZE(quantize_8bit_bf16, BF16, Encode8)
