// The rows of x that a block of int8_skinny.cu quantizes by itself.
#pragma once
#include "int8_layout.cuh"

template <class Layout>
struct OwnRows : Layout {
    typedef typename Layout::E E;
    typedef typename Layout::storage storage;
    typedef typename Layout::Known Known;
    using Layout::kept;
    using Layout::own_place;
    using Layout::padded;

    // What a warp quantizes of x: a row, or a share of one. Vectors are whole: k is a multiple of 16.
    struct Share {
        const uint4* from;
        int rows, token, first, step, vectors, padded;  // lanes take vectors first, first + step ...; past the last they are 0

        __device__ __forceinline__ explicit Share(const Operands& o) : rows(kept(o)) {
            const int warp = threadIdx.x / WARP;
            token = warp & (rows - 1), first = warp / rows * WARP + threadIdx.x % WARP, step = WARPS / rows * WARP;
            from = reinterpret_cast<const uint4*>((const storage*)o.x + token * o.k);
            vectors = token < o.m ? (int)o.k / E::PER_VECTOR : 0, padded = token < o.m ? OwnRows::padded(o) / E::PER_VECTOR : 0;
        }

        template <int COUNT>
        __device__ __forceinline__ void load(uint4 (&v)[COUNT], int turn) const {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int at = first + (turn * COUNT + i) * step;
                v[i] = at < vectors ? from[at] : make_uint4(0, 0, 0, 0);
            }
        }
    };

    // Quantizes the rows of x, COUNT vectors of a lane at a time; where these are all it has, they are read once. W is asked for after the
    // first of them.
    template <int COUNT, class Ask>
    static __device__ __forceinline__ void quantize(const Problem& p, const Share& share, unsigned char* tokens, Known& known,
                                                    unsigned* mask, const Ask& ask_weight) {
        constexpr int N = E::PER_VECTOR;
        const Threshold threshold(p.threshold);
        const int turns = (share.padded - share.first + COUNT * share.step - 1) / (COUNT * share.step);
        unsigned largest = 0;
        uint4 v[COUNT];
        share.load(v, 0);
        ask_weight();
        for (int turn = 0; turn < turns; turn++) {
            if (turn > 0) share.load(v, turn);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                unsigned outliers = 0;
                largest = max(largest, take_outliers<E>(v[i], threshold, outliers));
                const int at = share.first + (turn * COUNT + i) * share.step;
                if (outliers) atomicOr(mask + at * N / 32, outliers << at * N % 32);
            }
        }
        largest = warp_max(largest);
        if (threadIdx.x % WARP == 0) atomicMax(&known.absmax[share.token], largest);
        __syncthreads();
        const RowCode code(known.absmax[share.token]);
        for (int turn = 0; turn < turns; turn++) {
            if (turns > 1) share.load(v, turn);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int at = share.first + (turn * COUNT + i) * share.step;
                if (at >= share.padded) break;
                unsigned outliers = 0;
                if (turns > 1) take_outliers<E>(v[i], threshold, outliers);
                write_codes<E>(reinterpret_cast<i8*>(tokens + own_place(share.token, at * N, share.rows) + at * N % 16), v[i], code);
            }
        }
    }
};
