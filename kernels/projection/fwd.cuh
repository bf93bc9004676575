// The projections' forward: packed outputs of up to three linear layers that share x [rows, in_dim],
//
//   out [rows, columns of p] = act(x W_p^T + bias_p + S_p b_p^T + scaling_p lora_bias_p) + residual,
//
// where S_p = scaling_p drop_p(x) a_p^T comes from low_rank.cu. A block makes one tile of one projection; the low-rank
// product is a further block of depth in its loop (projection/common.cuh). The sum is f32 until the one rounding of the
// output.
#pragma once
#include "projection/activation.cuh"
#include "projection/common.cuh"

// The depth of x, then the rank.
template <class Tile> struct ForwardSteps {
    using T = typename Tile::T;
    const ProjectionParams& p;
    const ProjectionPart& part;
    uint32_t row0, col0;
    static constexpr uint32_t kDepth = Tile::template kDepth<T>, kLowRankDepth = Tile::template kDepth<float>;

    __device__ __forceinline__ uint32_t weights() const { return ceil_div(p.in_dim, kDepth); }
    __device__ __forceinline__ uint32_t count() const { return weights() + ceil_div(part.rank, kLowRankDepth); }
    __device__ __forceinline__ Step at(uint32_t index) const {
        if (index < weights())
            return {p.left + uint64_t(row0) * p.in_dim * sizeof(T),
                    part.weight + uint64_t(col0) * p.in_dim * sizeof(T), p.in_dim, p.in_dim,
                    p.in_dim, index * kDepth, 0, false};
        return {p.low_rank + (uint64_t(row0) * p.s_stride + part.s_column) * sizeof(float),
                part.b + uint64_t(col0) * part.rank * sizeof(float),
                p.s_stride, part.rank, part.rank, (index - weights()) * kLowRankDepth, 0, true};
    }
};

// Element i of a bias: of the tensors' dtype, or f32.
template <class T> __device__ __forceinline__ float bias_at(device_ptr bias, bool typed, uint32_t i) {
    return typed ? to_float(global<const T>(bias)[i]) : global<const float>(bias)[i];
}

// N values of the tile's row, from the accumulator to memory.
template <class T, int N>
__device__ __forceinline__ void finish_forward(const ProjectionParams& p, const ProjectionPart& part, uint32_t row,
                                               uint32_t col, float (&v)[N]) {
    const uint64_t at = uint64_t(row) * p.total + part.column + col;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (part.bias != 0) v[i] += bias_at<T>(part.bias, part.bias_typed, col + i);
        if (part.lora_bias != 0)
            v[i] = fmaf(part.scaling, bias_at<T>(part.lora_bias, part.lora_bias_typed, col + i), v[i]);
    }
    if (p.sum != 0) store(global<T>(p.sum) + at, v);
    activate(v, p.activation);
    if (p.residual != 0) {
        float residual[N];
        load(residual, global<const T>(p.residual) + at);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += residual[i];
    }
    store(global<T>(p.out) + at, v);
}

// Block b makes column tile b % column_tiles (those of q, then k, then v) of row tile b / column_tiles.
template <class Tile> __device__ __forceinline__ void projection_fwd(const ProjectionParams& p) {
    using T = typename Tile::T;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const uint32_t column_tile = blockIdx.x % p.column_tiles;
    uint32_t index = 0, first = 0, end = 0;  // the part, and the tiles before it
#pragma unroll
    for (uint32_t i = 0; i < PROJECTION_PARTS; ++i) {
        const uint32_t tiles = ceil_div(p.parts[i].out_dim, uint32_t(Tile::kCols));
        if (tiles != 0 && column_tile >= end) index = i, first = end;
        end += tiles;
    }
    const ProjectionPart& part = p.parts[index];
    const uint32_t row0 = blockIdx.x / p.column_tiles * Tile::kRows, rows = p.rows - row0;
    const uint32_t col0 = (column_tile - first) * Tile::kCols, cols = part.out_dim - col0;

    typename Tile::Accumulators acc = {};
    sum_steps<Tile>(shared, acc, ForwardSteps<Tile>{p, part, row0, col0}, rows, cols,
                    [&](const auto& stage, const auto&) {
                        product_f32<Tile>(stage, [&](int m, int n, auto body) { add_product<Tile>(acc[m][n], body); });
                    });
    accumulators_to_rows<Tile>(shared, acc);
    if (vectorisable<T>(p.total | part.column | part.out_dim, p.out, p.sum, p.residual))
        for_tile<Tile, kVec<T>>(shared, rows, cols, [&](uint32_t row, uint32_t col, float(&v)[kVec<T>]) {
            finish_forward<T>(p, part, row0 + row, col0 + col, v);
        });
    else
        for_tile<Tile, 1>(shared, rows, cols, [&](uint32_t row, uint32_t col, float(&v)[1]) {
            finish_forward<T>(p, part, row0 + row, col0 + col, v);
        });
}
