// The gradient of the projections' input,
//
//   dx [rows, in_dim] = sum over p of g_p W_p + drop_p(dS_p a_p),
//
// g [rows, total] is the gradient of the sums, and dS_p = scaling_p g_p b_p comes from low_rank.cu. A block makes one
// tile; the low-rank products are further blocks of depth in its loop (projection/common.cuh). Dropout multiplies the
// fragments of such a block on their way into the accumulators. The mask is linear, so its bits are made once for a
// projection and serve all its depth.
#pragma once
#include "common/dropout_fragment.cuh"
#include "projection/common.cuh"

// The depth of q, k and v, then their ranks.
template <class Tile> struct BackwardSteps {
    using T = typename Tile::T;
    const ProjectionParams& p;
    uint32_t row0, col0;
    static constexpr uint32_t kDepth = Tile::template kDepth<T>, kLowRankDepth = Tile::template kDepth<float>;

    __device__ __forceinline__ uint32_t weights() const {
        uint32_t sum = 0;
#pragma unroll
        for (int i = 0; i < PROJECTION_PARTS; ++i) sum += ceil_div(p.parts[i].out_dim, kDepth);
        return sum;
    }
    __device__ __forceinline__ uint32_t count() const {
        uint32_t sum = weights();
#pragma unroll
        for (int i = 0; i < PROJECTION_PARTS; ++i) sum += ceil_div(p.parts[i].rank, kLowRankDepth);
        return sum;
    }
    __device__ __forceinline__ Step at(uint32_t index) const {
        // Which product, and the steps before it: parts that are not there have none.
        uint32_t product = 0, first = 0, end = 0;
#pragma unroll
        for (uint32_t i = 0; i < 2 * PROJECTION_PARTS; ++i) {
            const ProjectionPart& part = p.parts[i % PROJECTION_PARTS];
            const uint32_t steps =
                i < PROJECTION_PARTS ? ceil_div(part.out_dim, kDepth) : ceil_div(part.rank, kLowRankDepth);
            if (steps != 0 && index >= end) product = i, first = end;
            end += steps;
        }
        const ProjectionPart& part = p.parts[product % PROJECTION_PARTS];
        if (product < PROJECTION_PARTS)
            return {p.left + (uint64_t(row0) * p.total + part.column) * sizeof(T),
                    part.weight + uint64_t(col0) * sizeof(T), p.total, p.in_dim,
                    part.out_dim, (index - first) * kDepth, product, false};
        return {p.low_rank + (uint64_t(row0) * p.s_stride + part.s_column) * sizeof(float),
                part.a + uint64_t(col0) * sizeof(float), p.s_stride, p.in_dim,
                part.rank, (index - first) * kLowRankDepth, product - PROJECTION_PARTS, true};
    }
};

template <class Tile> __device__ __forceinline__ void projection_bwd_input(const ProjectionParams& p) {
    using T = typename Tile::T;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const uint32_t row0 = blockIdx.x / p.column_tiles * Tile::kRows, rows = p.rows - row0;
    const uint32_t col0 = blockIdx.x % p.column_tiles * Tile::kCols, cols = p.in_dim - col0;

    typename Tile::Accumulators acc = {};
    uint32_t keep[Tile::kM / 2];
    sum_steps<Tile>(shared, acc, BackwardSteps<Tile>{p, row0, col0}, rows, cols,
                    [&](const auto& stage, const Step& step) {
        const DropoutMask& mask = p.parts[step.part].mask;
        if (mask.threshold == 0) {
            product_f32<Tile>(stage, [&](int m, int n, auto body) { add_product<Tile>(acc[m][n], body); });
            return;
        }
        // Two fragment rows share a word.
        if (step.k == 0) {
#pragma unroll
            for (int m = 0; m < Tile::kM; ++m) {
                const uint32_t row = row0 + Tile::warp_row() + m * 16, group = (col0 + Tile::warp_col()) / 8;
                const uint32_t bits = keep_bits(seeded(mask), row, group);
                keep[m / 2] = m % 2 == 0 ? bits : keep[m / 2] | bits << 16;
            }
        }
        product_f32<Tile>(stage, [&](int m, int n, auto body) {
            float product[4] = {};
            body(product);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (keep[m / 2] >> (16 * (m % 2) + keep_bit(n, i)) & 1)
                    acc[m][n][i] = fmaf(mask.scale, product[i], acc[m][n][i]);
        });
    });
    accumulators_to_rows<Tile>(shared, acc);
    T* out = global<T>(p.out) + uint64_t(row0) * p.in_dim + col0;
    if (vectorisable<T>(p.in_dim, p.out))
        for_tile<Tile, kVec<T>>(shared, rows, cols, [&](uint32_t row, uint32_t col, float(&v)[kVec<T>]) {
            store(out + uint64_t(row) * p.in_dim + col, v);
        });
    else
        for_tile<Tile, 1>(shared, rows, cols, [&](uint32_t row, uint32_t col, float(&v)[1]) {
            store(out + uint64_t(row) * p.in_dim + col, v);
        });
}
