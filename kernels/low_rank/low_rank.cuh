// The projections' products with one thin side, in f32 whatever the tensors' dtype:
//
//   | product | result                                          | left     | right     |
//   | input   | S_p [rows, rank] = scaling_p drop_p(x) a_p^T    | x [i, k] | a [j, k]  |
//   | grad    | dS_p [rows, rank] = scaling_p g_p b_p           | g [i, k] | b [k, j]  |
//   | weight  | da_p [rank, in_dim] = dS_p^T drop_p(x)          | x [k, i] | dS [k, j] |
//   |         | db_p [out_dim, rank] = g_p^T S_p                | g [k, i] | S [k, j]  |
//
// The thin side and the result are f32, multiplied as TF32 split in two (tile.cuh). A 16-bit left side is exact in
// TF32, so no range is lost either. Dropout is regenerated in shared memory, once for each element of a tile; its
// factor 1 / (1 - p) is part of the scale. The sums of `weight` go along the rows in splits, each a partial result that
// sum_partials/sum_partials.cu adds in order.
#pragma once
#include "common/philox.cuh"
#include "common/tile.cuh"

template <class T_, int kCols_, int kWarpsM_, int kWarpsN_, bool kLeftColumns_, bool kRightRows_> struct LowRankTile {
    using T = T_;
    static constexpr int kRows = 64, kCols = kCols_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kDepth = 32, kStages = 3;
    static constexpr bool kLeftColumns = kLeftColumns_, kRightRows = kRightRows_;
    // The widest one in f32 has no registers to spare for its copies.
    static constexpr bool kInVectors = sizeof(T) == 2 || kCols == 16;
    static constexpr int kM = kRows / kWarpsM / 16, kN = kCols / kWarpsN / 8;
    static_assert(kWarpsM * kWarpsN * kWarp == LOW_RANK_THREADS);
    // As they lie in memory. The padding avoids bank conflicts.
    static constexpr int kLeftTileRows = kLeftColumns ? kDepth : kRows, kLeftTileCols = kLeftColumns ? kRows : kDepth;
    static constexpr int kLeftStride = kLeftTileCols + (kLeftColumns ? 8 : kVec<T>);
    static constexpr int kRightTileRows = kRightRows ? kDepth : kCols, kRightTileCols = kRightRows ? kCols : kDepth;
    static constexpr int kRightStride = kRightTileCols + (kRightRows ? 8 : 4);

    struct Stage {
        alignas(16) T left[kLeftTileRows][kLeftStride];
        alignas(16) float right[kRightTileRows][kRightStride];
    };
    struct Storage {
        Stage stages[kStages];
    };
};

// Zeros the dropped elements of a tile whose corner is element (row0, col0) of the tensor; one thread a group of eight.
template <class Tile>
__device__ __forceinline__ void drop_tile(typename Tile::Stage& stage, const DropoutMask& mask, uint64_t row0,
                                          uint32_t col0) {
    constexpr int kGroups = Tile::kLeftTileCols / 8;
    for (int i = threadIdx.x; i < Tile::kLeftTileRows * kGroups; i += LOW_RANK_THREADS) {
        const int row = i / kGroups, group = i % kGroups;
        const uint4 words = dropout_words(mask, row0 + row, col0 / 8 + group);
#pragma unroll
        for (int lane = 0; lane < 8; ++lane)
            if (dropout_factor(mask, words, lane) == 0.0f)
                stage.left[row][group * 8 + lane] = from_float<typename Tile::T>(0.0f);
    }
}

// Block (i tile, j tile, part and split).
template <class Tile> __device__ __forceinline__ void low_rank(const LowRankParams& params) {
    using T = typename Tile::T;
    // Who takes the result begins beside the last of these blocks, and waits for it.
    ptx::griddepcontrol_launch_dependents();
    constexpr int kStages = Tile::kStages;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const uint32_t split = blockIdx.z % params.splits;
    const LowRankPart& p = params.parts[blockIdx.z / params.splits];
    const uint32_t i0 = blockIdx.x * Tile::kRows, j0 = blockIdx.y * Tile::kCols;
    if (i0 >= p.size_i || j0 >= p.out_j) return;
    const uint32_t begin = split * params.split_depth;
    const uint32_t end = p.depth - begin < params.split_depth ? p.depth : begin + params.split_depth;
    const uint32_t rows = p.size_i - i0, cols = p.size_j > j0 ? p.size_j - j0 : 0;

    const auto load = [&](int stage, uint32_t k) {
        auto& s = shared.stages[stage];
        const T* left = global<const T>(p.left);
        if constexpr (Tile::kLeftColumns)
            stage_tile<Tile::kLeftTileRows, Tile::kLeftTileCols, Tile::kLeftStride, LOW_RANK_THREADS>(
                &s.left[0][0], left + uint64_t(k) * p.left_stride + i0, p.left_stride, end - k, rows);
        else
            stage_tile<Tile::kLeftTileRows, Tile::kLeftTileCols, Tile::kLeftStride, LOW_RANK_THREADS>(
                &s.left[0][0], left + uint64_t(i0) * p.left_stride + k, p.left_stride, rows, end - k);
        const float* right = global<const float>(p.right);
        if constexpr (Tile::kRightRows)
            stage_tile<Tile::kRightTileRows, Tile::kRightTileCols, Tile::kRightStride, LOW_RANK_THREADS>(
                &s.right[0][0], right + uint64_t(k) * p.right_stride + j0, p.right_stride, end - k, cols);
        else
            stage_tile<Tile::kRightTileRows, Tile::kRightTileCols, Tile::kRightStride, LOW_RANK_THREADS>(
                &s.right[0][0], right + uint64_t(j0) * p.right_stride + k, p.right_stride, cols, end - k);
    };

    const int warp = threadIdx.x / kWarp;
    const int warp_i = warp / Tile::kWarpsN * Tile::kM * 16, warp_j = warp % Tile::kWarpsN * Tile::kN * 8;
    float acc[Tile::kM][Tile::kN][4] = {};
    const uint32_t steps = ceil_div(end - begin, uint32_t(Tile::kDepth));
    const auto wait = [] {
        ptx::cp_async_wait_group<kStages - 2>();
        __syncthreads();  // this stage has landed, and nobody reads the one before it any more
    };
    const auto multiply = [&](uint32_t step) {
        auto& stage = shared.stages[step % kStages];
        if (p.mask.threshold != 0) {
            const uint32_t k = begin + step * Tile::kDepth;
            drop_tile<Tile>(stage, seeded(p.mask), Tile::kLeftColumns ? k : i0, Tile::kLeftColumns ? i0 : k);
            __syncthreads();  // the mask is on
        }
        product_tf32<Tile::kDepth, sizeof(T) == 4, true, Tile::kM, Tile::kN>(
            [&](int i, int k) { return Tile::kLeftColumns ? stage.left[k][warp_i + i] : stage.left[warp_i + i][k]; },
            [&](int k, int j) { return Tile::kRightRows ? stage.right[k][warp_j + j] : stage.right[warp_j + j][k]; },
            [&](int m, int n, auto body) { add_rounded(acc[m][n], body); });
    };
    // Copies run so many steps ahead of products.
    constexpr uint32_t kAhead = kStages - 1;
    const auto load_step = [&](uint32_t step) {
        if (step < steps) load(step % kStages, begin + step * Tile::kDepth);
        ptx::cp_async_commit_group();
    };
    uint32_t next = 0;
#pragma unroll 1
    for (; next < kAhead; ++next) load_step(next);
    using Left = TileVectors<Tile::kLeftTileRows, Tile::kLeftTileCols, Tile::kLeftStride, LOW_RANK_THREADS,
                             Tile::kLeftColumns, T>;
    using Right = TileVectors<Tile::kRightTileRows, Tile::kRightTileCols, Tile::kRightStride, LOW_RANK_THREADS,
                              Tile::kRightRows, float>;
    const uint32_t k = begin + kAhead * Tile::kDepth;
    const bool fit = Left::fit(p.left, p.left_stride, i0, k, rows) && Right::fit(p.right, p.right_stride, j0, k, cols);
    if (Tile::kInVectors && fit) {
        Left left(p.left, p.left_stride, i0, k, rows);
        Right right(p.right, p.right_stride, j0, k, cols);
#pragma unroll 1
        for (; next < (end - begin) / Tile::kDepth; ++next) {
            wait();
            auto& stage = shared.stages[next % kStages];
            left.copy(&stage.left[0][0]);
            right.copy(&stage.right[0][0]);
            ptx::cp_async_commit_group();
            multiply(next - kAhead);
        }
    }
#pragma unroll 1
    for (; next < steps + kAhead; ++next) {
        wait();
        load_step(next);
        multiply(next - kAhead);
    }

    const int lane = threadIdx.x % kWarp;
    const float scale = p.scale * p.mask.scale;
    float* out = global<float>(p.out) + split * params.split_stride;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint32_t i = i0 + warp_i + m * 16 + lane / 4 + 8 * (e / 2),
                               j = j0 + warp_j + n * 8 + 2 * (lane % 4) + e % 2;
                if (i < p.size_i && j < p.out_j)
                    out[uint64_t(i) * p.out_stride_i + uint64_t(j) * p.out_stride_j] = scale * acc[m][n][e];
            }
}
