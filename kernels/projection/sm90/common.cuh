// Shared by the projections' forward and their input's gradient on sm_90a: a persistent product whose blocks each make
// many tiles,
//
//   acc [kRows, kCols] = sum over steps of left [kRows, 128 bytes of depth] right [128 bytes of depth, kCols].
//
// Three warpgroups. One thread of the third copies the operands of step after step into a ring of stages; bulk copies
// count their bytes on `full`. The other two multiply the stages (wgmma) and give them back (`empty`). They share each
// tile's rows (cooperative), or take the tiles in turn (ping-pong). In a ping-pong, one warpgroup's epilogue runs
// beside the other's products.
//
// Blocks may form clusters, which make tiles of the same columns, one below the other. Each block then loads its part
// of `right` for all blocks (multicast), so that it comes from the L2 cache once. A stage is given back to all blocks
// that load into it. Tiles that lie below the last row are made like the others: copies fill them with zeros, and
// stores leave them out.
//
// Results leave through shared memory in pieces of 16 x 64 elements a warp, which bulk stores cut off at the tensor's
// edges.
#pragma once
#include "common/kernel.cuh"
#include "common/descriptor.cuh"

template <class T_, int kRows_, int kCols_, int kStages_, bool kPingPong_, int kCluster_ = 1>
struct ProjectionTileSm90 {
    using T = T_;
    static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_, kCluster = kCluster_, kDepth = 64,
                         kLowRankDepth = 32;
    static constexpr bool kPingPong = kPingPong_;
    static constexpr int kM = kRows / 64 / (kPingPong ? 1 : 2);  // products of 64 rows of a warpgroup
    static constexpr int kPiece = 64;                            // columns that are stored at once
    static_assert(sizeof(T) == 2 && kM >= 1 && kCols % kPiece == 0);

    struct Stage {
        unsigned char left[kRows * 128], right[kCols * 128];
    };
    struct Storage {
        Stage stages[kStages];
        unsigned char pieces[8][kM][16 * 128];
        ptx::mbarrier full[kStages], empty[kStages], loaded[8], turn[2];
    };
    using Accumulators = float[kM][kCols / 2];
};

// A position in the ring. The parity is that of the phase of `full` which the position's operands end.
template <int kStages> struct RingPosition {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance(uint32_t steps = 1) {
        stage += steps;
        parity ^= stage / kStages & 1;
        stage %= kStages;
    }
};

// The tiles of a cluster are `tile`, `tile` + clusters(), ...; in a row of tiles, its blocks make one below the other.
template <class Tile> __device__ __forceinline__ uint32_t first_tile() { return blockIdx.x / Tile::kCluster; }
template <class Tile> __device__ __forceinline__ uint32_t clusters() { return gridDim.x / Tile::kCluster; }
template <class Tile> __device__ __forceinline__ uint32_t block_row(uint32_t row_of_tiles) {
    if constexpr (Tile::kCluster == 1) return row_of_tiles * Tile::kRows;
    else return (row_of_tiles * Tile::kCluster + ptx::cluster_ctarank()) * Tile::kRows;
}

// Loads kRows rows of 128 bytes of `right`. Each block of the cluster loads its part for all blocks.
template <class Tile, int kRows>
__device__ __forceinline__ void load_right(unsigned char* to, const EncodedTensorMap& map, ptx::mbarrier& full,
                                           uint32_t x, uint32_t y) {
    if constexpr (Tile::kCluster == 1) {
        ptx::cp_async_bulk_tensor(to, map, full, x, y);
    } else {
        static_assert(kRows % (8 * Tile::kCluster) == 0, "a swizzled pattern is eight rows");
        const uint32_t first = ptx::cluster_ctarank() * (kRows / Tile::kCluster);
        ptx::cp_async_bulk_tensor_multicast(to + first * 128, map, full, (1 << Tile::kCluster) - 1, x, y + first);
    }
}

template <class Tile> __device__ __forceinline__ void initialise_barriers(typename Tile::Storage& shared) {
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < Tile::kStages; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i],
                               (Tile::kPingPong ? 4 : 8) * Tile::kCluster);  // the warps that read a stage
        }
#pragma unroll 1
        for (int i = 0; i < 8; ++i) ptx::mbarrier_init(shared.loaded[i], 1);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) ptx::mbarrier_init(shared.turn[i], 4);
        ptx::fence_mbarrier_init();
    }
    if constexpr (Tile::kCluster == 1) {
        __syncthreads();
    } else {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

// By the loading thread, behind its last step: until all stages have been given back, by the other blocks too. Nobody
// may arrive at the barriers of a block that has ended.
template <class Tile>
__device__ __forceinline__ void wait_for_last_stages(typename Tile::Storage& shared, RingPosition<Tile::kStages> at) {
    if constexpr (Tile::kCluster > 1) {
#pragma unroll 1
        for (int i = 0; i < Tile::kStages; ++i, at.advance())
            ptx::mbarrier_wait_parity(shared.empty[at.stage], at.parity ^ 1);
    }
}

// Runs the two tasks: produce() by one thread, consume(group) by the two warpgroups 0 and 1.
template <class Tile, class Produce, class Consume>
__device__ __forceinline__ void run_warpgroups(typename Tile::Storage& shared, Produce produce, Consume consume) {
    initialise_barriers<Tile>(shared);
    // From one lane, so that the compiler knows it to be the same for the warp.
    const int group = ptx::shfl_idx(threadIdx.x / 128, 0);
    if (group == 2) {
        ptx::setmaxnreg_dec<24>();
        if (threadIdx.x % 128 == 0) produce();
    } else {
        ptx::setmaxnreg_inc<240>();
        consume(group);
        if (threadIdx.x % kWarp == 0) ptx::cp_async_bulk_wait_group<0>();
    }
}

// In a ping-pong, each warpgroup waits before its products until the other one has seen all operands of the previous
// tile. Else it would be more than a phase ahead of a stage's barrier, and the barrier's parity cannot tell. `tiles` is
// the number of tiles that this warpgroup has made.
template <class Tile>
__device__ __forceinline__ void wait_for_turn(typename Tile::Storage& shared, int group, uint32_t tiles) {
    if constexpr (Tile::kPingPong) ptx::mbarrier_wait_parity(shared.turn[group], (tiles ^ uint32_t(group) ^ 1) % 2);
}

// A warp arrives at a barrier.
__device__ __forceinline__ void arrive(ptx::mbarrier& bar) {
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(bar);
}
// A warp lets the other warpgroup begin.
template <class Tile> __device__ __forceinline__ void pass_turn(typename Tile::Storage& shared, int group) {
    if constexpr (Tile::kPingPong) arrive(shared.turn[1 - group]);
}
// A warp gives back a stage that it has read.
template <class Tile> __device__ __forceinline__ void give_back(ptx::mbarrier& empty) {
    const uint32_t lane = threadIdx.x % kWarp;
    if constexpr (Tile::kCluster == 1) arrive(empty);
    else if (lane < Tile::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
}

// Starts the products of one step by a warpgroup, with rows of `left` from first_row on. With kRightRows, `right` lies
// as columns of 64 n in tiles [64 of depth][64], else as rows [n][128 bytes].
template <class Tile, bool kRightRows>
__device__ __forceinline__ void multiply_stage(typename Tile::Accumulators& acc, const typename Tile::Stage& stage,
                                               int first_row, bool& add) {
    const uint64_t left = descriptor_k_inner<128>(stage.left + first_row * 128);
    const uint64_t right =
        kRightRows ? descriptor_mn_inner<128>(stage.right, 64 * 128) : descriptor_k_inner<128>(stage.right);
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; ++k) {
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m)
            ptx::wgmma_m64k16<Tile::kCols, 0, kRightRows>(acc[m], left + descriptor_step(m * 64 * 128 + 32 * k),
                                                          right + descriptor_step(kRightRows ? 16 * 128 * k : 32 * k),
                                                          add, typename Tile::T{});
        add = true;
    }
}

// Runs steps `first` to `end` - 1 of a tile: body(stage, step) starts the products of one. The next step waits for
// them, so the tensor cores always have work. The products of stage `busy` are still in flight.
template <class Tile, class Body>
__device__ __forceinline__ void run_steps(typename Tile::Storage& shared, RingPosition<Tile::kStages>& at,
                                          typename Tile::Accumulators& acc, uint32_t first, uint32_t end,
                                          uint32_t& busy, Body body) {
#pragma unroll 1
    for (uint32_t step = first; step < end; ++step) {
        ptx::mbarrier_wait_parity(shared.full[at.stage], at.parity);
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) ptx::wgmma_pin(acc[m]);
        ptx::wgmma_fence();
        body(shared.stages[at.stage], step);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        if (step > 0) give_back<Tile>(shared.empty[busy]);
        busy = at.stage;
        at.advance();
    }
}
template <class Tile>
__device__ __forceinline__ void finish_steps(typename Tile::Storage& shared, typename Tile::Accumulators& acc,
                                             uint32_t busy) {
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) ptx::wgmma_pin(acc[m]);
    give_back<Tile>(shared.empty[busy]);
}

// A warp's piece of 16 x 64 in shared memory, rows of 128 bytes swizzled as bulk copies want them. Lane l gives the
// rows of matrix l / 8 of the four that hold columns 16 pair .. 16 pair + 15.
__device__ __forceinline__ unsigned char* piece_row(unsigned char* piece, int pair) {
    const int lane = threadIdx.x % kWarp, row = lane % 16, chunk = 2 * pair + lane / 16;
    return piece + row * 128 + ((chunk ^ row % 8) << 4);
}

// Writes columns `first` .. first + 63 of a warp's accumulators into its piece. On the way value(values, at) changes
// eight of them; `at` is their place in the piece.
template <class T, int kSize, class Value>
__device__ __forceinline__ void write_piece(unsigned char* piece, const float (&acc)[kSize], int first, Value value) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = acc[first / 2 + 8 * pair + i];
        unsigned char* at = piece_row(piece, pair);
        value(values, at);
        const uint32_t r[4] = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                               pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
        ptx::stmatrix_x4(at, r);
    }
}

// Until the stores from this warp's pieces have read them.
__device__ __forceinline__ void wait_for_stores() {
    if (threadIdx.x % kWarp == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncwarp();
}

// Stores a piece that the whole warp has written.
__device__ __forceinline__ void store_piece(const EncodedTensorMap& map, const unsigned char* piece, uint32_t column,
                                            uint32_t row) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
        ptx::cp_async_bulk_tensor_store(map, piece, column, row);
        ptx::cp_async_bulk_commit_group();
    }
}
