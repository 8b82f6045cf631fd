// The outlier columns of int8_skinny.cu where they are few: their list, what the codes leave over of x, and W's codes.
#pragma once
#include "int8_layout.cuh"

template <class Layout>
struct ListedColumns : Layout {
    typedef typename Layout::E E;
    typedef typename Layout::storage storage;
    typedef typename Layout::Known Known;
    typedef typename Layout::Outliers Outliers;
    using Layout::MODE;
    using Layout::ROWS;
    using Layout::TOKENS;
    using Layout::kept;
    using Layout::own_place;

    // What a thread reads of listed columns and stores before the first tile's end: one token, every COLUMN_STEPth column.
    static constexpr int COLUMN_STEP = THREADS / TOKENS, COLUMNS = LIST / COLUMN_STEP;
    struct LeftOver {
        float scale;       // of the token
        storage x[COLUMNS];
        i8 code[COLUMNS];

        static __device__ __forceinline__ int token() { return threadIdx.x % TOKENS; }
        static __device__ __forceinline__ int column(int i) { return i * COLUMN_STEP + threadIdx.x / TOKENS; }

        __device__ __forceinline__ void ask_scale(const Operands& o) { scale = token() < o.m ? o.row_scale[token()] : 0.0f; }

        __device__ __forceinline__ void ask(const Operands& o, const unsigned char* tokens, const Known& known) {
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                if (column(i) >= known.count || token() >= o.m) break;
                const int at = known.columns[column(i)];
                x[i] = ((const storage*)o.x)[(i64)token() * o.k + at];
                code[i] = MODE == OWN ? (i8)tokens[own_place(token(), at & ~15, kept(o)) + at % 16] : o.codes[(i64)token() * o.k + at];
            }
        }

        __device__ __forceinline__ void store(const Operands& o, Known& known) const {
            if (MODE != OWN && threadIdx.x < TOKENS) known.absmax[threadIdx.x] = __float_as_uint(scale);
            const float own = MODE == OWN ? __uint_as_float(known.absmax[token()]) : scale;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                if (column(i) >= known.count || token() >= o.m) break;
                known.residual[column(i)][token()] = __fsub_rn(E::widen(x[i]), __fmul_rn((float)code[i], __fmul_rn(own, INVERSE_127)));
            }
        }
    };
    static_assert(LIST % COLUMN_STEP == 0, "all columns have a thread");

    // Lists the outlier columns, unless they are many. A thread takes a word of the mask at a time; `bits` is its first.
    static __device__ __forceinline__ void list_outliers(const Operands& o, const unsigned* mask, unsigned bits, Known& known) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, words = ((int)o.k + 31) / 32;
        int total = 0, turn = 0;
        for (int first = 0; first < words && total <= LIST; first += THREADS, turn ^= 1) {
            const int word = first + threadIdx.x;
            if (first > 0) bits = word < words ? mask[word] : 0;
            int before = __popc(bits);  // up to this thread, within its warp
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const int other = __shfl_up_sync(FULL_WARP, before, d);
                if (lane >= d) before += other;
            }
            if (lane == WARP - 1) known.counts[turn][warp] = before;
            before += total - __popc(bits);
            __syncthreads();
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const int count = known.counts[turn][w];
                total += count;
                if (w < warp) before += count;
            }
            for (; bits && before < LIST; bits &= bits - 1) known.columns[before++] = word * 32 + __ffs(bits) - 1;
        }
        if (threadIdx.x == 0) known.many = total > LIST, known.count = total > LIST ? 0 : total;
        __syncthreads();
    }

    // Asks for what a tile has in the listed columns, long before its end.
    static __device__ __forceinline__ void ask_outliers(const Operands& o, const Known& known, Outliers& outliers, int row0) {
        for (int i = threadIdx.x; i < known.count * ROWS; i += THREADS) {
            const int column = known.columns[i / ROWS], row = row0 + i % ROWS;
            if (row < o.n) copy_async4(shared_address(&outliers.weight[i / ROWS][i % ROWS]), o.weight + (row * o.k + (column & ~3)));
        }
        commit_copies();
    }
};
