// How tiles are dealt out to clusters of blocks, and how parts of a tile meet.
//
// So that all clusters end together, each first takes some whole tiles in turn, then an equal run of what is left, counted in slots
// of codes: a run may begin and end within a tile. Whoever has a tile's last slots adds what those before have left in memory, in a
// fixed order, and writes. A cluster does its run from behind: it leaves its part of a tile before it waits for a part, and waits
// for clusters of lower number only, which therefore run or have run. How many blocks a cluster has, whoever includes this says: CLUSTER.
#pragma once
#include "element.cuh"

// How tiles are dealt out. Clusters of number c take tiles c, c + C, ... `rounds` times and then their run of the rest.
struct Split {
    // Where parts of tiles meet: 8 flags for each block (one a warp), then the sums of each block. Null where there are none.
    unsigned char* workspace;
    unsigned long long token;  // what a flag says of this launch's sums; no other value that the memory may hold
    int rounds;
};

// A piece of a tile: its slots first ... last - 1.
struct Piece {
    int tile, first, last;
};

// A cluster's pieces, one after another.
struct Schedule {
    int cluster, clusters, round, rounds, tiles, slots;
    i64 begin, end;  // of the run, in slots, counted from the first tile that is not dealt out whole

    __device__ __forceinline__ Schedule(int tiles, int slots, int rounds)
        : cluster(blockIdx.x / CLUSTER), clusters(gridDim.x / CLUSTER), round(0), rounds(rounds), tiles(tiles), slots(slots) {
        begin = bound(cluster), end = bound(cluster + 1);
    }

    // Where the run of a cluster begins.
    __device__ __forceinline__ i64 bound(int of) const {
        const i64 rest = (i64)max(tiles - rounds * clusters, 0) * slots;
        return rest * of / clusters;
    }

    __device__ __forceinline__ bool next(Piece& piece) {
        if (round < rounds) {
            piece = {round * clusters + cluster, 0, slots};
            round++;
            return piece.tile < tiles;
        }
        if (begin == end) return false;
        const i64 tile = (end - 1) / slots;
        piece.tile = rounds * clusters + (int)tile;
        piece.last = (int)(end - tile * slots);
        piece.first = (int)(max(begin, tile * slots) - tile * slots);
        end -= piece.last - piece.first;
        return true;
    }
};

// Four sums of a thread, as they lie in memory, where those of its neighbours follow.
template <class T>
struct alignas(16) Four {
    T a, b, c, d;
};

template <class T, int SUMS, int CONSUMERS>
__device__ __forceinline__ Four<T>* part(const Split& split, int cluster, unsigned rank) {
    const int blocks = gridDim.x, block = cluster * CLUSTER + rank;
    return reinterpret_cast<Four<T>*>(split.workspace + blocks * 64) + (i64)block * (SUMS / 4 * CONSUMERS) + threadIdx.x;
}
__device__ __forceinline__ unsigned long long* part_flag(const Split& split, int cluster, unsigned rank) {
    return reinterpret_cast<unsigned long long*>(split.workspace) + (cluster * CLUSTER + rank) * 8 + threadIdx.x / WARP;
}

template <int CONSUMERS, class T, int SUMS>
__device__ __forceinline__ void leave_part(const Split& split, int cluster, unsigned rank, const T (&sum)[SUMS]) {
    Four<T>* const to = part<T, SUMS, CONSUMERS>(split, cluster, rank);
#pragma unroll
    for (int i = 0; i < SUMS / 4; i++) to[i * CONSUMERS] = Four<T>{sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
    __syncwarp();
    if (threadIdx.x % WARP == 0) store_release(part_flag(split, cluster, rank), split.token);
}

// Adds the parts of the clusters `top` - i for the bits i of `which`, in this order.
template <int CONSUMERS, class T, int SUMS>
__device__ __forceinline__ void add_some(const Split& split, int top, unsigned which, unsigned rank, T (&sum)[SUMS]) {
    constexpr int TOGETHER = SUMS / 4 < 8 ? SUMS / 4 : 8;  // fours that are on their way at a time
    for (; which; which &= which - 1) {
        const Four<T>* const from = part<T, SUMS, CONSUMERS>(split, top - __ffs(which) + 1, rank);
#pragma unroll
        for (int first = 0; first < SUMS / 4; first += TOGETHER) {
            Four<T> v[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) v[i] = from[(first + i) * CONSUMERS];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                T* const to = &sum[4 * (first + i)];
                to[0] += v[i].a, to[1] += v[i].b, to[2] += v[i].c, to[3] += v[i].d;
            }
        }
    }
}

// What the clusters before have of a piece's tile, down to its first slot. Lanes wait for a part each.
template <int CONSUMERS, class T, int SUMS>
__device__ __forceinline__ void add_parts(const Split& split, const Schedule& schedule, const Piece& piece, unsigned rank, T (&sum)[SUMS]) {
    if (piece.first == 0) return;
    const i64 start = (i64)(piece.tile - schedule.rounds * schedule.clusters) * schedule.slots;
    bool all = false;
    for (int top = schedule.cluster - 1; !all; top -= WARP) {
        const int other = top - (int)(threadIdx.x % WARP);
        const i64 end = other < 0 ? 0 : schedule.bound(other + 1);
        const bool has = end > start && schedule.bound(other) < end;
        unsigned long long* const here = part_flag(split, other, rank);
        if (has)
            while (load_acquire(here) != split.token) {}
        const unsigned which = __ballot_sync(FULL_WARP, has);
        all = __any_sync(FULL_WARP, end <= start);
        __syncwarp();  // what lanes have acquired, all see
        add_some<CONSUMERS>(split, top, which, rank, sum);
        __syncwarp();  // all have read: the flags must not be found again when the same launch is replayed
        if (has) *here = 0;
    }
}
